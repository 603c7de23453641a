"""The gradients that a rank holds between steps: where they are, and whether replicas have summed them.

Design note. `step(accumulate=True)` leaves replicas' gradients unsummed where that costs no memory beyond what a step holds anyway: without
ZeRO and in its stage 1, whose textbook keeps gradients whole. Then `.grad` is this replica's own part of the sum of all steps so far,
each further step adds to it, and the one without `accumulate` sums over replicas, once. In stage 1 the part is in the whole parameter's
`.grad` and the shard's is a view of it, so that a shard whose gradient was taken away (`zero_grad`) says that all of it is.
In stages 2 and 3 a whole gradient between steps is what they are there to save: every step sums into the shards.

Sums from before the first of these steps are one replica's part. What has not been summed must not be clipped, or reach an optimizer, which
would move the replicas apart: that is an error, on all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autopar.runtime.parameter_shards import ParameterShards
from costmodel.errors import BadArgument


class HeldGradients:
    """Of one rank's `parameters`, or with ZeRO of its `shards` of them. `unsummed`: `.grad` is this replica's part."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], shards: ParameterShards | None) -> None:
        self.parameters, self.shards = parameters, shards
        self.unsummed = False

    @property
    def keeps_parts(self) -> bool:
        """Whether steps that accumulate leave the sum over replicas to the last one."""
        return self.shards is None or self.shards.stage < 2

    @property
    def updated(self) -> Mapping[str, torch.Tensor]:
        """What gets the sums, by name."""
        return self.parameters if self.shards is None else self.shards.of

    def all(self) -> list[torch.Tensor]:
        """The parameters, whole ones and shards."""
        return [*self.parameters.values(), *(self.shards.of.values() if self.shards is not None else ())]

    def holders(self) -> list[torch.Tensor]:
        """Those with a gradient, each counted once."""
        shards = self.shards.of if self.shards is not None else {}
        found = [each if each.grad is not None else shards.get(name, each) for name, each in self.parameters.items()]
        return [each for each in found if each.grad is not None]

    def clear(self) -> None:
        """No gradients."""
        self.unsummed = False
        for parameter in self.all():
            parameter.grad = None

    # ---- unsummed ones ----------------------------------------------------------------------------------------------

    def keep(self, sums: Mapping[str, torch.Tensor], coord: int) -> None:
        """A step that accumulates is over: what it left in `.grad` waits for the last one. `sums`: earlier ones, by name, of
        parameters without ZeRO. `coord`: of this replica.
        """
        self.unsummed = True
        _UNSUMMED.add(self)
        for name, earlier in sums.items():
            parameter, part = self.parameters[name], earlier if coord == 0 else earlier.zero_()
            parameter.grad = part if parameter.grad is None else part.add_(parameter.grad)
        if self.shards is None:
            return
        for name, shard in self.shards.of.items():
            parameter = self.parameters[name]
            if parameter.grad is None and shard.grad is not None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                begin, end = self.shards.within(name)
                own = parameter.grad.view(-1)[begin:end].view(shard.shape)
                shard.grad = own if shard.grad is None else own.add_(shard.grad)

    def take_up(self) -> None:
        """The next step of the same update begins: it adds to whole gradients, but to those that were taken away or set to 0."""
        if self.shards is None:
            return
        of_shards = {name: shard.grad for name, shard in self.shards.of.items() if shard.grad is not None}
        zeroed = not any(bool(gradient.any()) for gradient in of_shards.values())
        for name, shard in self.shards.of.items():
            whole = self.parameters[name]
            if shard.grad is None:
                whole.grad = None
            elif zeroed and whole.grad is not None:
                whole.grad.zero_()
            shard.grad = None

    def check_summed(self, what: str) -> None:
        """BadArgument if these are parts."""
        if self.unsummed and any(each.grad is not None for each in self.updated.values()):
            raise BadArgument(
                f"{what}: gradients have not been summed over the replicas",
                why="the last step was one with accumulate=True, after which another is to come",
                use="step(...) without accumulate for the last batch before it",
            )


_UNSUMMED: weakref.WeakSet[HeldGradients] = weakref.WeakSet()


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """BadArgument for an optimizer of parameters whose gradients are parts."""
    if not _UNSUMMED:
        return
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for held in list(_UNSUMMED):
        if not held.unsummed:
            _UNSUMMED.discard(held)
        elif any(id(parameter) in updated for parameter in held.all()):
            held.check_summed(f"{type(optimizer).__name__}.step()")


register_optimizer_step_pre_hook(_check_optimizer)

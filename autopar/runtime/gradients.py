"""The end of a step: gradients that several ranks hold parts of, summed once.

Design note. Two kinds: a tied weight is used by several stages, each with a gradient of its own; a partial gradient
is of a parameter that is whole on each tensor-parallel rank but was used on a part of the values there. Only this
step's part may be summed: what earlier steps left in `.grad` has been summed already, so it is set aside when the
step begins and added back at its end.

Exact tied sums (`TIED_EXACT`) keep the gradient of each microbatch and exchange all of them. One process that runs
microbatch after microbatch adds, per microbatch, the gradients of all uses (the last use first) and then that sum to
`.grad`; adding in any other order rounds differently. Without it, one accumulated gradient is exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.program import StageModule
from autopar.runtime.world import World

_TIED_TAG = 1 << 29


class GradientSums:
    """The tied and partial gradients of one rank's stage. False if there are none."""

    def __init__(
        self, world: World, stage: StageModule, parameters: Mapping[str, torch.Tensor], num_microbatches: int
    ) -> None:
        trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        self._world, self._parameters, self._num_microbatches = world, trained, num_microbatches
        self._tied = {name: tuple(stages) for name, stages in stage.TIED.items() if name in trained and len(stages) > 1}
        self._partial = [name for name in stage.PARTIAL_GRADIENTS if name in trained and world.axis("tp").size > 1]
        self._exact = stage.TIED_EXACT
        self._earlier: dict[str, torch.Tensor | None] = {}
        self._kept: dict[str, list[torch.Tensor | None]] = {}

    def __bool__(self) -> bool:
        return bool(self._tied or self._partial)

    def begin(self) -> None:
        """Set aside what earlier steps left."""
        for name in (*self._tied, *self._partial):
            if name not in self._earlier:
                self._earlier[name], self._parameters[name].grad = self._parameters[name].grad, None
        self._kept = {name: [None] * self._num_microbatches for name in self._tied} if self._exact else {}

    def after_backward(self, microbatch: int) -> None:
        """Keep a microbatch's gradients of tied weights apart."""
        for name, kept in self._kept.items():
            parameter = self._parameters[name]
            kept[microbatch], parameter.grad = parameter.grad, None

    def abandon(self) -> None:
        """The step failed: `.grad` is again what it was before it."""
        for name, earlier in self._earlier.items():
            self._parameters[name].grad = earlier
        self._earlier.clear()
        self._kept.clear()

    def finish(self) -> None:
        """Sum over the ranks, and add what was set aside."""
        for name in sorted(
            self._tied
        ):  # any two stages take the names that they share in the same order, one at a time
            self._sum_tied(name)
        if self._partial:
            self._sum_partial()
        for name, earlier in self._earlier.items():
            parameter = self._parameters[name]
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        self._earlier.clear()
        self._kept.clear()

    def _sum_tied(self, name: str) -> None:
        world, parameter, stages = self._world, self._parameters[name], sorted(self._tied[name], reverse=True)
        gradients = self._kept.get(name, [parameter.grad])
        mine = torch.stack([torch.zeros_like(parameter) if gradient is None else gradient for gradient in gradients])
        self._kept.pop(name, None)
        del gradients
        parts = {stage: mine if stage == world.stage else torch.empty_like(mine) for stage in stages}
        others = [stage for stage in stages if stage != world.stage]
        works = [(world.recv(parts[stage], stage, _TIED_TAG), stage) for stage in others]
        works += [(world.send(mine, stage, _TIED_TAG), stage) for stage in others]
        for work, stage in works:
            world.wait(work, stage)
        # one microbatch after the other onto what was there, unless that has still to wait for the sum over tp
        total = None if name in self._partial else self._earlier.pop(name, None)
        for microbatch in range(mine.shape[0]):
            gradient = parts[stages[0]][microbatch]
            for stage in stages[1:]:
                gradient = gradient + parts[stage][microbatch]
            total = gradient.clone() if total is None else total.add_(gradient)
        parameter.grad = total

    def _sum_partial(self) -> None:
        """One all_reduce per dtype."""
        axis = self._world.axis("tp")
        buckets: dict[torch.dtype, list[torch.Tensor]] = {}
        for name in self._partial:
            parameter = self._parameters[name]
            buckets.setdefault(parameter.dtype, []).append(parameter)
        for parameters in buckets.values():
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            flat = axis.all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
                parameter.grad = piece.view_as(parameter).clone()

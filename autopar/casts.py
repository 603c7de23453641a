"""Parameters in another dtype, cast once a step: what `p("h.0.up.weight", "bf16")` of a program is.

Design note. The copy is a leaf of every microbatch's graph. When autograd has given it a microbatch's gradient, that is cast to the
parameter's dtype and added to the parameter's `.grad`: the number that a cast inside the graph gives, added to the same sums. So sums
are never in the low dtype, whatever the number of microbatches. A leaf's gradient is taken as soon as it is complete, before backward
goes on, so sums over replicas start as early as for any parameter; in the last backward of a step the copy's memory goes with it.

A parameter that a stage uses in its own dtype as well must get the sum of both gradients at once, or bits would differ. There
`as_cast(p(name), p(name, "bf16"))` has the copy's value and the parameter's place in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


@torch.no_grad()
def add_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add to `.grad` as autograd does, in the parameter's dtype whatever that of the gradient."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    elif torch.promote_types(gradient.dtype, parameter.dtype) == parameter.dtype:
        parameter.grad.add_(gradient)
    else:
        parameter.grad.add_(gradient.to(parameter.dtype))


class HeldCasts:
    """The casts of a stage's `parameters`, for one step. `of`: by the parameter's name, those that have been made.

    `added` is told of each parameter that has got a gradient through its cast. `ending`: the backward that runs is the last of the
    step, and a cast that has got its gradient is let go of.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype],
        added: Callable[[torch.Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.ending = False
        self.of: dict[str, torch.Tensor] = {}
        self._parameters, self._dtypes, self._added = parameters, dtypes, added

    def make(self, name: str) -> torch.Tensor:
        """Cast a parameter as it is now."""
        parameter = self._parameters[name]
        made = self.of[name] = parameter.detach().to(self._dtypes[name])
        if parameter.requires_grad:
            made.requires_grad_()
            made.leaf = parameter  # type: ignore[attr-defined]
            made.register_post_accumulate_grad_hook(lambda copy: self._hand_on(name, copy))
        return made

    def make_all(self) -> HeldCasts:
        """Cast all of them."""
        for name in self._dtypes:
            self.make(name)
        return self

    def clear(self) -> None:
        """Let go of them: each refers to this, which only now no longer refers to it."""
        self.of.clear()

    def _hand_on(self, name: str, copy: torch.Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        if gradient is None:
            return
        parameter: torch.Tensor = copy.leaf  # type: ignore[attr-defined]
        if self.ending:
            self.of.pop(name, None)
            copy.data = copy.new_empty(0)
        add_gradient(parameter, gradient)
        del gradient
        if self._added is not None:
            self._added(parameter)


class _AsCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = parameter.dtype
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].to(ctx.dtype), None


def as_cast(parameter: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """`parameter.to(copy.dtype)` without the work: `copy` is that already."""
    return _AsCast.apply(parameter, copy.detach())

"""Matmuls whose weight gradients can wait: what programs of schedules with a split backward call.

Design note. A linear's backward is two products: one gives the gradient of its input, which the stage before waits for, and one
the gradient of its weight, which nobody waits for. In `BackwardInput` the second is put on the stage's list, with the two tensors it
takes; `BackwardWeight` computes what is on the list (`add_deferred`). In `Backward` there is no list and both are computed at once.
So the split is in the program, at the ops that it is about, and nothing walks autograd's graph.

Each product is the one that autograd's own formula for the same op makes, on operands of the same layout, since a transposed operand
may round otherwise: results equal `F.linear`'s, `torch.addmm`'s and `@`'s to the last bit (a test holds them to that). Likewise a parameter
that several calls of one stage use gets the sum of their gradients first, the last call's first, and then that sum is added to `.grad`.
Where they use the cast of it that a step is made with (`casts.py`), the first sum is in the low dtype, as autograd's is, the second is not.

A parameter's gradient is deferred only if all its uses on the stage are of this kind: the emitter sees to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from autopar.casts import add_gradient

if TYPE_CHECKING:
    from autopar.program import StageModule


class Product(NamedTuple):
    """A weight gradient to compute: of `y = x @ weight` (`linear`: of `y = x @ weight.T`) plus bias, for y's `gradient`."""

    weight: torch.Tensor | None  # None: it needs no gradient
    bias: torch.Tensor | None
    x: torch.Tensor
    gradient: torch.Tensor
    linear: bool

    def of_weight(self) -> torch.Tensor:
        """[*weight]"""
        x, gradient = _rows(self.x), _rows(self.gradient)
        return gradient.t().mm(x) if self.linear else x.t().mm(gradient)

    def of_bias(self) -> torch.Tensor:
        """[features of y]: summed over all others, in one go or over dims as torch has fused the bias or added it."""
        gradient, x = self.gradient, self.x
        if gradient.ndim == 1:
            return gradient.clone()
        if gradient.ndim == 2 or x.is_contiguous():
            return _rows(gradient).sum(0)
        return gradient.sum(list(range(gradient.ndim - 1)))


def _leaf_of(parameter: Any) -> Any:
    """What gets the gradient of a parameter: itself, or the one that a gathered value (`runtime/gathered.py`) or a cast (`casts.py`)
    stands for.
    """
    return getattr(parameter, "leaf", parameter)


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value if value.ndim == 2 else value.reshape(-1, value.shape[-1])


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stage: StageModule, linear: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.stage, ctx.linear = _leaf_of(weight), _leaf_of(bias), stage, linear
        if linear:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x, weight), gradient, linear = ctx.saved_tensors, gradients[0], ctx.linear
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_x = None
        if wants_x:
            rows, other = _rows(gradient), weight if linear else weight.t()
            by_column = x.ndim == 2 and x.stride(0) == 1 and x.stride(1) == x.shape[0]
            of_x = (other.t().mm(rows.t()).t() if by_column else rows.mm(other)).view(x.shape)
        if not (wants_weight or wants_bias):
            return of_x, None, None, None, None
        x = x.detach()  # without the graph, which holds what the stage's casts are added to
        product = Product(ctx.weight if wants_weight else None, ctx.bias if wants_bias else None, x, gradient, linear)
        if ctx.stage.deferred is None:
            return (
                of_x, product.of_weight() if wants_weight else None, product.of_bias() if wants_bias else None, None, None,
            )  # fmt: skip
        ctx.stage.deferred.append(product)
        return of_x, None, None, None, None


def deferred_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, stage: StageModule
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`; the gradients of weight [out, in] and bias [out] wait for BackwardWeight."""
    return _Matmul.apply(x, weight, bias, stage, True)


def deferred_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, stage: StageModule
) -> torch.Tensor:
    """`x @ weight` or `torch.addmm(bias, x, weight)`, x of two dims; the gradients of weight [in, out] and bias [out] wait."""
    return _Matmul.apply(x, weight, bias, stage, False)


@torch.no_grad()
def add_deferred(products: list[Product], done: Callable[[torch.Tensor], None] | None = None) -> None:
    """Compute the products in their order, add them to `.grad` as autograd does, and let go of each when it is done.

    `done` is told of each parameter when it has got all of theirs.
    """
    last: dict[int, int] = {}
    for index, product in enumerate(products):
        for parameter in product[:2]:
            if parameter is not None:
                last[id(parameter)] = index
    sums: dict[int, torch.Tensor] = {}
    for index in range(len(products)):
        product = products.pop(0)
        for parameter, compute in ((product.weight, product.of_weight), (product.bias, product.of_bias)):
            if parameter is not None:
                is_last = last[id(parameter)] == index
                _add(parameter, compute(), is_last, sums)
                if is_last and done is not None:
                    done(parameter)


def _add(parameter: torch.Tensor, gradient: torch.Tensor, is_last: bool, sums: dict[int, torch.Tensor]) -> None:
    key = id(parameter)
    if key in sums:
        gradient = sums.pop(key).add_(gradient)
    if not is_last:
        sums[key] = gradient
    else:
        add_gradient(parameter, gradient)

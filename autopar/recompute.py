"""Segments that are computed again in backward, instead of what autograd saves in them being kept.

Design note. `recompute(self.h_0, x)` runs the method as it is, under autograd's own hooks for saved tensors: where an op saves a tensor,
a `_Slot` is put in its place. The first slot that backward asks for runs the method once more from its arguments, which are all that was
kept, and the tensors that are saved then fill the slots, in the same order. So the graph is the one that is built without recomputation:
gradients meet, and are added, in the same order, and are equal to the last bit. Values may leave a segment in several ways, arguments
may be integers or need no gradient, and ops that put off their weight gradients find what they saved.

- The second run ends at the last tensor that is asked for: what follows it (a residual sum, the all_reduce of a row-parallel matmul, the
  last matmul itself) is not run again. All tensor-parallel peers run the same text, and so meet in the same collectives.
- A slot's tensor goes when the op that saved it is done, as it does without recomputation.
- Random numbers are drawn again from the state that the stage's generators had (`random=True`), which then get back the state they have.
- Without gradients (evaluation) it is a plain call.

torch.utils.checkpoint does the same for modules in general; this leaves out its checks, its global random state and autocast, which
emitted programs do not use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from autopar.program import StageModule


class _Enough(Exception):
    """The second run has saved all that the first did."""


class _Slot:
    """What stands for a saved tensor. Autograd holds it, and nobody else."""

    __slots__ = ("__weakref__", "segment", "value")

    def __init__(self, segment: _Segment) -> None:
        self.segment = segment
        self.value: torch.Tensor | None = None


class _Segment:
    """One run of a segment: how to run it again."""

    __slots__ = ("arguments", "function", "random_state", "slots")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], random: bool) -> None:
        self.function, self.arguments = function, arguments
        self.random_state = _stage_of(function).random_state() if random else None
        self.slots: list[weakref.ref[_Slot]] = []

    def pack(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot(self)
        self.slots.append(weakref.ref(slot))
        return slot

    def fill(self) -> None:
        """The second run."""
        arguments = [
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
            for value in self.arguments
        ]
        slots, number = self.slots, 0

        def keep(tensor: torch.Tensor) -> None:
            nonlocal number
            slot = slots[number]()
            number += 1
            if slot is not None:
                slot.value = tensor.detach()
            if number == len(slots):
                raise _Enough

        stage = _stage_of(self.function) if self.random_state is not None else None
        now = stage.random_state() if stage is not None else None
        if stage is not None and self.random_state is not None:
            stage.set_random_state(self.random_state)
        try:
            with torch.enable_grad(), saved_tensors_hooks(keep, _never):
                self.function(*arguments)
        except _Enough:
            pass
        finally:
            if stage is not None and now is not None:
                stage.set_random_state(now)


def _unpack(slot: _Slot) -> torch.Tensor:
    if slot.value is None:
        slot.segment.fill()
    assert slot.value is not None, "the second run of a segment saved fewer tensors than the first"
    return slot.value


def _never(_: None) -> torch.Tensor:
    raise AssertionError("the second run has no backward of its own")


def _stage_of(function: Callable[..., Any]) -> StageModule:
    return function.__self__  # type: ignore[attr-defined]


def recompute(function: Callable[..., Any], *arguments: Any, random: bool = False) -> Any:
    """`function(*arguments)`, a method of a stage, computed again in backward: of all it needs only the arguments are kept.

    `random`: it draws random numbers; backward then sees the same.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    with saved_tensors_hooks(_Segment(function, arguments, random).pack, _unpack):
        return function(*arguments)

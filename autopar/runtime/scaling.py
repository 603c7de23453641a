"""Loss scaling: what keeps the gradients of fp16 activations from underflow. `torch.amp.GradScaler`'s rule, inside a step.

Design note. A step's backward starts from the scale instead of from 1, so all gradients, between stages too, are that much larger; at the
end of the step they are divided by it, and are then what they would be without. If one is not finite on any rank, all ranks know: the
step is an overflow. It leaves no gradients (`.grad` None, so any optimizer leaves the parameters and its own state alone, as a GradScaler
that skips), and the scale is halved; after 2,000 steps without one it is doubled. The first steps usually overflow: 65,536 is
meant to be too much. `step` returns the loss all the same. A job that goes on later goes on with the same scale (`state_dict`).

Several steps for one update (`accumulate=True`): gradients that are there already, sums or parts of them (`held_gradients.py`), are
multiplied by the scale (a power of 2, so exactly) and divided with the others. An overflow in any of them is one of the update: the last
leaves no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autopar.runtime.axis import Axis
from autopar.runtime.held_gradients import HeldGradients
from costmodel.errors import BadArgument

INITIAL = 2.0**16
GROWTH_STEPS = 2000


class LossScale:
    """The scale that all ranks share in value. `value` is it; `skipped` counts the updates that overflowed."""

    def __init__(self) -> None:
        self.value = INITIAL
        self.skipped = 0
        self._since_overflow = 0
        self._overflow = False  # in an earlier step of the same update

    def state_dict(self) -> dict[str, float | int]:
        """`scale`, `growth_tracker` (updates since the last overflow or growth; both as a GradScaler's), `skipped`. Between updates."""
        return {"scale": self.value, "growth_tracker": self._since_overflow, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s numbers, or from a GradScaler's. BadArgument, with nothing changed, if they cannot be."""
        scale, tracker, skipped = state.get("scale"), state.get("growth_tracker", state.get("_growth_tracker")), state.get("skipped", 0)
        if not isinstance(scale, (int, float)) or not (math.isfinite(scale) and scale > 0):
            raise BadArgument(f"the loss scale's state has scale = {scale!r}", use="a number above 0")
        if not isinstance(tracker, int) or not 0 <= tracker < GROWTH_STEPS or not isinstance(skipped, int) or skipped < 0:
            raise BadArgument(
                f"the loss scale's state has growth_tracker = {tracker!r} and skipped = {skipped!r}",
                use=f"integers: 0 to {GROWTH_STEPS - 1} updates since the last overflow, 0 or more skipped",
            )
        self.value, self._since_overflow, self.skipped, self._overflow = float(scale), tracker, skipped, False

    @contextmanager
    def step(
        self, held: Sequence[HeldGradients], device: torch.device, axes: Iterable[Axis] = (), *,
        accumulate: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """Around a step of the ranks of `axes`, which have the gradients `held`. `accumulate`: another step of the same update follows.

        A step that raises leaves what gradients it leaves divided.
        """
        _multiply(held, self.value)
        try:
            yield
        except BaseException:
            _multiply(held, 1.0 / self.value)
            raise
        self._finish(held, device, axes, accumulate)

    def _finish(
        self, held: Sequence[HeldGradients], device: torch.device, axes: Iterable[Axis], accumulate: bool
    ) -> None:
        overflow = _unscale(_gradients(held), 1.0 / self.value, device)
        for axis in axes:
            overflow = axis.all_reduce(overflow)
        self._overflow = self._overflow or bool(overflow)
        if self._overflow:
            for each in held:
                each.clear()
        if accumulate:
            return
        overflowed, self._overflow = self._overflow, False
        if overflowed:
            self.value, self._since_overflow = self.value / 2, 0
            self.skipped += 1
        else:
            self._since_overflow += 1
            if self._since_overflow == GROWTH_STEPS:
                self.value, self._since_overflow = self.value * 2, 0


def _gradients(held: Iterable[HeldGradients]) -> list[torch.Tensor]:
    return [holder.grad for each in held for holder in each.holders() if holder.grad is not None]


def _multiply(held: Iterable[HeldGradients], factor: float) -> None:
    for gradient in _gradients(held):
        gradient.mul_(factor)


def _unscale(gradients: list[torch.Tensor], factor: float, device: torch.device) -> torch.Tensor:
    """Multiply in place; [1], above 0 if one is not finite. By the kernel that a GradScaler uses."""
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.dtype, []).append(gradient)
    found, factor_there = torch.zeros(1, device=device), torch.full((1,), factor, device=device)
    for group in groups.values():
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, factor_there)
    return found

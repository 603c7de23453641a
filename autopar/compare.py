"""Results that should be equal but for rounding: by how much may they differ?

In full precision the yardstick is fixed. A tensor's relative difference is its largest absolute difference from the
untouched model's over the latter's largest element; it may be 1e-5, and the loss may be off by 1e-6.

In low precision (bf16, fp16) no fixed number is right. The untouched model is itself off, by an amount that depends on
the model: depth, cancellation and norms over few elements amplify rounding. So both sides are measured against the
untouched model run once more in float64, on the same numbers, and the parallel side may be off by a few times what the
untouched side is off by:

    error(parallel) <= LOW_PRECISION_FACTOR * max(error(untouched), typical, eps)

error(x) = |x - exact| / |exact| of one whole tensor, in the L2 norm: a maximum would be the luck of one element.
`typical` is the median of error(untouched) over the model's gradients: a tensor of a few elements can be right by
chance, and another order of summation has other luck. `eps` is the spacing of the dtype's numbers at 1 (2^-7 in bf16,
2^-10 in fp16), the rounding of the result itself. A wrong result, such as a sum that one rank's part is missing from,
is off by a good part of its size. The right-hand side is held below LARGEST_ALLOWED, so that a gradient that is missing
or is another's never passes, however badly the untouched model rounds.

The factor is 4. Over tests/zoo.py in bf16, five layouts each, the largest ratio seen is 1.7; where a ReLU's argument is so
near zero that another order of summation changes its sign, which is rounding too and moves all gradients before it, it
is 3.5. (`python tests/zoo_table.py --bf16` prints them.)

A gradient that is zero but for rounding, such as that of a bias before a norm, can be off by more than 1e-5 of anything.
So where a gradient or the loss fails the fixed yardstick, the untouched model is run in float64 too, and the difference may be
ROUNDING_FACTOR times what the untouched gradient itself is off by (or the median of that over all gradients, as above:
one tensor can be right by chance), if that is rounding: no more than MOST_ROUNDING of the model's largest gradient, or
a hundred times the tolerance. The latter is for models with large weights or deep recurrences, which amplify rounding.

Gradients that are all rounding (below a thousandth of the model's largest, such as that of a key projection's bias) are
measured against that thousandth.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
FLOOR = 1e-3
LOW_PRECISION = (torch.bfloat16, torch.float16)
LOW_PRECISION_FACTOR = 4.0
LARGEST_ALLOWED = 0.5
ROUNDING_FACTOR = 4.0
MOST_ROUNDING = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What a step gave: its loss, and by name every gradient (None: there is none) and every buffer."""

    loss: Tensor
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One tensor compared: kind is "gradient" or "buffer". `relative` may be `allowed`; in low precision it is the error
    against the exact model, and `untouched` is the untouched model's."""

    name: str
    kind: str
    absolute: float
    relative: float
    allowed: float = GRADIENT_TOLERANCE
    untouched: float = 0.0

    @property
    def ok(self) -> bool:
        """Is it within what is allowed?"""
        return self.relative <= self.allowed

    @property
    def badness(self) -> float:
        """What orders them: how many times what is allowed, then how large."""
        return self.relative / self.allowed if self.allowed else float("inf") if self.relative else 0.0


@dataclass(frozen=True)
class Comparison:
    """Every tensor of two outcomes, and the loss: how far off (absolute; in low precision, from the exact one) and how
    much of `loss_scale` that may be."""

    differences: tuple[Difference, ...]
    loss_difference: float
    loss_scale: float
    loss_tolerance: float
    criterion: str

    @property
    def ok(self) -> bool:
        """Is all within what is allowed? A loss that is not finite must be so on both sides, which makes no difference."""
        return self.loss_difference <= self.loss_tolerance * self.loss_scale and all(d.ok for d in self.differences)


def compare_fixed(found: Outcome, untouched: Outcome, loss_tolerance: float, tolerance: float) -> Comparison:
    """With fixed tolerances: relative ones, that of the loss of at least 1."""
    floor = FLOOR * max((_largest(g) for g in untouched.gradients.values() if g is not None), default=0.0)
    differences = [
        _fixed(name, "gradient", found.gradients.get(name), expected, floor, tolerance)
        for name, expected in untouched.gradients.items()
    ]
    differences += [
        _fixed(name, "buffer", found.buffers.get(name), expected, 0.0, tolerance)
        for name, expected in untouched.buffers.items()
    ]
    loss, expected_loss = found.loss.item(), untouched.loss.item()
    off = 0.0 if _same_number(loss, expected_loss) else abs(loss - expected_loss)
    criterion = f"tolerance {tolerance:.0e} relative to the untouched model's largest element, {loss_tolerance:.0e} for the loss"
    return Comparison(tuple(differences), off, max(1.0, abs(expected_loss)), loss_tolerance, criterion)


def allow_rounding(comparison: Comparison, untouched: Outcome, exact: Outcome) -> Comparison:
    """The same with what failed measured against the untouched model's own rounding; see the module's docstring."""
    largest = max((_largest(g) for g in untouched.gradients.values() if g is not None), default=0.0)
    own: dict[str, float] = {}  # absolute
    for name, plain in untouched.gradients.items():
        expected = exact.gradients.get(name)
        if plain is not None and expected is not None:
            own[name] = _largest(plain.double() - expected.double())
    scales = {name: max(_largest(untouched.gradients[name]), FLOOR * largest) for name in own}  # type: ignore[arg-type]
    typical = statistics.median([own[name] / scales[name] for name in own if scales[name]] or [0.0])

    def again(difference: Difference) -> Difference:
        name = difference.name
        if difference.ok or difference.kind != "gradient" or not own.get(name):
            return difference
        rounding = max(own[name] / scales[name], typical)
        if rounding > max(MOST_ROUNDING * largest / scales[name], 100 * difference.allowed):
            return difference
        allowed = max(difference.allowed, ROUNDING_FACTOR * rounding)
        return replace(difference, allowed=allowed, untouched=own[name] / scales[name])

    loss_rounding = max(abs(untouched.loss.item() - exact.loss.item()) / comparison.loss_scale, typical)
    loss_tolerance = comparison.loss_tolerance
    if loss_rounding <= 100 * loss_tolerance:
        loss_tolerance = max(loss_tolerance, ROUNDING_FACTOR * loss_rounding)
    return replace(comparison, differences=tuple(map(again, comparison.differences)), loss_tolerance=loss_tolerance)


def compare_low_precision(found: Outcome, untouched: Outcome, exact: Outcome, eps: float) -> Comparison:
    """With what rounding does to the untouched model as the yardstick; see the module's docstring."""
    sizes = [g.double().square().mean().sqrt().item() for g in exact.gradients.values() if g is not None and g.numel()]
    floor = FLOOR * max((size for size in sizes if size == size), default=0.0)
    errors = {
        name: _error(untouched.gradients.get(name), expected, floor)[1] for name, expected in exact.gradients.items()
    }
    typical = statistics.median(list(errors.values()) or [0.0])
    least = max(typical, eps) if typical < float("inf") else eps
    differences = []
    for kind, name, given, plain, expected in (
        *(("gradient", n, found.gradients.get(n), untouched.gradients.get(n), e) for n, e in exact.gradients.items()),
        *(("buffer", n, found.buffers.get(n), untouched.buffers.get(n), e) for n, e in exact.buffers.items()),
    ):
        if plain is not None and not (plain.is_floating_point() and torch.isfinite(plain).all()):
            differences.append(_fixed(name, kind, given, plain, 0.0, 0.0))  # counters, and what overflowed: the same
            continue
        own = _error(plain, expected, floor if kind == "gradient" else 0.0)[1]
        absolute, error = _error(given, expected, floor if kind == "gradient" else 0.0)
        allowed = min(LOW_PRECISION_FACTOR * max(own, least), LARGEST_ALLOWED)
        differences.append(Difference(name, kind, absolute, error, allowed, own))
    loss, plain_loss, exact_loss = found.loss.item(), untouched.loss.item(), exact.loss.item()
    scale = abs(exact_loss) or 1.0
    loss_tolerance = LOW_PRECISION_FACTOR * max(abs(plain_loss - exact_loss) / scale, eps)
    off = 0.0 if _same_number(loss, plain_loss) else abs(loss - exact_loss)
    criterion = (
        f"error against the untouched model in float64 (L2 norm): allowed is {LOW_PRECISION_FACTOR:g} x the untouched "
        f"model's own, or its median over the gradients ({typical:.2g}), or the dtype's spacing ({eps:.2g}), "
        f"whichever is largest, and never over {LARGEST_ALLOWED:g}"
    )
    return Comparison(tuple(differences), off, scale, loss_tolerance, criterion)


def _same_number(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _missing(name: str, kind: str, found: Tensor | None, expected: Tensor | None, allowed: float) -> Difference:
    """One side has no such tensor: the same as a zero, and as different as can be from anything else."""
    there = found if found is not None else expected
    size = _largest(there) if there is not None else 0.0
    return Difference(name, kind, size, 0.0 if size == 0.0 else 1.0, allowed)


def _fixed(
    name: str, kind: str, found: Tensor | None, expected: Tensor | None, floor: float, tolerance: float
) -> Difference:
    if found is None or expected is None:
        return _missing(name, kind, found, expected, tolerance)
    if expected.numel() == 0:
        return Difference(name, kind, 0.0, 0.0, tolerance)
    found, expected = found.double(), expected.double()
    if not torch.isfinite(expected).all():
        off = 0.0 if torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected)) else float("inf")
        return Difference(name, kind, off, off, tolerance)
    absolute = _largest((found - expected).nan_to_num(nan=float("inf")))
    scale = max(_largest(expected), floor)
    relative = absolute / scale if scale else (0.0 if absolute == 0.0 else float("inf"))
    return Difference(name, kind, absolute, relative, tolerance)


def _error(found: Tensor | None, exact: Tensor | None, floor: float) -> tuple[float, float]:
    """(largest absolute difference, relative error in the L2 norm), with at least `floor` an element in the divisor."""
    if exact is None or found is None:
        there = found if found is not None else exact
        size = _largest(there) if there is not None else 0.0
        return size, 0.0 if size == 0.0 else 1.0
    if exact.numel() == 0:
        return 0.0, 0.0
    off = (found.double() - exact.double()).nan_to_num(nan=float("inf"))
    scale = max(exact.double().square().mean().sqrt().item(), floor)
    error = off.square().mean().sqrt().item()
    return _largest(off), error / scale if scale else (0.0 if error == 0.0 else float("inf"))

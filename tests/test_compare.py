"""What may differ by how much, on made-up outcomes: rounding passes, in its place and size, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.compare import LARGEST_ALLOWED, Outcome, compare_fixed, compare_low_precision

EPS = torch.finfo(torch.bfloat16).eps
SIZES = {"large": (64, 32), "small": (3,), "other": (128,), "noise": (32,)}


def exact() -> dict[str, Tensor]:
    torch.manual_seed(0)
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SIZES.items()}
    return values | {"noise": 1e-9 * values["noise"]}  # zero but for rounding, as a key projection's bias has it


def rounded(size: float, seed: int) -> dict[str, Tensor]:
    """The exact gradients with errors of this size in proportion, and of a little less than the floor where all is noise."""
    generator = torch.Generator().manual_seed(seed)
    errors = {
        name: size * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in exact().items()
    }
    errors["noise"] *= 1e-3
    return {name: value + errors[name] * (1.0 if name == "noise" else value.abs()) for name, value in exact().items()}


def compared(found: dict[str, Tensor], untouched: dict[str, Tensor], loss: float = 2.0) -> dict[str, bool]:
    scalars = (torch.tensor(loss), torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64))
    outcomes = [Outcome(s, g) for s, g in zip(scalars, (found, untouched, exact()), strict=True)]
    comparison = compare_low_precision(*outcomes, EPS)
    verdicts = {difference.name: difference.ok for difference in comparison.differences}
    assert comparison.ok == (all(verdicts.values()) and comparison.loss_difference <= comparison.loss_tolerance * 2.0)
    return verdicts | {"loss": comparison.loss_difference <= comparison.loss_tolerance * 2.0}


@pytest.mark.parametrize("size", [1e-3, 1e-2, 5e-2])
def test_the_rounding_of_another_order_passes(size: float) -> None:
    assert all(compared(rounded(size, 1), rounded(size, 2)).values())


@pytest.mark.parametrize("size", [1e-3, 1e-2, 5e-2])
def test_ten_times_the_untouched_rounding_does_not(size: float) -> None:
    verdicts = compared(rounded(10 * max(size, EPS), 1), rounded(size, 2))
    assert not any(verdicts[name] for name in ("large", "small", "other", "noise"))


def test_a_small_tensor_that_happens_to_be_exact_is_no_measure_for_itself() -> None:
    lucky = rounded(2e-2, 2) | {"small": exact()["small"]}
    assert all(compared(rounded(2e-2, 1), lucky).values())


@pytest.mark.parametrize("own", [1e-3, 5e-2, 0.3])
def test_what_is_missing_or_doubled_never_passes(own: float) -> None:
    for wrong in (torch.zeros(3, dtype=torch.float64), 0.4 * exact()["small"], 2 * exact()["small"], None):
        found = rounded(1e-3, 1) | {"small": wrong}
        if wrong is None:
            del found["small"]
        verdicts = compared(found, rounded(own, 2))
        assert not verdicts["small"] and sum(not ok for ok in verdicts.values()) == 1


def test_nothing_is_allowed_half_of_its_size() -> None:
    outcomes = [Outcome(torch.tensor(1.0), g) for g in (rounded(1.0, 1), rounded(1.0, 2), exact())]
    assert max(d.allowed for d in compare_low_precision(*outcomes, EPS).differences) == LARGEST_ALLOWED


def test_the_loss_may_be_off_by_a_few_roundings() -> None:
    assert compared(rounded(1e-2, 1), rounded(1e-2, 2), loss=2.0 * (1 + 2 * EPS))["loss"]
    assert not compared(rounded(1e-2, 1), rounded(1e-2, 2), loss=2.0 * (1 + 6 * EPS))["loss"]


def test_what_is_not_a_number_differs_unless_the_untouched_model_gives_the_same() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    for found, untouched, ok in ((nan, nan, True), (nan, torch.ones(2), False), (torch.ones(2), nan, False)):
        sides = [Outcome(torch.tensor(1.0), {"w": side}) for side in (found, untouched)]
        assert compare_fixed(*sides, 1e-6, 1e-5).ok is ok
        assert compare_low_precision(*sides, Outcome(torch.tensor(1.0), {"w": torch.ones(2)}), EPS).ok is ok


def test_counters_must_be_the_same_in_any_precision() -> None:
    sides = [Outcome(torch.tensor(1.0), {}, {"steps": torch.tensor(count)}) for count in (101, 100, 100)]
    assert not compare_low_precision(*sides, EPS).ok and not compare_fixed(*sides[:2], 1e-6, 1e-2 / 2).ok

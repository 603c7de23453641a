"""Precisions with replicas: every ZeRO stage trains as stage 0 does, stage 0 as one device does, a resumed job as one without interruption.

Two replicas add two numbers, in whatever order, so sharing out state changes no bit. Against one device the yardstick is how far that
departs from float32 training itself (in the same precision): what is split rounds other sums, and departs at most 1.5 times as far.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import accumulate, differing, model_loss, train, wide
from torch import Tensor, nn

import autopar
from autopar.runtime.scaling import GROWTH_STEPS
from costmodel.errors import BadArgument

STEPS, ROWS = 6, 8
TOO_LARGE = 2.0**20
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2, "microbatches": 2},
    "tp": {"dp": 2, "tp": 2, "microbatches": 2},
    "pp": {"dp": 2, "pp": 2, "microbatches": 2},
    "zb-h1": {"dp": 2, "pp": 2, "microbatches": 3, "schedule": "zb-h1"},
}
PRECISIONS = ("bf16-mixed", "bf16", "fp16-mixed")


def built() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=2, dim=16, heads=4)


BATCHES = [gpt_batch(rows=ROWS, seed=seed % 3) for seed in range(STEPS)]


@cache
def trained(precision: str, layout: str, zero: int) -> tuple[list[float], dict[str, Tensor], list[float | None]]:
    """(losses, parameters, loss scales). fp16's scale is too large at first."""
    par = autopar.parallelize(built(), BATCHES[0], precision=precision, zero=zero, **LAYOUTS[layout])
    if precision == "fp16-mixed":
        par.load_loss_scale_state_dict({"scale": TOO_LARGE, "growth_tracker": 7})
    optimizer = torch.optim.AdamW(par.parameters(), lr=3e-3)
    losses, scales = [], []
    for batch in BATCHES:
        losses.append(par.step(**batch).item())
        scales.append(par.loss_scale)
        par.clip_grad_norm_(10.0)
        optimizer.step()
        optimizer.zero_grad()
    found = losses, par.full_state_dict(), scales
    par.close()
    return found


CASES = [(precision, layout, zero) for precision in PRECISIONS for layout in LAYOUTS for zero in (1, 2, 3)]
QUICK = [("bf16-mixed", "tp"), ("bf16-mixed", "zb-h1"), ("dp", 1), ("dp", 3)]


@pytest.mark.parametrize(
    ("precision", "layout", "zero"), wide(CASES, lambda *case: case[:2] in QUICK or case[1:] in QUICK)
)
def test_sharing_out_state_changes_no_bit(precision: str, layout: str, zero: int) -> None:
    losses, parameters, scales = trained(precision, layout, zero)
    expected_losses, expected, expected_scales = trained(precision, layout, 0)
    assert losses == expected_losses and scales == expected_scales
    assert differing(parameters, expected) == []
    assert precision != "fp16-mixed" or (scales[0] == TOO_LARGE / 2 and scales[-1] == scales[-2]), "the first steps overflow, not the last"
    assert differing(parameters, built().state_dict()) != []


@cache
def alone(precision: str) -> tuple[list[float], list[float]]:
    """Losses of one device, in a precision and in float32."""
    exact, model = built(), built()
    state = torch.bfloat16 if precision == "bf16" else torch.float32

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model_loss(model, batch)

    model.to(state)
    expected = train(lambda batch: accumulate(exact, batch, 2), exact.parameters(), BATCHES)
    found = train(lambda batch: accumulate(model, batch, 2, loss), model.parameters(), BATCHES)
    return [each.item() for each in found], [each.item() for each in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_replicas_depart_no_further_from_float32_than_one_device_does(precision: str, layout: str) -> None:
    one, exact = alone(precision)
    losses = trained(precision, layout, 0)[0]
    departs = max(abs(a - b) for a, b in zip(one, exact, strict=True))
    assert 1e-4 < departs < 0.1
    assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) <= 1.5 * departs


# ---- resuming -------------------------------------------------------------------------------------------------------

RESUMED: list[dict[str, Any]] = [{"dp": 2, "zero": zero} for zero in range(4)] + [{"tp": 2}, {"pp": 2, "microbatches": 2}]
BEFORE = 3


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_a_resumed_job_is_the_job_that_was_not_interrupted(layout: dict[str, Any]) -> None:
    """To the bit: parameters, losses, and a scale that halves before the interruption and doubles after it."""
    start = {"scale": 2.0**18, "growth_tracker": 0, "skipped": 0}

    def made() -> tuple[autopar.ParallelModel, torch.optim.Optimizer]:
        par = autopar.parallelize(built(), BATCHES[0], precision="fp16-mixed", **layout)
        return par, torch.optim.AdamW(par.parameters(), lr=3e-3)

    def steps(par: autopar.ParallelModel, optimizer: torch.optim.Optimizer, batches: list[Any]) -> list[tuple[float, float | None]]:
        found = []
        for batch in batches:
            found.append((par.step(**batch).item(), par.loss_scale))
            optimizer.step()
            optimizer.zero_grad()
        return found

    whole, optimizer = made()
    whole.load_loss_scale_state_dict(start)
    expected = steps(whole, optimizer, BATCHES[:BEFORE])
    scale = {**whole.loss_scale_state_dict(), "growth_tracker": GROWTH_STEPS - 2}
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), scale))
    whole.load_loss_scale_state_dict(scale)
    expected = steps(whole, optimizer, BATCHES[BEFORE:])
    assert saved[2]["scale"] < start["scale"] and saved[2]["skipped"] > 0
    assert max(value for _, value in expected if value is not None) == 2 * saved[2]["scale"]

    resumed, optimizer = made()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_loss_scale_state_dict(saved[2])
    assert steps(resumed, optimizer, BATCHES[BEFORE:]) == expected
    assert differing(resumed.full_state_dict(), whole.full_state_dict()) == []
    assert resumed.loss_scale_state_dict() == whole.loss_scale_state_dict()
    whole.close()
    resumed.close()


def test_the_state_of_a_scale_is_checked_and_a_grad_scalers_is_taken() -> None:
    par = autopar.parallelize(built(), BATCHES[0], precision="fp16-mixed")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    par.load_loss_scale_state_dict(scaler.state_dict())
    assert par.loss_scale == 1024.0
    kept = par.loss_scale_state_dict()
    for wrong in ({}, {"scale": 0.0}, {"scale": float("nan")}, {"scale": "2"}, {"growth_tracker": -1}, {"growth_tracker": GROWTH_STEPS}):
        with pytest.raises(BadArgument, match="loss scale's state"):
            par.load_loss_scale_state_dict({**kept, **wrong} if wrong else {})
        assert par.loss_scale_state_dict() == kept
    par.close()
    other = autopar.parallelize(built(), BATCHES[0])
    assert other.loss_scale_state_dict() == {}
    other.load_loss_scale_state_dict({})
    with pytest.raises(BadArgument, match="no loss scale"):
        other.load_loss_scale_state_dict(kept)
    other.close()

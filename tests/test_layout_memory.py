"""The memory of a layout beside that of the plan it becomes, and beside what a step of that plan allocates."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from test_memory import measured_peaks

import autopar
from autopar.parallelize import ParallelModel
from autopar.planner import make_plan
from autopar.precision import PRECISIONS
from autopar.predict import evaluator
from autopar.trace import Traced, trace
from costmodel.hardware import HARDWARE
from passes.layout import Layout
from passes.layout_evaluator import Evaluator

ROWS = 4
CPU = HARDWARE["cpu"]
LAYOUTS: list[dict[str, Any]] = [
    {}, {"recompute": "full"}, {"tp": 2, "recompute": "selective"}, {"microbatches": 1}, {"pp": 2, "recompute": "full"}, {"tp": 2, "pp": 2},
    {"dp": 2, "zero": 0, "microbatches": 1}, {"dp": 2, "zero": 1, "microbatches": 2}, {"dp": 2, "pp": 2, "zero": 3},
]  # fmt: skip
MORE: list[dict[str, Any]] = [
    *({"tp": tp, "recompute": kind} for tp in (1, 2) for kind in ("none", "full", "selective")),
    *({"pp": 2, "recompute": kind} for kind in ("none", "selective")), {"pp": 2, "schedule": "gpipe"}, {"tp": 2, "microbatches": 1},
    *({"dp": 2, "zero": zero, "microbatches": count} for zero in range(4) for count in (1, 2)),
    *({"dp": 2, "pp": 2, "zero": zero} for zero in (0, 1, 3)), {"dp": 2, "tp": 2, "zero": 3, "recompute": "full"},
]  # fmt: skip


@cache
def job(tokens: int, precision: str) -> tuple[Traced, Evaluator]:
    """A GPT whose parameters outweigh its activations (16 tokens), or the other way round (128)."""
    torch.manual_seed(0)
    model = GPT(vocab=256, dim=128, heads=4, layers=6, context=128, flash=False)
    case = trace(model, (), gpt_batch(rows=ROWS, tokens=tokens, vocab=256), precision=PRECISIONS[precision])
    return case, evaluator(case, None, CPU)


def both(given: dict[str, Any], tokens: int, precision: str) -> tuple[float, float]:
    """(the layout's peak bytes, the plan's)."""
    case, found = job(tokens, precision)
    options = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "schedule": "1f1b", "recompute": "none", "microbatches": 4, **given}
    count = options.pop("microbatches")
    layout = found.predict(Layout(**options, microbatches=count, microbatch_rows=ROWS // count, precision=precision))
    mesh = {name: options.pop(name) for name in ("pp", "dp", "tp")}
    plan = make_plan(case, mesh=mesh, microbatches=count, hardware=CPU, model_name="gpt", **options)
    return layout.memory.allocated_bytes, plan.predicted.peak_bytes


@pytest.mark.parametrize("tokens", [16, 128])
@pytest.mark.parametrize("given", LAYOUTS, ids=str)
def test_layouts_hold_what_their_plans_hold(given: dict[str, Any], tokens: int) -> None:
    predicted, planned = both(given, tokens, "fp32")
    assert predicted == pytest.approx(planned, rel=0.05)


@pytest.mark.wide
@pytest.mark.parametrize("tokens", [16, 128])
@pytest.mark.parametrize("given", MORE, ids=str)
def test_other_layouts_too(given: dict[str, Any], tokens: int) -> None:
    predicted, planned = both(given, tokens, "fp32")
    assert predicted == pytest.approx(planned, rel=0.06)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("given", [{}, {"tp": 2, "recompute": "full"}, {"dp": 2, "zero": 2}], ids=str)
def test_in_16_bits_too(given: dict[str, Any], precision: str) -> None:
    predicted, planned = both(given, 128, precision)
    assert predicted == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("given", [{"pp": 2}, {"pp": 2, "schedule": "gpipe"}, {"recompute": "selective"}], ids=str)
def test_casts_that_are_held_for_a_step_too(given: dict[str, Any]) -> None:
    predicted, planned = both(given, 16, "bf16-mixed")
    assert predicted == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize(("given", "precision"), [({"dp": 2, "zero": 2}, "fp32"), ({"pp": 2, "recompute": "full"}, "bf16")], ids=str)
def test_a_step_allocates_it(given: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, planned = both(given, 128, precision)
    torch.manual_seed(0)
    model = GPT(vocab=256, dim=128, heads=4, layers=6, context=128, flash=False)
    replica = gpt_batch(rows=ROWS, tokens=128, vocab=256)
    par: ParallelModel = autopar.parallelize(model, replica, microbatches=4, precision=precision, **given)
    batch = gpt_batch(rows=ROWS * given.get("dp", 1), tokens=128, vocab=256)
    measured = max(measured_peaks(par, batch, monkeypatch).values())
    assert planned == pytest.approx(measured, rel=0.02)
    assert predicted == pytest.approx(measured, rel=0.05)

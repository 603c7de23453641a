"""What one replica alone gets wrong is an error, or the documented behaviour, on all ranks alike, and the next step works: never a hang."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_accumulation import Steep
from test_data_parallel import Layerwise, own_rows
from torch import Tensor

import autopar
from costmodel.errors import AutoparError, BadArgument, NonFinite, RankFailed

Batch = dict[str, Tensor]


def fine() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(8, 16, generator=generator) for name in ("x", "y")}


def said(call: Callable[[], Any]) -> str:
    """The error of a call, or its result."""
    try:
        found = call()
    except AutoparError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return str(found.item() if isinstance(found, Tensor) else found)


BAD: dict[str, Callable[[Batch], Batch]] = {
    "no rows": lambda batch: {name: value[:0] for name, value in batch.items()},
    "another width": lambda batch: {name: value[:, :8] for name, value in batch.items()},
    "another dtype": lambda batch: {name: value.double() for name, value in batch.items()},
    "an argument too few": lambda batch: {"x": batch["x"]},
    "no values": lambda batch: {name: value.to("meta") for name, value in batch.items()},
    "no tensors": lambda batch: {name: value.tolist() for name, value in batch.items()},
}


ALONE = ("accumulates alone", "evaluates alone")


def job(layouts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One rank: what is said of each case, by layout."""
    report: list[dict[str, str]] = []
    torch.manual_seed(0)
    model, batch = Steep(), fine()
    for layout in layouts:
        found = {"ranks": said(lambda: autopar.parallelize(model, batch, dp=3))}
        par = autopar.parallelize(model, own_rows(batch, 0, 2), **layout)
        replica = par.plan.coords(int(os.environ["RANK"]))["dp"]
        rows = own_rows(batch, replica, 2)
        spoilt = {"x": rows["x"], "y": rows["y"] + (float("inf") if replica else 0.0)}
        first = found["a step"] = said(lambda: par.step(**rows))  # noqa: B023
        par.zero_grad()
        for name, change in BAD.items():
            found[name] = said(lambda: par.step(**(change(rows) if replica else rows)))  # noqa: B023
        found["accumulates alone"] = said(lambda: par.step(**rows, accumulate=bool(replica)))  # noqa: B023
        found["evaluates alone"] = said(lambda: par.train(not replica).step(**rows))  # noqa: B023
        par.train().step(**rows)
        norm = said(lambda: par.clip_grad_norm_(1e9))  # noqa: B023
        par.zero_grad()
        found["inf in one batch"] = said(lambda: par.step(**spoilt))  # noqa: B023
        found["norm"] = said(lambda: par.clip_grad_norm_(1.0, error_if_nonfinite=True))  # noqa: B023
        found["no norm"] = said(lambda: par.clip_grad_norm_(1.0))  # noqa: B023
        par.zero_grad()
        found["the same again"] = str(said(lambda: par.step(**rows)) == first and said(lambda: par.clip_grad_norm_(1e9)) == norm)  # noqa: B023
        found["layerwise"] = said(Layerwise(par.parameters()).step)
        par.close()
        par = autopar.parallelize(model, own_rows(batch, 0, 2), precision="fp16-mixed", **layout)
        steep = {"x": rows["x"], "y": rows["y"] + 3e4 * replica}
        par.step(**steep)
        found["overflow"] = f"{par.loss_scale} {all(parameter.grad is None for parameter in par.parameters())}"
        par.step(**rows)
        found["after it"] = f"{par.loss_scale} {all(parameter.grad is not None for parameter in par.parameters())}"
        par.close()
        report.append(found)
    return report


@pytest.mark.parametrize("zeros", [(0, 3), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
def test_what_one_replica_gets_wrong_is_told_to_all_ranks(zeros: tuple[int, ...]) -> None:
    layouts = [{"dp": 2, "pp": 2, "microbatches": 2, "zero": zero} for zero in zeros]
    ranks = autopar.launch(job, 4, layouts, timeout_seconds=240)
    for index, layout in enumerate(layouts):
        first = ranks[0][index]
        for found in ranks:
            for name in first:
                known = found[index][name].partition(":")[0] == first[name].partition(":")[0] == "BadArgument"
                assert found[index][name] == first[name] or (known and name in BAD), (layout, name)
            assert all(found[index][name].startswith("BadArgument") for name in (*BAD, *ALONE)), found[index]
        assert first["ranks"] == "WorldSizeMismatch: 4 ranks were launched, but pp=1 x dp=3 x tp=1 needs 3."
        assert first["inf in one batch"] == "inf" and first["norm"].startswith(NonFinite.__name__), first
        assert first["no norm"] in ("inf", "nan"), first
        assert first["layerwise"].startswith("BadArgument: Layerwise cannot") == (layout["zero"] > 0), first
        assert first["the same again"] == "True"
        assert first["overflow"] == f"{2.0**15} True" and first["after it"] == f"{2.0**15} True"


@pytest.mark.parametrize("layout", [{}, {"pp": 2, "microbatches": 2}], ids=str)
@pytest.mark.parametrize("zero", range(4))
def test_a_gradient_that_is_not_finite_on_one_replica_is_seen_by_all(zero: int, layout: dict[str, int]) -> None:
    torch.manual_seed(0)
    batch = fine()
    par = autopar.parallelize(Steep(), batch, dp=2, zero=zero, **layout)
    loss = par.step(**batch)
    par.zero_grad()
    spoilt = {"x": batch["x"], "y": batch["y"].clone()}
    spoilt["y"][7, 3] = float("nan")
    assert par.step(**spoilt).isnan()
    with pytest.raises(NonFinite):
        par.clip_grad_norm_(1.0, error_if_nonfinite=True)
    par.zero_grad()
    assert torch.equal(par.step(**batch), loss)
    par.close()


def leaves(layout: dict[str, Any]) -> str:
    """The second replica's ranks end before the second step."""
    batch = fine()
    par = autopar.parallelize(Steep(), own_rows(batch, 0, 2), **layout)
    par.step(**own_rows(batch, 0, 2), accumulate=True)
    if par.plan.coords(int(os.environ["RANK"]))["dp"]:
        return "ended"
    with pytest.raises(RankFailed) as caught:
        par.step(**own_rows(batch, 0, 2))
    return str(caught.value)


@pytest.mark.parametrize("zero", [1, 3])
def test_replicas_that_have_ended_are_an_error_on_the_others(zero: int) -> None:
    found = autopar.launch(leaves, 4, {"dp": 2, "pp": 2, "microbatches": 2, "zero": zero}, timeout_seconds=60)
    assert found.count("ended") == 2 and sum("rank" in text for text in found) == 2


def test_more_replicas_than_rows_are_refused_before_a_step() -> None:
    par = autopar.parallelize(Steep(), fine(), dp=3, zero=3)
    with pytest.raises(BadArgument, match="2 rows to split over dp = 3"):
        par.step(**{name: value[:2] for name, value in fine().items()})
    par.step(**fine())
    par.close()

"""Several steps for one update (`accumulate=True`): equal to one device that calls backward for each batch, with one sum over replicas.

Tolerances as of test_data_parallel: losses within 1e-5, parameters within 2e-4 after six AdamW updates of three steps each."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import model_loss, wide
from test_data_parallel import EPS, LOSS_TOLERANCE, PARAMETER_TOLERANCE, Batch, Mixed, own_rows
from torch import Tensor, nn

import autopar
from costmodel.errors import BadArgument

STEPS, UPDATES, TOKENS = 3, 6, 8
MODELS = {"gpt": lambda: GPT(layers=4, dim=16, heads=4), "mixed": Mixed}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


@cache
def batches_of(name: str) -> list[Batch]:
    """Rows and labels that are ignored differ from step to step and from replica to replica; one replica may have none that count."""
    found = []
    for seed in range(STEPS * UPDATES):
        rows = (7, 5, 6)[seed % STEPS]
        batch = gpt_batch(rows=rows, tokens=TOKENS, seed=seed % 5, vocab=17 if name == "mixed" else 64)
        for row in range(rows):
            batch["targets"][row, : (row + 3 * seed) % TOKENS] = -100
        if seed % STEPS == 1:
            batch["targets"][: (rows + 1) // 2] = -100  # all of the first of two replicas
        found.append(batch)
    return found


def trained(step: Any, parameters: Any, batches: list[Batch], max_norm: float | None = None, clip: Any = None) -> list[float]:
    """The losses; an update after each three steps, clipped by `clip` if given."""
    optimizer = torch.optim.AdamW(list(parameters), lr=3e-3, eps=EPS)
    losses = []
    for index, batch in enumerate(batches):
        last = index % STEPS == STEPS - 1
        losses.append(step(batch, not last).item())
        if last:
            if clip is not None:
                clip(max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@cache
def alone(name: str, max_norm: float | None) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, parameters) of the untouched model."""
    model = built(name)

    def step(batch: Batch, _: bool) -> Tensor:
        loss = model_loss(model, batch)
        loss.backward()
        return loss.detach()

    clip = (lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm)) if max_norm is not None else None
    losses = trained(step, model.parameters(), batches_of(name), max_norm, clip)
    return losses, model.state_dict()


def worst(losses: list[float], parameters: dict[str, Tensor], name: str, max_norm: float | None) -> tuple[float, float]:
    """(of the losses, of the parameters), the largest differences."""
    expected_losses, expected = alone(name, max_norm)
    assert list(parameters) == list(expected)
    return (
        max(abs(found - wanted) for found, wanted in zip(losses, expected_losses, strict=True)),
        max((parameters[key] - expected[key]).abs().max().item() for key in expected),
    )


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    (name, {"dp": dp, "zero": zero, **layout})
    for name in MODELS
    for dp, layout in (
        (2, {}), (3, {}), (2, {"tp": 2}), (2, {"pp": 2, "microbatches": 2}),
        (2, {"pp": 2, "microbatches": 2, "schedule": "zb-h1"}), (2, {"pp": 2, "tp": 2, "microbatches": 2}),
    )
    for zero in range(4)
]  # fmt: skip


def _quick(name: str, layout: dict[str, Any]) -> bool:
    ranks = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    return name == "mixed" and ranks < 8 and (layout["zero"] == 1 or "tp" not in layout)


@pytest.mark.parametrize(("name", "layout"), wide(LAYOUTS, _quick), ids=str)
def test_accumulated_steps_train_as_one_device_does(name: str, layout: dict[str, Any]) -> None:
    batches, max_norm = batches_of(name), 0.5
    par = autopar.parallelize(built(name), batches[0], **layout)
    counted = []

    def step(batch: Batch, accumulate: bool) -> Tensor:
        loss = par.step(**batch, accumulate=accumulate)
        counted.append(par.reductions())
        return loss

    losses = trained(step, par.parameters(), batches, max_norm, par.clip_grad_norm_)
    of_losses, of_parameters = worst(losses, par.full_state_dict(), name, max_norm)
    names = {each.rpartition(": ")[2] for each, p in par.named_parameters() if p.requires_grad}
    par.close()
    assert of_losses <= LOSS_TOLERANCE
    assert of_parameters <= PARAMETER_TOLERANCE
    once = dict.fromkeys(names, 1)
    assert counted == [once if layout["zero"] > 1 or index % STEPS == STEPS - 1 else {} for index in range(len(counted))]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_sums_of_earlier_steps_count_once_beside_parts(zero: int) -> None:
    """step, then accumulate and step without an update in between; then an update that is given up half way."""
    model, batches = built("mixed"), batches_of("mixed")
    reference = copy.deepcopy(model)
    par = autopar.parallelize(model, batches[0], dp=3, pp=2, microbatches=1, zero=zero)
    held = par._ranks()

    def compare() -> None:
        for name, parameter in reference.named_parameters():
            found = held.whole(name, "grad") if parameter.grad is not None else None  # type: ignore[attr-defined]
            assert (found is None) == (parameter.grad is None)
            if found is not None:
                torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)

    for index, batch in enumerate(batches[:5]):
        par.step(**batch, accumulate=index in (1, 2, 3))
        model_loss(reference, batch).backward()
    compare()
    for set_to_none in (True, False):
        par.zero_grad()
        reference.zero_grad()
        par.step(**batches[0], accumulate=True)
        par.zero_grad(set_to_none)
        par.step(**batches[1], accumulate=True)
        par.step(**batches[2])
        for batch in batches[1:3]:
            model_loss(reference, batch).backward()
        compare()
    par.close()


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_that_are_not_summed_reach_no_optimizer(zero: int) -> None:
    batches = batches_of("mixed")
    par = autopar.parallelize(built("mixed"), batches[0], dp=2, zero=zero)
    optimizer = torch.optim.SGD(par.parameters(), lr=0.1)
    par.step(**batches[0], accumulate=True)
    before = par.full_state_dict()
    with pytest.raises(BadArgument, match=r"SGD.step\(\).*not been summed"):
        optimizer.step()
    with pytest.raises(BadArgument, match=r"clip_grad_norm_.*not been summed"):
        par.clip_grad_norm_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in par.full_state_dict().items())
    par.zero_grad()
    optimizer.step()
    par.step(**batches[1])
    par.clip_grad_norm_(1.0)
    optimizer.step()
    par.close()


class Steep(nn.Module):
    """Overflows in fp16 with a large input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.second(torch.tanh(self.first(x))) - y) ** 2).mean()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2])
def test_an_overflow_of_one_replica_in_one_accumulated_step_skips_the_update(zero: int, pp: int) -> None:
    torch.manual_seed(0)
    fine = {"x": torch.randn(8, 16), "y": torch.randn(8, 16)}
    steep = {"x": fine["x"], "y": torch.cat([fine["y"][:4], torch.full((4, 16), 3e4)])}  # rows of the second replica
    par = autopar.parallelize(Steep(), fine, dp=2, pp=pp, microbatches=2, zero=zero, precision="fp16-mixed")
    optimizer = torch.optim.SGD(par.parameters(), lr=1e-3)
    scale = par.loss_scale
    assert scale is not None
    for bad in range(3):
        before = par.full_state_dict()
        for index in range(3):
            par.step(**(steep if index == bad else fine), accumulate=index < 2)
            assert (par.loss_scale == scale) == (index < 2), "one update has one scale"
        assert all(parameter.grad is None for parameter in par.parameters())
        optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in par.full_state_dict().items())
        scale = par.loss_scale
    for index in range(3):
        par.step(**fine, accumulate=index < 2)
    assert par.loss_scale == scale and all(p.grad is not None and p.grad.isfinite().all() for p in par.parameters())
    optimizer.step()
    assert not torch.equal(par.full_state_dict()["first.weight"], before["first.weight"])
    par.close()


def job(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """One rank: per case (losses, whole parameters on rank 0, what an early optimizer says)."""
    import os

    rank, report = int(os.environ["RANK"]), []
    for name, layout in cases:
        batches = batches_of(name)
        par = autopar.parallelize(built(name), own_rows(batches[0], 0, 2), **layout)
        replica = par.plan.coords(rank)["dp"]

        def step(batch: Batch, accumulate: bool) -> Tensor:
            return par.step(**own_rows(batch, replica, 2), accumulate=accumulate)  # noqa: B023

        losses = trained(step, par.parameters(), batches, 0.5, par.clip_grad_norm_)
        whole, said = par.full_state_dict(), ""
        step(batches[0], True)
        try:
            torch.optim.SGD(par.parameters()).step()
        except BadArgument as error:
            said = str(error)
        report.append((losses, whole, said))
        par.close()
    return report


def test_processes_accumulate_as_one_device_does() -> None:
    cases = [
        ("mixed", {"dp": 2, "pp": 2, "microbatches": 2, "zero": 0}), ("mixed", {"dp": 2, "pp": 2, "microbatches": 2, "zero": 1}),
        ("mixed", {"dp": 2, "tp": 2, "zero": 3}),
    ]  # fmt: skip
    ranks = autopar.launch(job, 4, cases, timeout_seconds=240)
    for index, (name, layout) in enumerate(cases):
        losses, parameters, _ = ranks[0][index]
        of_losses, of_parameters = worst(losses, parameters, name, 0.5)
        assert of_losses <= LOSS_TOLERANCE
        assert of_parameters <= PARAMETER_TOLERANCE
        assert all(found[index][0] == losses for found in ranks)
        assert all(("not been summed" in found[index][2]) == (layout["zero"] < 2) for found in ranks)

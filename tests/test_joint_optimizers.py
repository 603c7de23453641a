"""Optimizers that look at all parameters together: a closure that runs steps, inner products over the whole model.

In a plain process each piece of the model is handed out once, whatever number of ranks holds it, so they train as on one device. In a job
a rank's optimizer sees what the rank has: the whole model without tp, pp and zero; else it is warned about, or refused.
Tolerance: 1e-9 of float64 parameters up to 1 after 4 updates (LBFGS; the largest difference seen is 2e-13).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import model_loss
from test_data_parallel import own_rows
from torch import Tensor, nn

import autopar
from costmodel.errors import BadArgument

TOLERANCE, UPDATES = 1e-9, 4


class Unit(torch.optim.Optimizer):
    """Steps of length `lr` along the gradient of all parameters, the norm of which it takes itself."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            gradients = [each.grad for each in group["params"] if each.grad is not None]
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
            for each, gradient in zip([each for each in group["params"] if each.grad is not None], gradients, strict=True):
                each.sub_(group["lr"] / norm * gradient)
        return loss


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=4),
    "LBFGS, line search": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe"),
    "Unit": Unit,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "tied over pp": {"pp": 2, "microbatches": 2},
    "dp, tp": {"dp": 2, "tp": 2, "overrides": {"placements": {"h.*.up.weight": 0, "h.*.down.weight": 1}}},
    "dp, pp, tp outside": {"dp": 2, "pp": 2, "tp": 2, "microbatches": 2, "mesh_order": ("tp", "dp", "pp")},
}
BATCH = gpt_batch(rows=4)


def built() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=2, dim=16, heads=4).double()


def trained(step: Callable[[], Tensor], parameters: Iterable[nn.Parameter], kind: str) -> None:
    optimizer = OPTIMIZERS[kind](list(parameters))

    def closure() -> float:
        optimizer.zero_grad()
        return step().item()

    for _ in range(UPDATES):
        optimizer.step(closure)


def alone(kind: str) -> dict[str, Tensor]:
    """The untouched model's parameters."""
    model = built()

    def step() -> Tensor:
        loss = model_loss(model, BATCH)
        loss.backward()
        return loss.detach()

    trained(step, model.parameters(), kind)
    return {name: value.detach() for name, value in model.state_dict().items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    start = built().state_dict()
    assert max((expected[key] - start[key]).abs().max().item() for key in start) > 1e-2, "this optimizer does next to nothing"
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_all_parameters_sees_each_once_in_a_plain_process(kind: str, layout: str) -> None:
    par = autopar.parallelize(built(), BATCH, **LAYOUTS[layout])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(lambda: par.step(**BATCH), par.parameters(), kind)
    found = par.full_state_dict()
    par.close()
    assert difference(found, alone(kind)) <= TOLERANCE


def test_ranks_of_a_process_share_the_memory_of_what_they_hold_alike() -> None:
    model = built()
    par = autopar.parallelize(model, BATCH, dp=2, tp=2, pp=2, microbatches=2)
    par.step(**BATCH)
    pieces = {each.data_ptr(): each.numel() for rank in par._ranks().parameters_of for each in rank.values()}  # type: ignore[attr-defined]
    total = sum(each.numel() for each in model.parameters())
    assert sum(pieces.values()) == sum(each.numel() for each in par.parameters()) == total
    assert sum(each.grad.numel() for rank in par._ranks().parameters_of for each in rank.values() if each.grad is not None) == total  # type: ignore[attr-defined]
    par.close()


@pytest.mark.parametrize("layout", ["dp", "dp, pp, tp outside"])
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_were_taken_away_are_so_on_all_ranks(layout: str, to_none: bool) -> None:
    """Also between two steps of one update, by the optimizer, which knows one rank's."""
    model = built()
    par = autopar.parallelize(model, BATCH, **LAYOUTS[layout])
    optimizer = torch.optim.SGD(par.parameters(), lr=0.1)
    for accumulate in (False, True):
        par.step(**BATCH, accumulate=accumulate)
        optimizer.zero_grad(set_to_none=to_none)
    ignored = {name: value.clone() for name, value in BATCH.items()}
    ignored["targets"][:2] = -100
    par.step(**ignored, accumulate=True)  # the first replica's part is 0, and was not set to 0
    par.step(**BATCH, accumulate=True)
    par.step(**BATCH)
    for batch in (BATCH, BATCH, ignored):
        model_loss(model, batch).backward()
    for name, parameter in model.named_parameters():
        found = par._ranks().whole(name, "grad")  # type: ignore[attr-defined]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=1e-14)
    par.close()


def test_a_value_that_a_user_puts_in_place_of_a_parameters_is_that_of_all_ranks() -> None:
    model = built()
    par = autopar.parallelize(model, BATCH, dp=2)
    par.step(**BATCH)
    other = copy.deepcopy(model)
    for name, parameter in par.named_parameters():
        parameter.data = parameter.data * 0.5
        other.get_parameter(name.partition(": ")[2]).data.mul_(0.5)
    torch.testing.assert_close(par.step(**BATCH), model_loss(other, BATCH).detach(), rtol=1e-12, atol=0.0)
    par.close()


# ---- in a job ----------------------------------------------------------------------------------------------------------


def job(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[dict[str, Tensor], str]]:
    """One rank: for each case (whole parameters on rank 0, what was said)."""
    report = []
    for kind, layout in cases:
        replicas = layout.get("dp", 1)
        rows = own_rows(BATCH, 0, replicas)
        par = autopar.parallelize(built(), rows, **layout)
        own = own_rows(BATCH, par.plan.coords(int(os.environ["RANK"])).get("dp", 0), replicas)
        said = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trained(lambda: par.step(**own), par.parameters(), kind)  # noqa: B023
            except BadArgument as error:
                said = str(error)
        said += "".join(str(each.message) for each in caught if "by itself" in str(each.message))
        report.append((par.full_state_dict(), said))
        par.close()
    return report


def test_in_a_job_an_optimizer_of_all_parameters_is_right_warned_about_or_refused() -> None:
    warned: list[tuple[str, dict[str, Any]]] = [("Unit", {"pp": 2}), ("LBFGS", {"pp": 2}), ("LBFGS", {"tp": 2})]
    refused: list[tuple[str, dict[str, Any]]] = [("Unit", {"dp": 2, "zero": 1}), ("LBFGS", {"dp": 2, "zero": 3})]
    first, second = autopar.launch(job, 2, [("LBFGS", {"dp": 2}), *warned, *refused], timeout_seconds=240)
    assert first[0][1] == second[0][1] == ""
    assert difference(first[0][0], alone("LBFGS")) <= TOLERANCE
    for (_, said), (_, other) in zip(first[1:4], second[1:4], strict=True):
        assert "sees the parameters of each rank by themselves" in said or "sees each rank's part" in said, said
        assert other and said.startswith("Unit") == other.startswith("Unit")
    for (_, said), (_, other) in zip(first[4:], second[4:], strict=True):
        assert "cannot update shards of parameters" in said and said == other

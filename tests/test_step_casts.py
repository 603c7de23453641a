"""Casts of parameters: once a step and stage, with the bits of casts that each microbatch makes, and weight gradients put off behind them.

The yardsticks are the same plan with its casts made anew by every microbatch, and, where a pipeline alone is to have its bits, one device
under torch.autocast.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, causal_batch, gpt_batch, tiny_llama
from reference import accumulate, model_loss, wide
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.casts import HeldCasts
from autopar.runtime.worker import Worker
from costmodel.errors import BadPlan
from passes.step_casts import held_casts


class Uses(nn.Module):
    """A weight with one cast; cast and used as it is; cast in two regions; cast as a view; frozen; through two linears; a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.twice, self.plain, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.square = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.both = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.plain(self.table(ids))
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.frozen(x) @ self.square.t() + F.linear(x, self.both)
        with torch.autocast("cpu", enabled=False):
            x = F.linear(x.float(), self.both) + x.float() @ self.square.to(torch.bfloat16).float()
        x = x + F.linear(x, self.both) + F.linear(x, self.square)
        return (F.linear(x, self.table.weight) + F.linear(torch.sin(x), self.table.weight)).float().square().mean()


def uses() -> tuple[nn.Module, dict[str, Tensor]]:
    return Uses(), {"ids": torch.randint(0, 16, (8, 5))}


def gpt() -> tuple[nn.Module, dict[str, Tensor]]:
    return GPT(layers=4, dim=16), gpt_batch(rows=8, tokens=6)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    return tiny_llama(), causal_batch()


def without_held_casts(plan: autopar.Plan) -> autopar.Plan:
    """The plan whose microbatches each make their casts."""
    stages = tuple(
        replace(stage, records=[{k: v for k, v in record.items() if k != "held"} for record in stage.records])
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def gradients(model: nn.Module, batch: Any, steps: int = 2, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """(losses, gradients by name) of steps that add up, parameters moved in between."""
    with closing(autopar.parallelize(copy.deepcopy(model), batch, **options)) as par:
        losses = []
        for _ in range(steps):
            losses.append(par.step(**batch))
            with torch.no_grad():
                for name, parameter in par.named_parameters():
                    if "twice" in name or "down" in name:
                        parameter.add_(parameter.sign(), alpha=1e-2)
        ranks = par._ranks()
        return losses, {name: ranks.whole(name, "grad") for name in dict(model.named_parameters())}  # type: ignore[attr-defined]


def same_bits(one: tuple[list[Tensor], dict[str, Any]], other: tuple[list[Tensor], dict[str, Any]]) -> list[str]:
    """The names of what differs."""
    found = [f"loss {k}" for k, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if not torch.equal(a, b)]
    for name, value in one[1].items():
        expected = other[1][name]
        if (value is None) != (expected is None) or (value is not None and not torch.equal(value, expected)):
            found.append(name)
    return found


LAYOUTS: list[tuple[Any, dict[str, Any]]] = [
    (build, options)
    for build in (uses, gpt, llama)
    for options in (
        {}, {"recompute": "selective"}, {"tp": 2}, {"pp": 2}, {"pp": 2, "schedule": "zb-h1"}, {"pp": 2, "schedule": "zb-h2"},
        {"pp": 2, "schedule": "zb-v"}, {"pp": 2, "schedule": "dualpipe-v"}, {"pp": 2, "schedule": "interleaved-1f1b"},
        {"pp": 2, "schedule": "zb-h1", "recompute": "selective"}, {"pp": 2, "tp": 2, "schedule": "zb-h1"},
        {"dp": 2, "pp": 2, "schedule": "zb-h1"}, {"dp": 2, "zero": 2},
    )
]  # fmt: skip
QUICK = [
    (uses, {}), (uses, {"pp": 2, "schedule": "zb-h1"}), (gpt, {"pp": 2, "schedule": "zb-v"}), (gpt, {"dp": 2, "zero": 2}),
    (gpt, {"dp": 2, "pp": 2, "schedule": "zb-h1"}), (gpt, {"pp": 2, "tp": 2, "schedule": "zb-h1"}),
    (llama, {"pp": 2, "schedule": "zb-h1", "recompute": "selective"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "options"), wide(LAYOUTS, lambda *case: case in QUICK), ids=lambda value: value.__name__ if callable(value) else str(value)
)
@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("fp16-mixed", marks=pytest.mark.slow)])
def test_a_step_has_the_bits_of_casts_that_each_microbatch_makes(build: Any, options: dict[str, Any], precision: str) -> None:
    torch.manual_seed(0)
    model, batch = build()
    example = {name: tensor[: len(tensor) // options.get("dp", 1)] for name, tensor in batch.items()}
    plan = autopar.parallelize(model, example, microbatches=2, precision=precision, **options).plan
    assert any(held_casts(stage.graph_module.graph) for stage in plan.stages)
    again = without_held_casts(plan)
    assert '"bf16")' not in again.source(0) and '"f16")' not in again.source(0)
    assert same_bits(gradients(model, batch, plan=plan), gradients(model, batch, plan=again)) == []


def _autocast_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model_loss(model, batch)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"])
def test_a_pipeline_has_the_bits_of_one_device_under_autocast(schedule: str) -> None:
    torch.manual_seed(0)
    model, batch = gpt()
    alone = copy.deepcopy(model)
    loss = accumulate(alone, batch, 4, _autocast_loss)
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    options = {"pp": 2, "microbatches": 4, "schedule": schedule, "precision": "bf16-mixed"}
    assert same_bits(gradients(model, batch, 1, **options), ([loss], expected)) == []
    plan = autopar.parallelize(model, batch, **options).plan
    assert plan.splits_backward == any("deferred_linear(" in plan.source(rank) for rank in range(2))


@pytest.mark.parametrize("wrong", ["sums in the low dtype", "casts of an earlier step"])
def test_the_bits_see(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = gpt()
    plan = autopar.parallelize(model, batch, microbatches=4, precision="bf16-mixed").plan
    expected = gradients(model, batch, plan=without_held_casts(plan))
    if wrong == "sums in the low dtype":

        def low(parameter: Tensor, gradient: Tensor) -> None:
            before = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad.to(gradient.dtype)
            parameter.grad = (before + gradient).to(parameter.dtype)

        monkeypatch.setattr("autopar.casts.add_gradient", low)
    else:
        untouched, kept = HeldCasts.make, {}

        def stale(casts: HeldCasts, name: str) -> Tensor:
            made = untouched(casts, name)
            with torch.no_grad():
                made.copy_(kept.setdefault(name, made.detach().clone()))
            return made

        monkeypatch.setattr(HeldCasts, "make", stale)
    assert same_bits(gradients(model, batch, plan=plan), expected) != []


class Casts(TorchDispatchMode):
    """How often each parameter is cast, in one thread."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.counts = names, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (name := self.names.get(args[0].untyped_storage().data_ptr())):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def casts_of(par: autopar.ParallelModel, run: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Counter[str]]]:
    """(pipeline rank, casts by parameter) of every rank."""
    found = []

    def counted(untouched: Any) -> Any:
        def counting(worker: Worker, *args: Any, **options: Any) -> Any:
            names = {each.untyped_storage().data_ptr(): name for name, each in worker.parameters.items()}
            with Casts(names) as casts:
                result = untouched(worker, *args, **options)
            found.append((worker.world.coords["pp"], casts.counts))
            return result

        return counting

    with monkeypatch.context() as patch:
        for name in ("step", "forward"):
            patch.setattr(Worker, name, counted(getattr(Worker, name)))
        run()
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_each_parameter_is_cast_once_a_step_whatever_the_number_of_microbatches(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = gpt()
    for count in (2, 4):
        with closing(autopar.parallelize(model, batch, pp=2, microbatches=count, schedule=schedule, precision="bf16-mixed")) as par:
            for run in (lambda: par.step(**batch), lambda: par.step(**batch), lambda: par(**batch)):
                for place, counts in casts_of(par, run, monkeypatch):
                    assert counts == dict.fromkeys(held_casts(par.plan.stages[place].graph_module.graph), 1)


def test_what_is_cast_once_is_a_decision_of_the_plan(tmp_path: Path) -> None:
    model, batch = gpt()
    plan = autopar.parallelize(model, batch, pp=2, microbatches=2, precision="bf16-mixed").plan
    assert any("cast to bf16 once a step" in note for note in plan.notes)
    plan.save(tmp_path / "plan.json")
    again = autopar.Plan.load(tmp_path / "plan.json")
    assert again.source(0) == plan.source(0) and 'p("h.0.up.weight", "bf16")' in plan.source(0)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "edited.json").write_text(text.replace('"held": true', '"held": false', 1))
    edited = autopar.Plan.load(tmp_path / "edited.json")
    assert edited.source(0).count(".to(torch.bfloat16)") == plan.source(0).count(".to(torch.bfloat16)") + 1
    gelu = next(record for record in plan.stages[0].records if record["op"] == "call_function" and "gelu" in record["target"])
    wrong = [{**record, "held": True} if record is gelu else record for record in plan.stages[0].records]
    with pytest.raises(BadPlan, match="no cast of a parameter"):
        replace(plan, stages=(replace(plan.stages[0], records=wrong), plan.stages[1])).check()


@pytest.mark.parametrize(
    "options", [{"microbatches": 1}, {"microbatches": 4, "recompute": "full"}, {"microbatches": 2, "dp": 2, "zero": 3}], ids=str
)
def test_casts_are_not_held_where_that_would_only_take_memory(options: dict[str, Any]) -> None:
    model, batch = gpt()
    plan = autopar.parallelize(model, batch, precision="bf16-mixed", **options).plan
    assert not any(held_casts(stage.graph_module.graph) for stage in plan.stages)


def test_a_budget_that_held_casts_do_not_fit_is_kept_without_them() -> None:
    model, batch = GPT(dim=64), gpt_batch(rows=4, tokens=4)
    options: dict[str, Any] = {"microbatches": 2, "precision": "bf16-mixed"}
    held, full = (autopar.parallelize(model, batch, **options, recompute=kind).plan for kind in ("none", "full"))
    assert full.predicted.peak_bytes < held.predicted.peak_bytes
    for budget, holds in ((held.predicted.peak_bytes, True), (full.predicted.peak_bytes, False)):
        plan = autopar.parallelize(model, batch, **options, recompute=int(budget)).plan
        assert plan.predicted.peak_bytes <= budget
        assert bool(held_casts(plan.stages[0].graph_module.graph)) == holds


def test_each_gradient_is_reduced_once_with_casts() -> None:
    torch.manual_seed(0)
    model, batch = gpt()
    example = {name: tensor[:4] for name, tensor in batch.items()}
    for schedule in ("1f1b", "zb-h1"):
        with closing(autopar.parallelize(model, example, dp=2, pp=2, microbatches=2, schedule=schedule, precision="bf16-mixed")) as par:
            par.step(**batch)
            assert par.reductions() == dict.fromkeys({name.rpartition(": ")[2] for name, _ in par.named_parameters()}, 1)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-h1", marks=pytest.mark.slow)])
def test_compiled_stages_hold_casts_too(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = GPT(layers=2, dim=16), gpt_batch(rows=4, tokens=4)
    options: dict[str, Any] = {"pp": 2, "microbatches": 2, "schedule": schedule, "precision": "bf16-mixed"}
    expected = gradients(model, batch, 1, **options)[1]
    with closing(autopar.parallelize(copy.deepcopy(model), batch, compile="aot_eager", **options)) as par:
        par.step(**batch)
        found = {name: par._ranks().whole(name, "grad") for name in expected}  # type: ignore[attr-defined]
        for place, counts in casts_of(par, lambda: par.step(**batch), monkeypatch):
            assert counts == dict.fromkeys(held_casts(par.plan.stages[place].graph_module.graph), 1)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-4)

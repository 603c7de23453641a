"""Recomputed segments: equal to the last bit to keeping everything, readable, chosen by cost, and within a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, Block, gpt_batch
from torch import Tensor, nn

import autopar
from autopar.errors import BadArgument, DoesNotFit
from autopar.program import StageModule
from autopar.recompute import recompute
from passes.recompute import segments_of


class NoisyBlock(nn.Module):
    """A block with dropout around it, so that the numbers must be replayed."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.inner, self.drop = Block(dim, 4, flash=False), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(self.drop(x)))


def noisy_gpt(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(layers=layers, flash=False)
    model.h = nn.ModuleList(NoisyBlock() for _ in range(layers))
    return model


class Convolutions(nn.Module):
    """Batch norms in training: statistics must be updated once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), y)


class ManyWays(nn.Module):
    """Each layer gives a float and an integer, and the first input of each needs no gradient or is an integer."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.up(x + self.table(places)))
            return x + self.down(hidden * torch.sigmoid(hidden)), hidden.argmax(-1) % 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            x, places = layer(x, places)
            seen.append(x)
        return sum(each.square().sum() for each in seen)


def step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[autopar.ParallelModel, dict[str, Tensor]]:
    """Two steps; every result that could differ."""
    par = autopar.parallelize(model, batch, **options)
    found = {"first loss": par.step(**batch), "second loss": par.step(**batch)}
    found |= {name: p.grad.clone() for name, p in par.named_parameters() if p.grad is not None}
    found |= {f"state {name}": value.clone() for name, value in par.full_state_dict().items()}
    par.close()
    return par, found


def segments(plan: autopar.Plan) -> list[str]:
    return [name for stage in plan.stages for name in segments_of(stage.graph_module.graph)]


LAYOUTS = [
    (1, 1, "1f1b"), (2, 1, "1f1b"), (1, 2, "gpipe"), (2, 2, "1f1b"), (1, 2, "zb-h1"), (1, 2, "interleaved-1f1b"), (2, 2, "zb-v"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "pp", "schedule"),
    [pytest.param(*layout, marks=() if layout in (LAYOUTS[0], LAYOUTS[-1]) else pytest.mark.slow) for layout in LAYOUTS],
)
def test_gradients_are_bitwise_those_without_recomputation_while_dropout_is_on(tp: int, pp: int, schedule: str) -> None:
    batch = gpt_batch(rows=4)
    given: dict[str, Any] = {"tp": tp, "pp": pp, "schedule": schedule, "microbatches": 4}
    _, expected = step(noisy_gpt(), batch, **given)
    for choice in ("selective", "full"):
        par, found = step(noisy_gpt(), batch, **given, recompute=choice)
        assert segments(par.plan) and (pp > 1 or "random=True" in par.plan.source(0))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_comparison_sees_numbers_that_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = gpt_batch(rows=4)
    _, expected = step(noisy_gpt(), batch)
    monkeypatch.setattr(StageModule, "set_random_state", lambda self, state: None)
    _, found = step(noisy_gpt(), batch, recompute="full")
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1)])
def test_batch_statistics_are_updated_once(tp: int, pp: int) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Convolutions()

    batch = {"x": torch.randn(4, 8, 6, 6), "y": torch.arange(4)}
    given: dict[str, Any] = {"tp": tp, "pp": pp, "microbatches": 2}
    _, expected = step(model(), batch, **given)
    par, found = step(model(), batch, **given, recompute="full")
    assert segments(par.plan)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    updating = [n for stage in par.plan.stages for n in stage.graph_module.graph.nodes if n.meta.get("mutates")]
    assert updating and not any(node.meta.get("segment") for node in updating)


@pytest.mark.parametrize("pp", [1, 3])
def test_several_results_and_inputs_without_gradients(pp: int) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return ManyWays()

    batch = {"x": torch.randn(6, 5, 8), "places": torch.arange(30).view(6, 5) % 16}
    _, expected = step(model(), batch, pp=pp, microbatches=3)
    par, found = step(model(), batch, pp=pp, microbatches=3, recompute="full")
    assert len(segments(par.plan)) >= 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_are_found_without_names_and_printed_as_methods() -> None:
    par = autopar.parallelize(GPT(layers=3), gpt_batch(), recompute="full")
    assert segments(par.plan) == ["h_0", "h_1", "h_2"]
    source = par.plan.source(0)
    assert "    def h_1(self, x_2, B, T):\n" in source
    assert "        x_4 = recompute(self.h_1, x_2, B, T)" in source and "; kept: x_2\n" in source
    assert [note for note in par.plan.notes if "computes h_0, h_1, h_2 again in backward" in note]


def test_a_model_without_layers_falls_into_pieces() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(
                nn.Parameter(torch.randn(a, b)) for a, b in ((8, 16), (16, 24), (24, 12), (12, 8))
            )

        def forward(self, x: Tensor) -> Tensor:
            for number, weight in enumerate(self.weights):
                x = (torch.tanh if number % 2 else torch.sigmoid)(x @ weight)
            return x.square().mean()

    batch = {"x": torch.randn(4, 8)}
    torch.manual_seed(0)
    model = Uneven()
    _, expected = step(model, batch)
    par, found = step(model, batch, recompute="full")
    assert len(segments(par.plan)) > 1
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_selective_keeps_the_results_of_matmuls_and_not_of_norms() -> None:
    model = GPT(vocab=512, dim=256, heads=4, layers=2, context=512, flash=False)
    par = autopar.parallelize(
        model, gpt_batch(rows=4, tokens=512, vocab=512), recompute="selective", hardware="h100-sxm"
    )
    by_name = {node.name: node for node in par.plan.stages[0].graph_module.graph.nodes}
    inside = {node.target for node in by_name.values() if node.meta.get("segment")}
    aten = torch.ops.aten
    assert {aten.layer_norm.default, aten.gelu.default, aten.softmax.int} <= inside
    again = par.plan.stages[0].cost
    assert 0 < again.recompute_seconds < 0.3 * (again.forward_seconds + again.backward_seconds)


def test_a_budget_is_kept_at_the_least_time() -> None:
    model, batch = GPT(layers=4, dim=64, flash=False), gpt_batch(rows=8, tokens=32)
    given: dict[str, Any] = {"pp": 2, "microbatches": 4}
    none, full = (autopar.parallelize(model, batch, **given, recompute=choice).plan for choice in ("none", "full"))
    most, least = none.predicted.peak_bytes, full.predicted.peak_bytes
    assert least < 0.8 * most
    times = []
    for share in (1.0, 0.7, 0.4, 0.1):
        budget = int(least + share * (most - least))
        plan = autopar.parallelize(model, batch, **given, recompute=budget).plan
        assert plan.predicted.peak_bytes <= budget and plan.recompute == budget
        times.append(sum(stage.cost.recompute_seconds for stage in plan.stages))
    assert times[0] == 0 and times == sorted(times)
    assert times[-1] <= sum(stage.cost.recompute_seconds for stage in full.stages) * 1.01
    with pytest.raises(DoesNotFit, match=r"(?s)recompute = 1000: stage.*the peak is .*use recompute >= \d+"):
        autopar.parallelize(model, batch, **given, recompute=1000)


def test_time_and_memory_are_in_the_plan_and_survive_a_file(tmp_path: Any) -> None:
    none, full = (autopar.parallelize(GPT(layers=4), gpt_batch(), pp=2, recompute=c).plan for c in ("none", "full"))
    assert full.predicted.step_seconds > none.predicted.step_seconds
    assert full.simulated().step_seconds > none.simulated().step_seconds
    full.save(tmp_path / "plan.json")
    loaded = autopar.Plan.load(tmp_path / "plan.json")
    assert loaded.recompute == "full" and loaded.source(0) == full.source(0) and loaded.to_json() == full.to_json()
    assert loaded.stages[0].cost.memory == full.stages[0].cost.memory


@pytest.mark.parametrize("value", ["all", 0, -1, True, 1.5, None])
def test_what_recompute_may_not_be(value: Any) -> None:
    with pytest.raises(BadArgument, match=r'(?s)recompute = .*"selective"'):
        autopar.parallelize(GPT(), gpt_batch(), recompute=value)


# ---- the function that programs call ----------------------------------------------------------------------------------------


class Stage(StageModule):
    calls = 0

    def run(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        type(self).calls += 1
        hidden = torch.tanh(x * count)
        return hidden.exp(), hidden


def test_only_the_arguments_are_kept_and_the_second_run_happens_once() -> None:
    stage = Stage({}, {}, {})
    x = torch.randn(1000, requires_grad=True)
    first, second = recompute(stage.run, x, 3)
    before = Stage.calls
    (first.sum() + second.square().sum()).backward()
    assert Stage.calls == before + 1
    other = x.detach().clone().requires_grad_()
    one, two = stage.run(other, 3)
    (one.sum() + two.square().sum()).backward()
    assert torch.equal(x.grad, other.grad)  # type: ignore[arg-type]


def test_without_gradients_it_is_a_plain_call() -> None:
    stage = Stage({}, {}, {})
    with torch.no_grad():
        first, _ = recompute(stage.run, torch.randn(3, requires_grad=True), 2)
    assert not first.requires_grad


def test_the_second_run_ends_where_nothing_more_is_saved() -> None:
    seen: list[str] = []

    class Tail(StageModule):
        def run(self, x: Tensor) -> Tensor:
            y = x.exp()
            seen.append("middle")
            z = y.sin()  # saves y
            seen.append("end")
            return z + x

    x = torch.randn(4, requires_grad=True)
    out = recompute(Tail({}, {}, {}).run, x)
    out.sum().backward()
    assert seen == ["middle", "end", "middle"]

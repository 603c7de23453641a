"""Data parallelism: replicas whose gradients are summed once a step train as one device does on all their batches together.

Tolerances: losses of 20 AdamW steps within 1e-5 of the untouched model's (losses are 5 to 20), parameters within 2e-4
(AdamW's eps 1e-4, so that gradients that are 0 but for rounding stay small).
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch
from reference import model_loss, train, wide
from torch import Tensor, nn

import autopar
from costmodel.buckets import HELD_GROUPS
from costmodel.errors import BadArgument, RankFailed

NUM_STEPS, ROWS, TOKENS = 20, 7, 8  # 7 rows over 2 replicas are 4, 3
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 2e-4
EPS = 1e-4
Batch = dict[str, Tensor]


class Mixed(nn.Module):
    """Parameters of every awkward kind: tied, a scalar, frozen, unused, rows that no axis divides, a skip over all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(17, 12)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.odd = nn.Linear(12, 5)
        self.back = nn.Linear(5, 12, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.wte.weight
        self.blocks[1].weight.requires_grad_(False)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = first = self.wte(idx)
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * self.scale
        x = x + self.back(F.gelu(self.odd(x))) + first
        return F.cross_entropy(self.head(x).view(-1, 17), targets.view(-1))


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt": lambda: GPT(layers=4, dim=16, heads=4), "mixed": Mixed}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batches_of(name: str, count: int = NUM_STEPS, rows: int = ROWS) -> list[Batch]:
    """Rows with different numbers of labels that are ignored."""
    found = []
    for seed in range(count):
        batch = gpt_batch(rows=rows, tokens=TOKENS, seed=seed % 4, vocab=17 if name == "mixed" else 64)
        for row in range(rows):
            batch["targets"][row, : row % TOKENS] = -100
        found.append(batch)
    return found


@cache
def alone(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, parameters) of the untouched model on whole batches."""
    model = built(name)

    def step(batch: Any) -> Tensor:
        loss = model_loss(model, batch)
        loss.backward()
        return loss.detach()

    losses = train(step, model.parameters(), batches_of(name), eps=EPS)
    return [loss.item() for loss in losses], model.state_dict()


def differences(losses: list[Tensor], parameters: dict[str, Tensor], name: str) -> tuple[float, float]:
    """(of the losses, of the parameters), the largest."""
    expected_losses, expected = alone(name)
    assert list(parameters) == list(expected)
    return (
        max(abs(loss.item() - wanted) for loss, wanted in zip(losses, expected_losses, strict=True)),
        max((parameters[key] - expected[key]).abs().max().item() for key in expected),
    )


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    (name, layout)
    for name in MODELS
    for layout in (
        {"dp": 2},
        {"dp": 3},
        {"dp": 2, "tp": 2},
        {"dp": 2, "pp": 2, "schedule": "1f1b", "microbatches": 3},
        {"dp": 2, "pp": 2, "schedule": "interleaved-1f1b", "microbatches": 2},
        {"dp": 2, "pp": 2, "schedule": "zb-h1", "microbatches": 3},
        {"dp": 2, "pp": 2, "schedule": "zb-v", "microbatches": 3},
        {"dp": 2, "pp": 2, "tp": 2, "microbatches": 2},
        {"dp": 2, "pp": 2, "tp": 2, "microbatches": 2, "mesh_order": ("dp", "tp", "pp")},
        {"dp": 2, "zero": 1},
        {"dp": 3, "zero": 2},
        {"dp": 2, "tp": 2, "zero": 2},
        {"dp": 2, "pp": 2, "schedule": "zb-h1", "microbatches": 3, "zero": 2},
        {"dp": 2, "pp": 2, "schedule": "dualpipe-v", "microbatches": 3, "zero": 2},
        {"dp": 2, "pp": 2, "schedule": "interleaved-1f1b", "microbatches": 2, "zero": 1},
        {"dp": 2, "pp": 2, "tp": 2, "microbatches": 2, "zero": 1},
        {"dp": 2, "zero": 3},
        {"dp": 3, "zero": 3, "recompute": "full"},
        {"dp": 2, "tp": 2, "zero": 3},
        {"dp": 2, "pp": 2, "schedule": "zb-h1", "microbatches": 3, "zero": 3},
        {"dp": 2, "pp": 2, "schedule": "interleaved-1f1b", "microbatches": 2, "zero": 3, "recompute": "selective"},
        {"dp": 2, "pp": 2, "tp": 2, "microbatches": 2, "zero": 3},
    )
]


def _quick(name: str, layout: dict[str, Any]) -> bool:
    few = layout.get("zero") != 1 and math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp")) < 8
    schedule = layout.get("schedule", "zb-h1")
    return (name == "mixed" and few and schedule == "zb-h1") or (name == "gpt" and schedule == "dualpipe-v") or layout == {"dp": 2}


@pytest.mark.parametrize(("name", "layout"), wide(LAYOUTS, _quick), ids=str)
def test_replicas_train_as_one_device_does_on_all_their_batches(name: str, layout: dict[str, Any]) -> None:
    batches = batches_of(name)
    par = autopar.parallelize(built(name), batches[0], **layout)
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches, eps=EPS)
    of_losses, of_parameters = differences(losses, par.full_state_dict(), name)
    par.close()
    assert of_losses <= LOSS_TOLERANCE
    assert of_parameters <= PARAMETER_TOLERANCE


def test_each_gradient_is_reduced_once_a_step_whatever_the_number_of_microbatches() -> None:
    batch = batches_of("mixed", 1)[0]
    for layout in (
        {"microbatches": 1}, {"pp": 2, "microbatches": 3}, {"pp": 2, "microbatches": 3, "schedule": "zb-h1"},
        {"pp": 2, "microbatches": 3, "zero": 2}, {"pp": 2, "microbatches": 3, "schedule": "zb-h1", "zero": 3},
    ):  # fmt: skip
        par = autopar.parallelize(built("mixed"), batch, dp=2, **layout)
        for _ in range(2):
            par.step(**batch)
            counts = par.reductions()
            trained = {name.rpartition(": ")[2] for name, p in par.named_parameters() if p.requires_grad}
            assert counts == dict.fromkeys(trained, 1)
        par.close()


def test_reductions_begin_while_the_last_microbatch_goes_backward() -> None:
    """Not one after the other at the end: most buckets are under way before the last backward is over."""
    from autopar.runtime.replicas import ReplicaSums

    torch.manual_seed(0)
    model = GPT(layers=4, dim=256, heads=4, vocab=64)
    batch = gpt_batch(rows=4, tokens=8)
    par = autopar.parallelize(model, batch, dp=2)
    par.step(**batch)
    events: list[str] = []
    worker = par._ranks()._threads._ranks[0].worker  # type: ignore[union-attr, attr-defined]
    sums: ReplicaSums = worker._sums.replicas
    start, complete = sums._start, sums.complete
    sums._start = lambda bucket: (events.append("start"), start(bucket))[1]  # type: ignore[method-assign]
    sums.complete = lambda stage: (events.append("backward over"), complete(stage))[1]  # type: ignore[method-assign]
    par.step(**batch)
    par.close()
    assert events.index("backward over") >= 3, events


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_gradients_of_several_steps_add_up(zero: int) -> None:
    model, batches = built("mixed"), batches_of("mixed", 2)
    reference = copy.deepcopy(model)
    par = autopar.parallelize(model, batches[0], dp=2, pp=2, microbatches=2, zero=zero)
    for batch in batches:
        par.step(**batch)
        model_loss(reference, batch).backward()
    held = par._ranks()
    for name, parameter in reference.named_parameters():
        found = held.whole(name, "grad") if parameter.grad is not None else None  # type: ignore[attr-defined]
        assert (found is None) == (parameter.grad is None)
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    norm = par.clip_grad_norm_(0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1), rtol=1e-5, atol=0.0)
    par.close()


@pytest.mark.parametrize("zero", [1, 3])
def test_parameters_are_each_replicas_part_and_keep_their_number_of_dims(zero: int) -> None:
    model, batch = built("mixed"), batches_of("mixed", 1)[0]
    par = autopar.parallelize(model, batch, dp=3, zero=zero)
    trained = {name: p for name, p in model.named_parameters() if (p.requires_grad or zero == 3) and name != "unused"}
    held = dict(par.named_parameters())
    for name, parameter in trained.items():
        shards = [held[f"rank {rank}: {name}"] for rank in range(3)]
        assert {shard.ndim for shard in shards} == {max(1, parameter.ndim)}
        assert sum(shard.numel() for shard in shards) == parameter.numel()
    totals = [sum(held[f"rank {rank}: {name}"].numel() for name in trained) for rank in range(3)]
    num_groups = len(par._ranks().shards_of[0].groups)  # type: ignore[attr-defined]
    assert max(totals) - min(totals) <= 2 * num_groups, "each group in equal parts, but for what fills up the last ones"
    optimizer = torch.optim.AdamW(par.parameters())
    par.step(**batch)
    optimizer.step()
    optimizer_numel = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert optimizer_numel == sum(parameter.numel() for parameter in trained.values() if parameter.requires_grad)
    assert all(p.grad is None for rank in par._ranks().parameters_of for p in rank.values()), "no whole gradient is kept"  # type: ignore[attr-defined]
    changed = {key: value + 1 for key, value in par.full_state_dict().items()}
    par.load_state_dict(changed)
    for key, value in par.full_state_dict().items():
        assert torch.equal(value, changed[key]), key
    assert torch.equal(par.state_dict()["unused"], changed["unused"])
    par.close()


def test_zero_3_holds_whole_parameters_only_while_they_are_used() -> None:
    """Not after a step, and in a step no more than a few of the groups they are gathered in; autograd keeps none."""
    torch.manual_seed(0)
    model = GPT(layers=8, dim=128, heads=4, vocab=64)
    batch = gpt_batch(rows=4, tokens=8)
    par = autopar.parallelize(model, batch, dp=2, zero=3)
    par.step(**batch)
    rank = par._ranks()._threads._ranks[0]  # type: ignore[union-attr, attr-defined]
    gathered = rank.worker._chunks[0]._gathered
    total = sum(p.numel() for p in model.parameters())
    most, alive, asked = 0, [], []
    gather = gathered._shards.start_gather

    def counted(group: Any, axis: Any) -> Any:
        nonlocal most
        found = gather(group, axis)
        asked.append(group)
        alive.append(weakref.ref(found._result().untyped_storage()))
        most = max(most, sum(each.nbytes() for ref in alive if (each := ref()) is not None))
        return found

    gathered._shards.start_gather = counted
    par.step(**batch)
    groups = gathered._shards.groups
    assert len(groups) >= 2 and asked[: len(groups)] == groups, "each for forward, in the order of their use"
    assert set(asked[len(groups) :]) >= set(groups[:-HELD_GROUPS]), "and again for backward"
    largest = 4 * max(group.part * 2 for group in groups)
    assert most <= (HELD_GROUPS + 2) * largest < 4 * total, "held, on its way, and one that an op still reads"
    assert not gathered._held and gathered._coming is None
    assert all(p.untyped_storage().nbytes() <= 4 for p in rank.worker.parameters.values())
    par.close()


class Uneven(nn.Module):
    """Features that two ranks cannot share out evenly, and odd ones that each of them has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.whole = nn.Linear(13, 67), nn.Linear(67, 13), nn.Linear(13, 160)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.whole(x + self.down(F.gelu(self.up(x)))), y)


@pytest.mark.parametrize("zero", [1, 3])
def test_tensor_parallel_ranks_cut_what_they_hold_alike_at_the_same_places(zero: int) -> None:
    """Where their other pieces differ in size, too: a vectorised kernel rounds the elements of its last part otherwise."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 13), "y": torch.randn(6, 160)}
    placements: dict[str, str | int] = {"up.weight": 0, "down.weight": 1, "whole.weight": "whole"}
    par = autopar.parallelize(Uneven(), batch, tp=2, dp=2, zero=zero, overrides={"placements": placements})
    optimizer = torch.optim.AdamW(par.parameters(), lr=1e-2)
    for _ in range(8):
        par.step(**batch)
        optimizer.step()
        optimizer.zero_grad()
    held = dict(par.named_parameters())
    alike = [name for name, text in par.plan.parameter_notation.items() if "/tp" not in text]
    assert alike and {held[f"rank {rank}: up.weight"].numel() for rank in range(4)} != {held["rank 0: up.weight"].numel()}
    for name in alike:
        for replica in (0, 2):
            assert torch.equal(held[f"rank {replica}: {name}"], held[f"rank {replica + 1}: {name}"]), name
    par.close()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_model_that_is_closed_and_deleted_is_free(zero: int) -> None:
    batch = batches_of("mixed", 1)[0]
    par = autopar.parallelize(built("mixed"), batch, dp=2, zero=zero)
    par.step(**batch)
    held = [weakref.ref(parameter) for parameter in par.parameters()]
    par.close()
    del par
    gc.collect()
    assert held and all(ref() is None for ref in held)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-3, "foreach": True}], ids=str)
def test_elementwise_optimizers_update_shards(options: dict[str, Any]) -> None:
    batch = batches_of("mixed", 1)[0]
    par = autopar.parallelize(built("mixed"), batch, dp=2, zero=1)
    optimizer = torch.optim.SGD(par.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)  # replaces optimizer.step
    par.step(**batch)
    optimizer.step()
    schedule.step()
    par.close()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fused_optimizers_train_shards_to_the_same_model(zero: int) -> None:
    """Their kernels change parameters without counting it in the tensors' versions."""
    batches = batches_of("mixed", 3)
    alone = built("mixed")
    expected = torch.optim.AdamW(alone.parameters(), lr=1e-2, eps=1e-4)
    par = autopar.parallelize(built("mixed"), batches[0], dp=2, zero=zero)
    optimizer = torch.optim.AdamW(par.parameters(), lr=1e-2, eps=1e-4, fused=True)
    for batch in batches:
        loss = model_loss(alone, batch)
        loss.backward()
        torch.testing.assert_close(par.step(**batch), loss.detach(), rtol=1e-5, atol=0.0)
        for each in (expected, optimizer):
            each.step()
            each.zero_grad()
    par.close()


class Layerwise(torch.optim.Optimizer):
    """Scales each update by the parameter's norm, as LARS and LAMB do."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.norm() * parameter.grad


@pytest.mark.parametrize(
    "make",
    [
        Layerwise,
        lambda parameters: torch.optim.Adafactor(parameters),
        lambda parameters: torch.optim.LBFGS(list(parameters)),
        lambda parameters: Layerwise(parameters, lr=0.0),
    ],
)  # fmt: skip
def test_an_optimizer_that_is_not_elementwise_is_refused_with_shards_alone(make: Any) -> None:
    batch = batches_of("mixed", 1)[0]
    par = autopar.parallelize(built("mixed"), batch, dp=2, zero=1)
    optimizer = make(par.parameters())
    par.step(**batch)
    before = par.full_state_dict()
    with pytest.raises(BadArgument, match=f"{type(optimizer).__name__} cannot update shards"):
        optimizer.step(*([lambda: 0.0] if isinstance(optimizer, torch.optim.LBFGS) else []))
    assert all(torch.equal(value, before[key]) for key, value in par.full_state_dict().items())
    par.close()
    alone = built("mixed")
    model_loss(alone, batch).backward()
    make([alone.head.weight]).step(*([lambda: 0.0] if isinstance(optimizer, torch.optim.LBFGS) else []))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_an_optimizer_that_is_not_elementwise_warns_where_tp_splits(kind: Any) -> None:
    batch = batches_of("gpt", 1)[0]
    par = autopar.parallelize(built("gpt"), batch, tp=2)
    optimizer = kind(par.parameters())
    par.step(**batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    said = [str(each.message) for each in caught if "by itself" in str(each.message)]
    assert len(said) == (kind is torch.optim.Adafactor)
    par.close()


class Normed(nn.Module):
    """A batch norm between two linears; dropout behind it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.b(self.dropout(torch.relu(self.norm(self.a(x))))), y)


@pytest.mark.parametrize("layout", [{}, {"pp": 2, "microbatches": 2}, {"tp": 2}])
def test_verify_compares_replicas_and_the_means_of_their_statistics(layout: dict[str, int]) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(9, 8), "y": torch.randn(9, 4)}
    report = autopar.verify(Normed(), batch, dp=2, **layout)
    assert report.ok, str(report)
    assert {d.name for d in report.differences} >= {"norm.running_mean", "a.weight"}


@pytest.mark.parametrize(
    "layout", [{"dp": 2}, {"dp": 2, "tp": 2, "zero": 1}, {"dp": 2, "pp": 2, "microbatches": 2, "zero": 2}, {"dp": 2, "zero": 3}], ids=str
)
def test_replicas_drop_other_values_and_a_seed_repeats_them(layout: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, batch = Normed(dropout=0.5), {"x": torch.randn(8, 8), "y": torch.randn(8, 4)}

    def trained(seed: int) -> tuple[list[float], Batch]:
        par = autopar.parallelize(model, batch, seed=seed, **layout)
        losses = train(lambda each: par.step(**each), par.parameters(), [batch] * 4)
        seeds: dict[tuple[int, ...], list[int]] = {}
        for rank in par._ranks()._threads._ranks:  # type: ignore[union-attr, attr-defined]
            coords = rank.worker.world.coords
            seeds.setdefault((coords["pp"], coords["tp"]), []).append(rank.worker._chunks[0].stage.generator(False).initial_seed())
        assert all(first != second for first, second in seeds.values())
        found = [loss.item() for loss in losses], par.full_state_dict()
        par.close()
        return found

    (losses, parameters), (again, same), (other, _) = trained(0), trained(0), trained(1)
    assert losses == again != other
    assert all(torch.equal(value, same[key]) for key, value in parameters.items())


@pytest.mark.parametrize("zero", [0, 3])
def test_outputs_of_a_plain_process_are_of_the_whole_batch(zero: int) -> None:
    model, batch = built("gpt").eval(), batches_of("gpt", 1)[0]
    par = autopar.parallelize(model, batch, dp=2, tp=2, pp=2, microbatches=2, zero=zero)
    loss, logits = par(**batch)
    expected_loss, expected_logits = model(**batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    par.close()


class Pair(nn.Module):
    """A loss, and a scalar that is no sum over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x)
        return {"loss": h.square().mean(), "largest": h.amax()}


def test_a_scalar_that_replicas_differ_in_is_refused_with_what_would_work() -> None:
    par = autopar.parallelize(Pair(), {"x": torch.randn(2, 4)}, dp=2)
    with pytest.raises(BadArgument, match=r"'amax' cannot be put together from the 2 of microbatches or replicas(.|\n)*dp=1"):
        par(x=torch.randn(4, 4))
    par.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mesh_order": ("pp", "tp")}, "mesh_order"),
        ({"mesh_order": 3}, "mesh_order = 3"),
        ({"schedule": None}, "schedule = None"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"dp": 0}, "dp = 0"),
        ({"dp": True}, "dp = True"),
        ({"dp": 2, "zero": 4}, "zero = 4"),
        ({"zero": True}, "zero = True"),
        ({"zero": -1}, "zero = -1"),
    ],
)
def test_degrees_and_orders_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BadArgument, match=says):
        autopar.parallelize(built("mixed"), batches_of("mixed", 1)[0], **arguments)


def test_a_batch_with_fewer_rows_than_replicas() -> None:
    par = autopar.parallelize(built("mixed"), batches_of("mixed", 1)[0], dp=4)
    with pytest.raises(BadArgument, match=r"3 rows to split over dp = 4"):
        par.step(**batches_of("mixed", 1, rows=3)[0])


# ---- processes -----------------------------------------------------------------------------------------------


def own_rows(batch: Batch, replica: int, replicas: int) -> Batch:
    return {name: tensor.tensor_split(replicas)[replica] for name, tensor in batch.items()}


def job(cases: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One rank: per case (losses, whole parameters on rank 0); then what becomes of batches that do not fit."""
    import os

    rank = int(os.environ["RANK"])
    report: dict[str, Any] = {}
    for name, layout in cases:
        batches = batches_of(name)
        par = autopar.parallelize(built(name), own_rows(batches[0], 0, 2), **layout)
        replica = par.plan.coords(rank)["dp"]
        losses = train(lambda batch: par.step(**own_rows(batch, replica, 2)), par.parameters(), batches, eps=EPS)  # noqa: B023
        state = par.state_dict()
        report[str((name, layout))] = losses, par.full_state_dict(), {key: value.full_tensor() for key, value in state.items()}
        if layout.get("zero") == 3:
            own, whole = (sum(each.numel() for each in found) for found in ([v.to_local() for v in state.values()], state.values()))
            assert own < 0.4 * whole, "split over tp and dp"
            par.load_state_dict({key: value * 2 for key, value in state.items()})
            for key, value in par.state_dict().items():
                assert torch.equal(value.full_tensor(), 2 * state[key].full_tensor()), key
        par.close()
    name, layout = cases[0]
    batches = batches_of(name)
    par = autopar.parallelize(built(name), batches[0], **layout)
    replica = par.plan.coords(rank)["dp"]
    bad: dict[str, Callable[[Batch], Batch]] = {
        "other tokens": lambda batch: {key: value[:, : TOKENS - replica] for key, value in batch.items()},
        "no rows": lambda batch: {key: value[: 2 * (1 - replica)] for key, value in batch.items()},
        "another dtype": lambda batch: {key: value.float() if replica else value for key, value in batch.items()},
    }
    for what, change in bad.items():
        try:
            par.step(**change(batches[0]))
        except BadArgument as error:
            report[what] = str(error)
    report["goes on"] = par.step(**own_rows(batches[0], replica, 2)).item()
    report["another number of rows"] = par.step(**{key: value[: 6 - 5 * replica] for key, value in batches[0].items()}).item()
    par.close()
    return report


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixed", {"dp": 2, "pp": 2, "microbatches": 2}),
    ("gpt", {"dp": 2, "tp": 2}),
    ("mixed", {"dp": 2, "pp": 2, "microbatches": 2, "zero": 2}),
    ("gpt", {"dp": 2, "tp": 2, "zero": 3}),
]


def test_processes_train_as_one_device_does_and_refuse_batches_together() -> None:
    ranks = autopar.launch(job, 4, CASES, timeout_seconds=240)
    for name, layout in CASES:
        for rank, found in enumerate(ranks):
            losses, parameters, state = found[str((name, layout))]
            assert losses == ranks[0][str((name, layout))][0], "one loss on all ranks"
            if rank == 0:
                of_losses, of_parameters = differences(losses, parameters, name)
                assert of_losses <= LOSS_TOLERANCE
                assert of_parameters <= PARAMETER_TOLERANCE
            whole = ranks[0][str((name, layout))][1]
            assert all(torch.equal(value, whole[key]) for key, value in state.items())
    for what, says in {"other tokens": "different shapes", "no rows": "gets no data", "another dtype": "replica 1"}.items():
        texts = [found[what] for found in ranks]
        assert all(says in text for text in texts) or what == "another dtype", texts
    model, batch = built("mixed"), batches_of("mixed", 1)[0]
    expected = model_loss(model, batch).item()
    assert all(abs(found["goes on"] - expected) <= LOSS_TOLERANCE for found in ranks)
    both = {key: torch.cat([value[:6], value[:1]]) for key, value in batch.items()}
    assert all(abs(found["another number of rows"] - model_loss(model, both).item()) <= LOSS_TOLERANCE for found in ranks)


def uneasy(_: None) -> dict[str, Any]:
    """Two ranks whose processes do not do the same: what each is told, and what they begin with."""
    import os

    rank = int(os.environ["RANK"])
    batch = batches_of("mixed", 1)[0]
    found: dict[str, Any] = {}
    torch.manual_seed(rank)
    par = autopar.parallelize(MODELS["mixed"](), own_rows(batch, 0, 2), dp=2)
    found["begins with"] = next(par.parameters()).detach().clone()
    par.step(**own_rows(batch, rank, 2))
    if rank == 1:
        next(par.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    found["norm"] = par.clip_grad_norm_(1.0).item()
    par.close()

    def told(what: str, call: Callable[[], Any]) -> None:
        try:
            found[what] = call().item()
        except BadArgument as error:
            found[what] = str(error)

    par = autopar.parallelize(built("mixed"), dp=2)
    told("nothing in the first step", lambda: par.step(**(batch if rank == 0 else {})))
    told("rows of the first step", lambda: par.step(**{key: value[: 4 - rank] for key, value in batch.items()}))
    par.close()
    other = autopar.parallelize(built("mixed"), batch, dp=2, zero=rank)
    told("another plan", lambda: other.step(**batch))
    return found


def test_ranks_that_do_not_do_the_same_are_told_so_or_made_alike() -> None:
    ranks = autopar.launch(uneasy, 2, None, timeout_seconds=120)
    assert torch.equal(ranks[0]["begins with"], ranks[1]["begins with"]), "the values of the first replica"
    assert all(math.isnan(found["norm"]) for found in ranks), "a copy that is not finite is seen by all"
    assert "rank 1 cannot take part" in ranks[0]["nothing in the first step"]
    assert "cannot take these arguments" in ranks[1]["nothing in the first step"]
    assert ranks[0]["rows of the first step"] == ranks[1]["rows of the first step"]
    assert all("rank 1 cannot take part\n  because its plan is another" in found["another plan"] for found in ranks)


def lost(_: None) -> str:
    """One replica ends before its second step; the others must not wait for it."""
    import os

    batch = batches_of("mixed", 1)[0]
    par = autopar.parallelize(built("mixed"), batch, dp=2)
    par.step(**batch)
    if os.environ["RANK"] == "1":
        return "ended"
    with pytest.raises(RankFailed) as caught:
        par.step(**batch)
    return str(caught.value)


def test_a_replica_that_has_ended_is_an_error_on_the_others() -> None:
    found = autopar.launch(lost, 2, None, timeout_seconds=240)
    assert "rank 1" in found[0]

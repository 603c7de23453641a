"""Several stages a rank and split backwards: every schedule trains as one process does, to the last bit."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch
from reference import accumulate, differing, train, trained_alone, wide
from torch import Tensor, nn

import autopar
from autopar.deferred import add_deferred, deferred_linear, deferred_matmul
from autopar.program import load_program
from autopar.runtime.threads import ThreadRanks
from costmodel.errors import BadPlan, RankFailed
from passes.instructions import Backward, BackwardInput, BackwardWeight, Forward
from passes.schedules import SCHEDULES

STEPS = 20
SEVERAL = [name for name, row in SCHEDULES.items() if row.default_virtual_stages > 1]
SPLIT = [name for name, row in SCHEDULES.items() if row.splits_backward]


def assert_trains_as_one_process(model: nn.Module, batches: list[Any], count: int, **options: Any) -> autopar.ParallelModel:
    """Losses and the state after AdamW steps are the same bits."""
    par = autopar.parallelize(model, batches[0], microbatches=count, **options)
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches)
    expected, state = trained_alone(model, batches, count)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert not differing(par.full_state_dict(), state)
    return par


@pytest.mark.parametrize(
    ("tied", "schedule"),
    wide([(True, name) for name in SCHEDULES] + [(False, name) for name in SPLIT], lambda tied, name: tied or name == "zb-v"),
)
def test_twenty_steps_of_every_schedule_equal_one_process_to_the_last_bit(tied: bool, schedule: str) -> None:
    torch.manual_seed(0)
    batches = [gpt_batch(rows=8, tokens=8, seed=seed) for seed in range(STEPS)]
    model = GPT(layers=4, tied=tied)
    par = assert_trains_as_one_process(model, batches, 4, pp=2, schedule=schedule)
    row = SCHEDULES[schedule]
    assert len(par.plan.stages) == 2 * row.default_virtual_stages
    assert par.plan.stage_ranks == row.stage_ranks(2, par.plan.virtual_stages)
    assert ("deferred_linear" in par.plan.source(0)) == row.splits_backward
    par.close()


GRID = list(itertools.product(SEVERAL, (1, 2, 3, 4), (1, 3, 6)))


@pytest.mark.parametrize(
    ("schedule", "pp", "count"),
    wide(GRID, lambda schedule, pp, count: (pp, count) == ((2, 1) if schedule == "dualpipe-v" else (4, 3))),
)
def test_fewer_microbatches_than_stages_and_of_unequal_size(schedule: str, pp: int, count: int) -> None:
    """8 rows in 3 are 3, 3, 2, in 6 2, 2, 1, ...; 8 stages with one microbatch."""
    torch.manual_seed(0)
    batches = [gpt_batch(rows=8, tokens=4, seed=seed) for seed in range(2)]
    model = GPT(layers=8, dim=16)
    par = assert_trains_as_one_process(model, batches, count, pp=pp, schedule=schedule)
    loss, logits = par.eval()(**batches[0])
    with torch.no_grad():
        model.load_state_dict(par.full_state_dict())
        expected_loss, expected = model(**batches[0])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)
    par.close()


@pytest.mark.parametrize(("pp", "virtual_stages"), wide([(2, 3), (1, 2), (2, 4)], lambda pp, virtual: virtual == 3))
def test_more_stages_a_rank(pp: int, virtual_stages: int) -> None:
    torch.manual_seed(0)
    batches = [gpt_batch(rows=10, tokens=4, seed=seed) for seed in range(2)]
    options = dict(pp=pp, schedule="interleaved-1f1b", virtual_stages=virtual_stages)
    par = assert_trains_as_one_process(GPT(layers=6, dim=16), batches, 4, **options)
    assert len(par.plan.stages) == pp * virtual_stages
    par.close()


class Skips(nn.Module):
    """The first value is used again by every block, an integer goes along, an input is read late, an output is made early, a weight
    is used by the first block and the last, and what comes first is frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.shared = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.first(self.frozen(x))
        best = h.argmax(-1, keepdim=True)
        u = h
        for number, block in enumerate(self.blocks):
            u = torch.where(best > 3, F.gelu(block(u)), u * h)
            if number in (0, 3):
                u = u + self.shared(u)
        u = torch.tanh(u) * x
        return F.mse_loss(self.out(u), y), best, u


def skips_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(10, 8, generator=generator), "y": torch.randn(10, 4, generator=generator)}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_skips_late_inputs_early_outputs_and_a_weight_of_two_stages(schedule: str) -> None:
    torch.manual_seed(0)
    model = Skips()
    batches = [skips_batch(seed) for seed in range(3)]
    several = SCHEDULES[schedule].default_virtual_stages > 1
    overrides = {"cuts": ["blocks.1", "blocks.2", "blocks.3"] if several else ["blocks.2"]}
    par = assert_trains_as_one_process(model, batches, 4, pp=2, schedule=schedule, overrides=overrides)
    assert any(len(stages) > 1 for stage in par.plan.stages for stages in stage.tied.values())
    model.load_state_dict(par.full_state_dict())
    with torch.no_grad():
        expected = model(**batches[0])
    for found, wanted in zip(par.eval()(**batches[0]), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    par.close()


def test_gradients_are_added_to_what_is_there() -> None:
    torch.manual_seed(0)
    for schedule in SEVERAL:
        model, batches = GPT(layers=4, dim=16), [gpt_batch(rows=4, tokens=4, seed=seed) for seed in range(3)]
        par = autopar.parallelize(model, batches[0], pp=2, microbatches=4, schedule=schedule)
        alone = copy.deepcopy(model)
        for batch in batches:
            par.step(**batch)
            accumulate(alone, batch, 4)
        for name, parameter in alone.named_parameters():
            assert torch.equal(par._ranks().whole(name, "grad"), parameter.grad), (schedule, name)  # type: ignore[attr-defined]
        par.close()


class Counted(nn.Module):
    """Layers with statistics, and a counter that every layer reads: each stage counts for itself."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4))
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        for layer in self.layers:
            x = x + F.gelu(layer(x)) + 0.01 * self.step
        return x.square().mean()


@pytest.mark.parametrize("schedule", SEVERAL)
def test_batch_statistics_and_counters(schedule: str) -> None:
    torch.manual_seed(0)
    model = Counted()
    batches = [{"x": torch.randn(8, 8)} for _ in range(3)]
    cuts = {"cuts": [f"layers.{number}" for number in (1, 2, 3)]}
    par = assert_trains_as_one_process(model, batches, 4, pp=2, schedule=schedule, overrides=cuts)
    assert [name for cls in load_program(par.plan.source(0), "<0>").stages for name in cls.OWN_BUFFERS] == ["step"]
    par.close()


@pytest.mark.parametrize("schedule", SEVERAL)
def test_with_tensor_parallel_ranks(schedule: str) -> None:
    torch.manual_seed(0)
    report = autopar.verify(GPT(layers=4), gpt_batch(), tp=2, pp=2, schedule=schedule)
    assert report.ok, report


def test_the_norm_of_the_gradients_counts_each_once() -> None:
    torch.manual_seed(0)
    model, batch = GPT(layers=4), gpt_batch()
    par = autopar.parallelize(model, batch, pp=2, microbatches=2, schedule="zb-v")
    par.step(**batch)
    accumulate(model, batch, 2)
    expected = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(par.clip_grad_norm_(0.1), expected)
    par.close()


# ---- plans and programs -----------------------------------------------------------------------------------------


def test_a_plan_with_several_stages_a_rank_survives_a_file_and_is_proved_again(tmp_path: Any) -> None:
    model, batch = GPT(layers=4), gpt_batch()
    plan = autopar.parallelize(model, batch, pp=2, microbatches=4, schedule="zb-v").plan
    plan.save(tmp_path / "plan.json")
    loaded = autopar.Plan.load(tmp_path / "plan.json")
    assert loaded.to_json() == plan.to_json() and loaded.stage_ranks == (0, 1, 1, 0) and loaded.virtual_stages == 2
    assert loaded.source(0) == plan.source(0) and "STAGE_RANKS = (0, 1, 1, 0)" in plan.source(0)
    text = plan.to_json().replace('"stage_ranks": [\n  0,\n  1,\n  1,\n  0\n ]', '"stage_ranks": [\n  0,\n  1,\n  0,\n  1\n ]')
    assert text != plan.to_json()
    with pytest.raises(autopar.errors.AutoparError):
        autopar.Plan.from_json(text).check()
    fewer = plan.with_microbatches(3)
    assert {one.microbatch for one in fewer.instructions[0] if isinstance(one, Forward)} == {0, 1, 2}
    assert {one.chunk for one in fewer.evaluation[0] if isinstance(one, Forward)} == {0, 1}


def test_a_program_whose_stages_do_not_fit_its_ranks_is_refused() -> None:
    plan = autopar.parallelize(GPT(layers=4), gpt_batch(), pp=2, schedule="zb-v").plan
    source = plan.source(0)
    with pytest.raises(BadPlan, match="2 stages; STAGE_RANKS gives pipeline rank 0 1"):
        load_program(source.replace("(0, 1, 1, 0)", "(0, 1, 1, 1)"), "<bad>")
    with pytest.raises(BadPlan, match="no EVALUATION"):
        load_program(source.replace("EVALUATION = ", "OTHER = "), "<bad 2>")


class Many(nn.Module):
    """Linears of which some cannot put their weight gradients off."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.twice, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.table(ids))))
        x = self.plain(x) @ self.weight
        return (x @ self.table.weight.t() + F.linear(x, self.table.weight)).square().mean()


def test_which_linears_put_their_weight_gradients_off() -> None:
    """A weight that several linears of a stage use is one sum; one that something else uses is left to autograd."""
    torch.manual_seed(0)
    batches = [{"ids": torch.randint(0, 16, (6, 5))} for _ in range(4)]
    options = dict(pp=1, schedule="zb-h1", overrides=None)
    par = assert_trains_as_one_process(Many(), batches, 3, **options)
    source = par.plan.source(0)
    assert source.count('p("twice.weight"), p("twice.bias"), stage=self)') == 2
    assert 'F.linear(x_2, p("table.weight")' in source or "deferred_linear(x_2, p(\"table" not in source
    par.close()


CASES = [
    (shape, features, bias, layout)
    for shape in [(7,), (5, 16), (33, 64), (2, 3, 16), (2, 16, 64), (2, 3, 4, 16)]
    for features in (1, 24)
    for bias in (False, True)
    for layout in ("contiguous", "columns", "batch second")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("put_off", [False, True])
def test_a_deferred_linear_is_torch_s_own_to_the_last_bit(dtype: torch.dtype, put_off: bool) -> None:
    class Stage:
        deferred: Any = None

    def laid_out(value: Tensor, layout: str) -> Tensor:
        if layout == "columns" and value.ndim >= 2:
            return value.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "batch second" and value.ndim >= 3:
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return value

    for shape, features, bias, layout in CASES:
        for kind in ("linear", "matmul") if len(shape) == 2 else ("linear",):
            for gradient_layout in ("contiguous", "columns", "batch second"):
                torch.manual_seed(0)
                x = laid_out(torch.randn(shape).to(dtype), layout)
                size = (features, shape[-1]) if kind == "linear" else (shape[-1], features)
                found = [x.clone(memory_format=torch.preserve_format).requires_grad_()]
                found += [torch.randn(size).to(dtype).requires_grad_()]
                found += [torch.randn(features).to(dtype).requires_grad_()] if bias else []
                wanted = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in found]
                if kind == "linear":
                    expected = F.linear(*wanted)
                else:
                    expected = torch.addmm(wanted[2], *wanted[:2]) if bias else wanted[0] @ wanted[1]
                stage = Stage()
                y = (deferred_linear if kind == "linear" else deferred_matmul)(*found, stage=stage)  # type: ignore[arg-type]
                gradient = laid_out(torch.randn(y.shape).to(dtype), gradient_layout)
                assert torch.equal(y, expected)
                for _ in range(2):  # the second is added to the first
                    stage.deferred = [] if put_off else None
                    y.backward(gradient, retain_graph=True)
                    expected.backward(gradient, retain_graph=True)
                    if put_off:
                        assert len(stage.deferred) == 1
                        add_deferred(stage.deferred)
                case = (shape, features, bias, layout, kind, gradient_layout)
                for one, other in zip(found, wanted, strict=True):
                    assert one.grad is not None and torch.equal(one.grad, other.grad), case  # type: ignore[arg-type]


# ---- memory and failures ----------------------------------------------------------------------------------------


def test_weight_gradients_are_put_off_and_what_they_need_is_freed() -> None:
    torch.manual_seed(0)
    model, batch = GPT(layers=4), gpt_batch(rows=8)
    par = autopar.parallelize(model, batch, pp=2, microbatches=4, schedule="zb-v")
    par.step(**batch)
    worker = par._ranks()._threads._ranks[0].worker  # type: ignore[attr-defined]
    waiting: list[int] = []
    _, actions = worker._training
    for index, (text, method, argument) in enumerate(actions):

        def noted(argument: Any, method: Any = method) -> None:
            method(argument)
            flights = [flight for chunk in worker._chunks for flight in chunk._flights if flight is not None]
            waiting.append(sum(len(flight.deferred) for flight in flights))

        actions[index] = (text, noted, argument)
    par.step(**batch)
    kinds = [type(one) for one in par.plan.instructions[0]]
    assert BackwardInput in kinds and BackwardWeight in kinds
    assert max(waiting) > 0 and waiting[-1] == 0
    par.close()


def _threads_of(plan: autopar.Plan, model: nn.Module, line: str, stage: int, timeout_seconds: float) -> ThreadRanks:
    """Rank threads of a plan; `line` is run in the forward of a stage."""
    from autopar.state import local_tensors

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    programs, parameters = [], []
    for rank in range(plan.num_ranks):
        source = plan.source(rank)
        head, mark, rest = source.partition(f"class Stage{stage}(StageModule)")
        rest = rest.replace("        p = self.p\n", f"        p = self.p\n        {line}\n", 1) if mark else rest
        programs.append(load_program(head + mark + rest, f"<failing {rank} {stage} {line}>"))
        parameters.append(local_tensors(plan, rank, state, torch.device("cpu"), lambda name: True)[0])
    empty: list[dict[str, Tensor]] = [{} for _ in programs]
    return ThreadRanks(
        programs, parameters, empty, plan.mesh, plan.microbatches, timeout_seconds=timeout_seconds
    )


def test_a_rank_that_raises_or_stalls_in_a_later_stage_of_its_is_named_with_the_instruction() -> None:
    torch.manual_seed(0)
    model = GPT(layers=6, tied=False)
    batch = gpt_batch(rows=6)
    plan = autopar.parallelize(model, batch, pp=3, microbatches=3, schedule="interleaved-1f1b").plan
    ranks = _threads_of(plan, model, "if B == 2 and self.fail: raise ValueError('here')", 4, 120)
    for program in ranks._state:
        for cls in program[0].stages:
            cls.fail = False  # type: ignore[attr-defined]
    assert ranks.step(batch).isfinite()
    for program in ranks._state:
        for cls in program[0].stages:
            cls.fail = True  # type: ignore[attr-defined]
    with pytest.raises(RankFailed, match=r"rank 1 \(pp 1, tp 0\) failed in Forward\(0, chunk=1\): ValueError: here"):
        ranks.step(batch)
    ranks.close()
    ranks = _threads_of(plan, model, "import time; time.sleep(8)", 4, 2)
    with pytest.raises(RankFailed, match=r"rank 1 \(pp 1, tp 0\) does not answer; it is in Forward\(0, chunk=1\)"):
        ranks.step(batch)
    ranks.close()


# ---- compiled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "compile"),
    [
        ("1f1b", "aot_eager"),
        pytest.param("zb-v", "aot_eager", marks=pytest.mark.slow),
        *(pytest.param(schedule, True, marks=pytest.mark.slow) for schedule in SCHEDULES),
    ],
)
def test_compiled_stages(schedule: str, compile: Any) -> None:
    """aot_eager takes apart and puts together as inductor does, and runs torch's kernels; True is inductor, with kernels of its own."""
    torch.manual_seed(0)
    model, batch = GPT(layers=2 if schedule == "1f1b" else 4, dim=16), gpt_batch(rows=4, tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        par = autopar.parallelize(model, batch, pp=2, microbatches=2, schedule=schedule, compile=compile)
        for _ in range(2):
            par.zero_grad()
            loss = par.step(**batch)
    expected = accumulate(model, batch, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        found = par._ranks().whole(name, "grad")  # type: ignore[attr-defined]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)
    par.close()


def test_the_instructions_of_a_split_schedule() -> None:
    plan = autopar.parallelize(GPT(layers=4), gpt_batch(), pp=2, schedule="zb-h1").plan
    kinds = {type(one) for listed in plan.instructions for one in listed}
    assert {BackwardInput, BackwardWeight} <= kinds and plan.splits_backward
    assert Backward not in kinds or "deferred_linear" in plan.source(0)

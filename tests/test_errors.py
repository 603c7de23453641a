"""Bad input: one clear message of the right class that says what, where, why and what to use; nobody hangs."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPT, MLP, gpt_batch
from torch import Tensor, nn

import autopar
from autopar.errors import (
    AutoparError,
    BadArgument,
    BadPlan,
    CaptureError,
    DoesNotFit,
    RankFailed,
    TooManyStages,
    WorldSizeMismatch,
)  # fmt: skip


def parallelized(**options: Any) -> autopar.ParallelModel:
    return autopar.parallelize(GPT(), gpt_batch(), **options)


ARGUMENTS: list[tuple[dict[str, Any], type[AutoparError], str]] = [
    *[
        ({degree: value}, BadArgument, rf"{degree} = {value!r} is not a degree.*\n.*use a positive integer")
        for degree in ("tp", "pp", "dp")
        for value in (0, -1, True, 2.0, "two", None)
    ],
    ({"microbatches": 0}, BadArgument, r"microbatches = 0\n.*positive integer"),
    ({"microbatches": 1.5}, BadArgument, r"microbatches = 1\.5\n.*positive integer"),
    ({"microbatches": 5}, BadArgument, r"5 microbatches were asked for, and the batch has 4 rows\n.*<= 4"),
    ({"pp": 1000}, TooManyStages, r"1000.*"),
    ({"schedule": "2f2b"}, BadArgument, r"no schedule '2f2b'.*\n.*\"1f1b\""),
    ({"hardware": "abacus"}, BadArgument, r"no hardware profile 'abacus'\n.*h100-sxm"),
    ({"overrides": {"placement": {}}}, BadArgument, r"overrides has no 'placement'\n.*\"placements\""),
    ({"overrides": {"placements": {"h.9.*": 0}}}, BadArgument, r"no parameter matches.* 'h\.9\.\*'\n.*wte\.weight"),
    ({"overrides": {"cuts": ["h.9"]}, "pp": 2}, AutoparError, r"h\.9"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "says"), ARGUMENTS, ids=lambda value: repr(value)[:40])
def test_arguments_that_cannot_be(options: dict[str, Any], kind: type[AutoparError], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        parallelized(**options)


@pytest.mark.parametrize("given", [{"dp": 2}, {"zero": 1}, {"precision": "bf16"}, {"recompute": "all"}])
def test_what_is_not_built_yet_is_refused_rather_than_ignored(given: dict[str, Any]) -> None:
    try:
        par = parallelized(**given)
    except BadArgument as error:
        assert next(iter(given)) in str(error) and "use" in str(error)
    else:
        assert "dp" not in given or par.plan.mesh.get("dp") == 2


def test_things_that_are_no_model_and_no_inputs() -> None:
    with pytest.raises(BadArgument, match=r"the model is a function, not an nn\.Module"):
        autopar.parallelize(gpt_batch, gpt_batch())  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="example_inputs is a str"):
        autopar.parallelize(GPT(), "a batch")  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="forward cannot take these arguments"):
        autopar.parallelize(GPT(), {**gpt_batch(), "labels": torch.zeros(1)})


def test_a_plan_of_very_many_ranks_can_be_read_and_not_stepped() -> None:
    """128 tp x 8 pp; nothing is made for its ranks."""
    with torch.device("meta"):
        large = GPT(vocab=32768, dim=2048, heads=128, layers=8, context=256)
    batch = {name: tensor.to("meta") for name, tensor in gpt_batch(rows=32, tokens=128).items()}
    par = autopar.parallelize(large, batch, tp=128, pp=8, hardware="h100-sxm")
    assert par.plan.num_ranks == 1024 and "tp=128" in str(par.plan)
    assert "Rank 1023 of 1024" in par.plan.source(1023)
    with pytest.raises(BadArgument, match="no rank 1024"):
        par.plan.source(1024)
    with pytest.raises(DoesNotFit, match=r"(?s)1024 ranks, too many for threads of one process.*torchrun"):
        par.step(**batch)


# ---- models that cannot be captured --------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.sum() > 0:  # the line at fault
            y = -y
        return y.mean()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.inner(x)).mean()  # the line at fault


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean()  # the line at fault


def line_at_fault(model: type[nn.Module]) -> int:
    import inspect

    lines, first = inspect.getsourcelines(model)
    return first + next(index for index, line in enumerate(lines) if "the line at fault" in line)


@pytest.mark.parametrize(
    ("model", "kinds", "says"),
    [
        (Branches, CaptureError, "(?s)because"),
        (CustomFunction, CaptureError, "Doubled"),
        (Raises, AutoparError, "same reduction dim|4x4|mat1"),
    ],
)
def test_a_forward_that_cannot_be_captured(model: type[nn.Module], kinds: type[AutoparError], says: str) -> None:
    with pytest.raises(kinds, match=says) as caught:
        autopar.parallelize(model(), {"x": torch.randn(4, 4)}, pp=2)
    assert f"test_errors.py:{line_at_fault(model)}" in str(caught.value)


# ---- batches -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:autopar. programs rebuilt")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch: batch.pop("idx"), "idx"),
        (lambda batch: batch.pop("targets"), "no loss to train on"),
        (lambda batch: batch.update(extra=torch.zeros(4)), "extra"),
        (lambda batch: batch.update(idx=batch["idx"].float()), "idx.*float32"),
        (lambda batch: batch.update(idx=batch["idx"][:3]), "dim 0 of targets is 4; 3 is needed|disagree about B"),
        (lambda batch: batch.update({name: tensor[:0] for name, tensor in batch.items()}), "0 rows|B = 0"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_next_one_taken(change: Callable[[Any], Any], says: str) -> None:
    par = parallelized(tp=2, pp=2, microbatches=4)
    expected = par.step(**gpt_batch())
    batch: dict[str, Any] = gpt_batch()
    change(batch)
    with pytest.raises(BadArgument, match=says):
        par.step(**batch)
    assert torch.equal(par.step(**gpt_batch()), expected)
    par.close()


def test_a_model_without_a_loss_cannot_step_but_runs_forward() -> None:
    model = MLP()
    x = torch.randn(4, 16)
    par = autopar.parallelize(model, {"x": x}, tp=2, pp=2)
    with pytest.raises(BadArgument, match=r"(?s)no loss to train on.*loss_fn"):
        par.step(x=x)
    torch.testing.assert_close(par(x=x), model(x.clone()))
    par.close()


# ---- plan files ----------------------------------------------------------------------------------------------


@functools.cache
def split() -> autopar.Plan:
    return parallelized(tp=2, pp=2).plan


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def forget_a_backward(values: dict[str, Any]) -> None:
    listed = values["instructions"][0]
    del listed[next(index for index, item in enumerate(listed) if item[0] == "Backward")]


PLAN_FILES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: path.unlink(), "cannot read the plan"),
    (lambda path: path.write_text(path.read_text()[:-100]), "not JSON"),
    (lambda path: path.write_text("{}"), "not a plan"),
    (edited(lambda plan: plan.pop("stages")), "incomplete"),
    (edited(lambda plan: plan["stages"].pop()), "1 stages"),
    (edited(lambda plan: plan["mesh"].update(tp=0)), "tp"),
    (edited(lambda plan: plan["weights"].update({"h.0.up.weight": "128 32"})), "h.0.up.weight"),
    (edited(forget_a_backward), r"Backward|backward"),
    (edited(lambda plan: plan["stages"][1]["receives"].clear()), "not all of them receive it|but its graph takes"),
    (edited(lambda plan: plan["stages"][0]["sends"].clear()), "Gradients cannot flow back"),
    (edited(lambda plan: plan.update(microbatches=3)), "no part of its step"),
]


@pytest.mark.parametrize(("edit", "says"), PLAN_FILES)
def test_a_plan_file_that_is_wrong(tmp_path: Path, edit: Callable[[Path], Any], says: str) -> None:
    path = tmp_path / "plan.json"
    split().save(path)
    assert autopar.Plan.load(path).mesh == {"pp": 2, "tp": 2}
    edit(path)
    with pytest.raises(AutoparError, match=says) as caught:
        autopar.Plan.load(path)
    assert "plan.json" in str(caught.value)


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    plan = parallelized(tp=2, pp=2).plan
    with pytest.raises(BadPlan, match=r"(?s)belongs to another model \(.*GPT\).*names, shapes or dtypes"):
        autopar.parallelize(GPT(layers=3), gpt_batch(), plan=plan)
    with pytest.raises(BadPlan, match="made for other inputs"):
        autopar.parallelize(GPT(), {"idx": gpt_batch()["idx"]}, plan=plan)
    par = autopar.parallelize(GPT(), gpt_batch(), plan=plan)
    assert par.step(**gpt_batch()).isfinite()
    par.close()


# ---- processes -----------------------------------------------------------------------------------------------


def job(folder: str, degrees: dict[str, int], dies: int) -> None:
    """Every rank writes down what it is told; rank `dies` is killed in the third microbatch of the second step."""
    rank = int(os.environ["RANK"])
    told, started = "", time.monotonic()
    try:
        par = autopar.parallelize(GPT(), gpt_batch(), microbatches=4, **degrees)
        par.step(**gpt_batch())
        if rank == dies:
            stage, calls = par._ranks().worker._chunks[0].stage, [0]  # type: ignore[attr-defined]
            forward = stage.forward

            def dying(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return forward(*args, **kwargs)

            stage.forward = dying
        started = time.monotonic()
        for _ in range(3):
            par.step(**gpt_batch())
    except AutoparError as error:
        told = f"{type(error).__name__} {error}"
    with open(os.path.join(folder, f"{rank}.part"), "w") as file:
        file.write(json.dumps([time.monotonic() - started, told]))
    os.rename(os.path.join(folder, f"{rank}.part"), os.path.join(folder, str(rank)))
    others = int(os.environ["WORLD_SIZE"]) - (dies >= 0)
    deadline = time.monotonic() + 240
    while len([name for name in os.listdir(folder) if name.isdigit()]) < others and time.monotonic() < deadline:
        time.sleep(0.05)  # the end of one process is not what tells another


@pytest.mark.parametrize("dies", [0, 3])
def test_ranks_learn_at_once_which_rank_died_and_in_which_instruction(tmp_path: Path, dies: int) -> None:
    with pytest.raises(RankFailed, match=f"rank {dies} was killed by SIGKILL"):
        autopar.launch(job, 4, str(tmp_path), {"tp": 2, "pp": 2}, dies)
    for rank in set(range(4)) - {dies}:
        seconds, told = json.loads((tmp_path / str(rank)).read_text())
        assert told.startswith(f"RankFailed rank {dies} (pp {dies // 2}, tp {dies % 2}) died in Forward(2)"), told
        assert f"in rank {rank} (pp {rank // 2}, tp {rank % 2})" in told
        assert seconds < 200, "before the timeout of 300 seconds"


def test_ranks_that_were_launched_must_be_as_many_as_the_mesh_has(tmp_path: Path) -> None:
    autopar.launch(job, 2, str(tmp_path), {"tp": 2, "pp": 2}, -1)
    for rank in range(2):
        _, told = json.loads((tmp_path / str(rank)).read_text())
        assert told.startswith(WorldSizeMismatch.__name__)
        assert "2 ranks were launched, but pp=2 x tp=2 needs 4" in told and "torchrun --nproc-per-node 4" in told

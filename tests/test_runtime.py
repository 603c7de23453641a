"""The runtime on programs written by hand: pipelines equal to one process to the last bit, and failures that end."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autopar.program import Program, load_program
from autopar.runtime.axis import LocalAxis
from autopar.runtime.batch import BatchTypes
from autopar.runtime.buffers import Ring
from autopar.runtime.threads import ThreadRanks
from autopar.runtime.world import World, coords_of
from costmodel.errors import BadArgument, BadPlan, RankFailed, WorldSizeMismatch
from passes.instructions import RecvActivation, RecvGradient
from passes.order import order

WIDTH, CLASSES, ROWS = 8, 6, 10
HEADER = """
import torch
import torch.nn.functional as F
from autopar.program import *

MESH = {mesh}
COORDS = {coords}
BATCH = {{"x": "f32[B, T, {width}]", "labels": "i64[B, T]"}}


def loss_weights(*, labels):
    return ((labels != -100).sum(),)


"""
STEM = """
class Stage{stage}(StageModule):
    PARAMS = {{"{stage}.w": "{width} {width}", "{stage}.b": "{width}"}}
    {inputs}
    {receives}
    SENDS = {{"h": Send(to=({next},), type="f32[B, T, {width}]")}}

    def forward(self, {arguments}):
        p = self.p
        return F.gelu(F.linear(x, p("{stage}.w"), p("{stage}.b")))
"""
HEAD = """
class Stage{stage}(StageModule):
    PARAMS = {{"head.w": "{classes} {width}"}}
    INPUTS = {{"labels": "i64[B, T]"}}
    RECEIVES = {{"x": Receive(source={previous}, type="f32[B, T, {width}]")}}
    OUTPUTS = {{"loss": "f32[]", "logits": "f32[B, T, {classes}]"}}

    def forward(self, x, *, labels, loss_share):
        logits = F.linear(x, self.p("head.w"))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * loss_share
        return loss, logits
"""

Parameters = dict[str, torch.Tensor]
Reference = Callable[[Parameters, torch.Tensor, torch.Tensor], torch.Tensor]


def program(
    text: str,
    stage: int,
    num_stages: int,
    schedule: str,
    microbatches: int,
    edges: Any,
    coords: Any = None,
    mesh: Any = None,
) -> Program:
    """A program of one rank from its stage's class, with a proved schedule."""
    lists = order(schedule, num_stages, microbatches, edges)
    mesh = mesh or {"pp": num_stages, "tp": 1}
    coords = coords or {"pp": stage, "tp": 0}
    header = HEADER.format(mesh=mesh, coords=coords, width=WIDTH)
    source = f"{header}{text}\nSCHEDULE = {list(lists[stage])!r}\n"
    return load_program(source, f"<{schedule} stage {stage} of {num_stages}, {microbatches}, {abs(hash(text))}>")


def chain(num_stages: int, schedule: str, microbatches: int) -> list[Program]:
    """Linears in a row, one a stage; the last has the loss."""
    edges = [(stage, stage + 1) for stage in range(num_stages - 1)]
    texts = []
    for stage in range(num_stages - 1):
        first = stage == 0
        texts.append(
            STEM.format(
                stage=stage,
                next=stage + 1,
                width=WIDTH,
                inputs=f'INPUTS = {{"x": "f32[B, T, {WIDTH}]"}}' if first else "",
                receives="" if first else f'RECEIVES = {{"x": Receive(source={stage - 1}, type="f32[B, T, {WIDTH}]")}}',
                arguments="*, x" if first else "x",
            )
        )
    texts.append(HEAD.format(stage=num_stages - 1, previous=num_stages - 2, width=WIDTH, classes=CLASSES))
    return [program(text, stage, num_stages, schedule, microbatches, edges) for stage, text in enumerate(texts)]


def chain_parameters(num_stages: int) -> list[Parameters]:
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).div_(3).requires_grad_()

    stems: list[Parameters] = [
        {f"{stage}.w": made(WIDTH, WIDTH), f"{stage}.b": made(WIDTH)} for stage in range(num_stages - 1)
    ]
    return [*stems, {"head.w": made(CLASSES, WIDTH)}]


def chain_loss(parameters: Parameters, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    for stage in range(sum(name.endswith(".w") for name in parameters) - 1):
        x = F.gelu(F.linear(x, parameters[f"{stage}.w"], parameters[f"{stage}.b"]))
    return F.cross_entropy(F.linear(x, parameters["head.w"]).flatten(0, 1), labels.flatten())


def batch_of(rows: int = ROWS, length: int = 5, seed: int = 0, ignored: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows, length), generator=generator)
    if ignored:
        labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return {"x": torch.randn(rows, length, WIDTH, generator=generator), "labels": labels}


def copied(parameters: list[Parameters]) -> list[Parameters]:
    return [{name: tensor.detach().clone().requires_grad_() for name, tensor in part.items()} for part in parameters]


def accumulated(
    reference: Reference, parameters: Parameters, batch: Mapping[str, torch.Tensor], microbatches: int
) -> torch.Tensor:
    """One process: microbatch after microbatch, gradients added up."""
    total = None
    labels = batch["labels"].tensor_split(microbatches)
    count = sum((part != -100).sum() for part in labels)
    for x, part in zip(batch["x"].tensor_split(microbatches), labels, strict=True):
        loss = reference(parameters, x, part) * ((part != -100).sum() / count)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def trains_equally(
    programs: list[Program],
    parameters: list[Parameters],
    reference: Reference,
    microbatches: int,
    batches: list[dict[str, torch.Tensor]],
) -> None:
    """Steps of AdamW on rank threads and in one process: losses, gradients and parameters are the same bits."""
    whole: Parameters = {}
    for part in copied(parameters):
        whole.update({name: tensor for name, tensor in part.items() if name not in whole})
    ours = copied(parameters)
    ranks = ThreadRanks(programs, ours, [{} for _ in programs], programs[0].mesh, microbatches, timeout_seconds=120)
    optimizer = torch.optim.AdamW([tensor for part in ours for tensor in part.values()], lr=0.01)
    expected = torch.optim.AdamW(whole.values(), lr=0.01)
    try:
        for batch in batches:
            wanted = accumulated(reference, whole, batch, microbatches)
            assert torch.equal(ranks.step(batch), wanted)
            for part in ours:
                for name, tensor in part.items():
                    assert tensor.grad is not None and torch.equal(tensor.grad, whole[name].grad), name
            for each in (optimizer, expected):
                each.step()
                each.zero_grad()
        for part in ours:
            assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    finally:
        ranks.close()


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_pipeline_equals_one_process_to_the_last_bit(num_stages: int, schedule: str) -> None:
    batches = [batch_of(seed=seed) for seed in range(20)]
    trains_equally(chain(num_stages, schedule, 4), chain_parameters(num_stages), chain_loss, 4, batches)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_receives_are_waited_for_by_the_computes_that_need_them(schedule: str) -> None:
    """Every receive at the beginning of its list: a rank that waited for it there would wait for its own forwards."""
    programs = chain(3, schedule, 4)
    for place, each in enumerate(programs):
        received = [one for one in each.schedule if isinstance(one, (RecvActivation, RecvGradient))]
        rest = [one for one in each.schedule if one not in received]
        programs[place] = dataclasses.replace(each, schedule=(*received, *rest))
    trains_equally(programs, chain_parameters(3), chain_loss, 4, [batch_of(seed=seed) for seed in range(4)])


def test_a_receive_after_the_compute_that_needs_it_is_refused() -> None:
    programs = chain(2, "1f1b", 4)
    recv, *rest = programs[1].schedule
    assert recv == RecvActivation(0, source=0)
    programs[1] = dataclasses.replace(programs[1], schedule=(*rest, recv))
    ranks = ThreadRanks(programs, chain_parameters(2), [{}] * 2, {"pp": 2, "tp": 1}, 4, timeout_seconds=120)
    with pytest.raises(BadPlan, match=r"No compute after RecvActivation\(0, source=0\) needs what it receives"):
        ranks.step(batch_of())
    ranks.close()


@pytest.mark.parametrize("microbatches", [1, 3, 7])
def test_any_number_of_microbatches(microbatches: int) -> None:
    batches = [batch_of(seed=seed) for seed in range(4)]
    trains_equally(chain(3, "1f1b", microbatches), chain_parameters(3), chain_loss, microbatches, batches)


def test_the_shapes_may_change_from_step_to_step() -> None:
    batches = [
        batch_of(rows, length, seed)
        for seed, (rows, length) in enumerate([(10, 5), (4, 5), (8, 3), (10, 5), (9, 1), (10, 5)])
    ]
    trains_equally(chain(3, "1f1b", 4), chain_parameters(3), chain_loss, 4, batches)


def test_gradients_are_added_to_what_is_there() -> None:
    parameters, whole = chain_parameters(2), {}
    for part in copied(parameters):
        whole.update(part)
    ranks = ThreadRanks(chain(2, "1f1b", 2), parameters, [{}, {}], {"pp": 2, "tp": 1}, 2, timeout_seconds=120)
    for seed in range(3):
        ranks.step(batch_of(seed=seed))
        accumulated(chain_loss, whole, batch_of(seed=seed), 2)
    ranks.close()
    assert all(torch.equal(tensor.grad, whole[name].grad) for part in parameters for name, tensor in part.items())  # type: ignore[arg-type]


SKIP = [
    """
class Stage0(StageModule):
    PARAMS = {"a": "8 8"}
    INPUTS = {"x": "f32[B, T, 8]"}
    SENDS = {"h": Send(to=(1, 2, 3), type="f32[B, T, 8]")}

    def forward(self, *, x):
        return F.linear(x, self.p("a"))
""",
    """
class Stage1(StageModule):
    PARAMS = {"b": "8 8"}
    RECEIVES = {"h": Receive(source=0, type="f32[B, T, 8]")}
    SENDS = {"u": Send(to=(2,), type="f32[B, T, 8]")}

    def forward(self, h):
        return F.linear(h, self.p("b"))
""",
    """
class Stage2(StageModule):
    PARAMS = {"c": "8 8"}
    RECEIVES = {"u": Receive(source=1, type="f32[B, T, 8]"), "h": Receive(source=0, type="f32[B, T, 8]")}
    SENDS = {"v": Send(to=(3,), type="f32[B, T, 8]"), "flat": Send(to=(3,), type="f32[B*T, 8]"),
             "best": Send(to=(3,), type="i64[B, T]")}

    def forward(self, u, h):
        v = F.linear(u * h, self.p("c"))
        return v, v.flatten(0, 1), v.argmax(-1)
""",
    """
class Stage3(StageModule):
    PARAMS = {"d": "6 8"}
    INPUTS = {"labels": "i64[B, T]"}
    RECEIVES = {"h": Receive(source=0, type="f32[B, T, 8]"), "v": Receive(source=2, type="f32[B, T, 8]"),
                "flat": Receive(source=2, type="f32[B*T, 8]"), "best": Receive(source=2, type="i64[B, T]")}
    OUTPUTS = {"loss": "f32[]"}

    def forward(self, h, v, flat, best, *, labels, loss_share, B, T):
        mixed = F.linear(torch.where((best > 3).unsqueeze(-1), v + h, v - h) + flat.view(B, T, 8), self.p("d"))
        return F.cross_entropy(mixed.flatten(0, 1), labels.flatten()) * loss_share
""",
]


def skip_loss(p: Parameters, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    h = F.linear(x, p["a"])
    v = F.linear(F.linear(h, p["b"]) * h, p["c"])
    flat, best = v.flatten(0, 1), v.argmax(-1)
    mixed = torch.where((best > 3).unsqueeze(-1), v + h, v - h) + flat.view(v.shape)
    return F.cross_entropy(F.linear(mixed, p["d"]).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
def test_values_that_skip_stages(schedule: str) -> None:
    """One value to three stages, several values between two stages, and an integer that has no gradient."""
    edges = [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)]
    programs = [program(text, stage, 4, schedule, 4, edges) for stage, text in enumerate(SKIP)]
    generator = torch.Generator().manual_seed(2)
    sizes = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (6, 8)}
    parameters = [{name: torch.randn(size, generator=generator).requires_grad_()} for name, size in sizes.items()]
    trains_equally(programs, parameters, skip_loss, 4, [batch_of(seed=seed) for seed in range(6)])


TIED = [
    """
class Stage0(StageModule):
    PARAMS = {"table": "8 8"}
    TIED = {"table": (0, 1, 2)}
    TIED_EXACT = EXACT
    INPUTS = {"x": "f32[B, T, 8]"}
    SENDS = {"h": Send(to=(1,), type="f32[B, T, 8]")}

    def forward(self, *, x):
        return F.linear(x, self.p("table"))
""",
    """
class Stage1(StageModule):
    PARAMS = {"table": "8 8"}
    TIED = {"table": (0, 1, 2)}
    TIED_EXACT = EXACT
    RECEIVES = {"h": Receive(source=0, type="f32[B, T, 8]")}
    SENDS = {"u": Send(to=(2,), type="f32[B, T, 8]")}

    def forward(self, h):
        return F.gelu(F.linear(h, self.p("table")))
""",
    """
class Stage2(StageModule):
    PARAMS = {"table": "8 8"}
    TIED = {"table": (0, 1, 2)}
    TIED_EXACT = EXACT
    INPUTS = {"labels": "i64[B, T]"}
    RECEIVES = {"u": Receive(source=1, type="f32[B, T, 8]")}
    OUTPUTS = {"loss": "f32[]"}

    def forward(self, u, *, labels, loss_share):
        logits = F.linear(u, self.p("table"))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * loss_share
""",
]


def tied_loss(p: Parameters, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    table = p["table"]
    return F.cross_entropy(F.linear(F.gelu(F.linear(F.linear(x, table), table)), table).flatten(0, 1), labels.flatten())


def tied_programs(exact: bool) -> tuple[list[Program], list[Parameters]]:
    texts = [text.replace("= EXACT", f"= {exact}") for text in TIED]
    programs = [program(text, stage, 3, "1f1b", 4, [(0, 1), (1, 2)]) for stage, text in enumerate(texts)]
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    return programs, [{"table": table.clone().requires_grad_()} for _ in range(3)]


def test_a_tied_weight_equals_one_process_to_the_last_bit() -> None:
    programs, parameters = tied_programs(True)
    trains_equally(programs, parameters, tied_loss, 4, [batch_of(seed=seed) for seed in range(6)])


@pytest.mark.parametrize("exact", [True, False])
def test_a_tied_weight_over_steps_without_zero_grad(exact: bool) -> None:
    programs, parameters = tied_programs(exact)
    assert programs[0].stage.TIED_EXACT is exact
    whole = copied(parameters)[0]
    ranks = ThreadRanks(programs, parameters, [{}] * 3, {"pp": 3, "tp": 1}, 4, timeout_seconds=120)
    for seed in range(3):
        ranks.step(batch_of(seed=seed))
        accumulated(tied_loss, whole, batch_of(seed=seed), 4)
    ranks.close()
    for part in parameters:
        if exact:
            assert torch.equal(part["table"].grad, whole["table"].grad)  # type: ignore[arg-type]
        torch.testing.assert_close(part["table"].grad, whole["table"].grad)


TENSOR_PARALLEL = """
class CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.axis.all_reduce(gradient.contiguous()), None


class AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return axis.all_reduce(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Stage0(StageModule):
    PARAMS = {"up": "24/tp 8", "down": "8 24/tp", "scale": "8"}
    PARTIAL_GRADIENTS = ("scale",)
    INPUTS = {"x": "f32[B, T, 8]"}
    SENDS = {"h": Send(to=(1,), type="f32[B, T, 8]")}

    def forward(self, *, x):
        x = CopyTo.apply(x, self.tp) * self.p("scale")
        return AllReduce.apply(F.linear(F.gelu(F.linear(x, self.p("up"))), self.p("down")), self.tp)
"""


@pytest.mark.parametrize("tp", [2, 3])
def test_tensor_parallel_by_pipeline_parallel(tp: int) -> None:
    mesh = {"pp": 2, "tp": tp}
    generator = torch.Generator().manual_seed(4)
    whole = {
        "up": torch.randn(24, 8, generator=generator).requires_grad_(),
        "down": torch.randn(8, 24, generator=generator).requires_grad_(),
        "scale": torch.randn(8, generator=generator).requires_grad_(),
        "head.w": torch.randn(6, 8, generator=generator).requires_grad_(),
    }
    programs, parameters = [], []
    for rank in range(2 * tp):
        coords = coords_of(rank, mesh)
        text = TENSOR_PARALLEL if coords["pp"] == 0 else HEAD.format(stage=1, previous=0, width=8, classes=6)
        programs.append(program(text, coords["pp"], 2, "1f1b", 3, [(0, 1)], coords, mesh))
        dims = {"up": 0, "down": 1} if coords["pp"] == 0 else {}
        names = ["up", "down", "scale"] if coords["pp"] == 0 else ["head.w"]
        local = {
            name: whole[name].detach().chunk(tp, dims[name])[coords["tp"]] if name in dims else whole[name].detach()
            for name in names
        }
        parameters.append({name: tensor.clone().requires_grad_() for name, tensor in local.items()})

    def reference(p: Parameters, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = F.linear(F.gelu(F.linear(x * p["scale"], p["up"])), p["down"])
        return F.cross_entropy(F.linear(h, p["head.w"]).flatten(0, 1), labels.flatten())

    ranks = ThreadRanks(programs, parameters, [{}] * (2 * tp), mesh, 3, timeout_seconds=120)
    for seed in range(2):  # the second adds to the first: what is summed over tp must not be summed again
        loss = ranks.step(batch_of(seed=seed))
        torch.testing.assert_close(loss, accumulated(reference, whole, batch_of(seed=seed), 3), rtol=1e-6, atol=1e-6)
    ranks.close()
    for rank, part in enumerate(parameters):
        coord = coords_of(rank, mesh)["tp"]
        for name, tensor in part.items():
            wanted = whole[name].grad
            assert wanted is not None
            if name in ("up", "down"):
                wanted = wanted.chunk(tp, 0 if name == "up" else 1)[coord]
            torch.testing.assert_close(tensor.grad, wanted, rtol=1e-5, atol=1e-6)


def test_forward_only() -> None:
    parameters = chain_parameters(3)
    whole = {name: tensor for part in parameters for name, tensor in part.items()}
    ranks = ThreadRanks(chain(3, "1f1b", 4), parameters, [{}] * 3, {"pp": 3, "tp": 1}, 4, timeout_seconds=120)
    batch = batch_of()
    first, second, last = ranks.forward(batch)
    ranks.close()
    assert first == {} and second == {}
    with torch.no_grad():
        x = batch["x"]
        for stage in range(2):
            x = F.gelu(F.linear(x, whole[f"{stage}.w"], whole[f"{stage}.b"]))
        torch.testing.assert_close(last["logits"], F.linear(x, whole["head.w"]))
        torch.testing.assert_close(last["loss"], chain_loss(whole, batch["x"], batch["labels"]))
    assert not last["logits"].requires_grad and all(tensor.grad is None for tensor in whole.values())


def test_a_batch_of_ignored_labels_gives_nan_as_the_model_does() -> None:
    ranks = ThreadRanks(chain(2, "1f1b", 2), chain_parameters(2), [{}, {}], {"pp": 2, "tp": 1}, 2, timeout_seconds=120)
    batch = batch_of()
    batch["labels"].fill_(-100)
    assert ranks.step(batch).isnan()
    ranks.close()


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch: batch.pop("x"), "'x' is missing"),
        (lambda batch: batch.update(extra=torch.zeros(1)), "no input 'extra'"),
        (lambda batch: batch.update(x=batch["x"].double()), "'x' is float64"),
        (lambda batch: batch.update(x=batch["x"][0]), r"'x' is float32\[5, 8\]"),
        (lambda batch: batch.update(x=batch["x"][:, :, :7]), r"\[B, T, 8\]"),
        (lambda batch: batch.update(x=batch["x"][:9]), "disagree about B"),
        (lambda batch: batch.update(x=batch["x"][:3], labels=batch["labels"][:3]), "3 rows cannot be split into 4"),
        (lambda batch: batch.update(x=[1.0]), "not a tensor"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_sent(
    change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    types = BatchTypes({"x": "f32[B, T, 8]", "labels": "i64[B, T]"}, 4)
    batch = batch_of()
    assert types.layout(batch).rows == (3, 3, 2, 2)
    change(batch)
    with pytest.raises(BadArgument, match=says):
        types.layout(batch)


def test_a_refused_batch_leaves_the_ranks_usable() -> None:
    ranks = ThreadRanks(chain(2, "1f1b", 4), chain_parameters(2), [{}, {}], {"pp": 2, "tp": 1}, 4, timeout_seconds=120)
    with pytest.raises(BadArgument, match="3 rows"):
        ranks.step(batch_of(rows=3))
    assert ranks.step(batch_of()).isfinite()
    ranks.close()


def test_a_size_that_follows_from_others_is_checked() -> None:
    types = BatchTypes({"x": "f32[B, T]", "y": "f32[B, 2*T]", "table": "f32[5]"}, 2)
    fits = {"x": torch.zeros(4, 3), "y": torch.zeros(4, 6), "table": torch.zeros(5)}
    layout = types.layout(fits)
    parts = types.split(fits, layout, ("y", "table"))
    assert [part["y"].shape for part in parts] == [(2, 6), (2, 6)] and parts[1]["table"] is fits["table"]
    with pytest.raises(BadArgument, match="Dim 1 of the input 'y' is 5"):
        types.layout({**fits, "y": torch.zeros(4, 5)})
    with pytest.raises(BadArgument, match="No input has rows"):
        BatchTypes({"table": "f32[5]"}, 2).layout({"table": torch.zeros(5)})


def test_the_number_of_ranks_must_fit_the_mesh() -> None:
    with pytest.raises(WorldSizeMismatch, match="torchrun --nproc-per-node 4"):
        World.from_environment({"pp": 2, "tp": 2})


def test_text_that_is_no_program() -> None:
    with pytest.raises(BadPlan, match="no SCHEDULE"):
        load_program("from autopar.program import *\nMESH = {}\nCOORDS = {}\nclass A(StageModule): pass\n", "<a>")
    with pytest.raises(BadPlan, match="not Python"):
        load_program("MESH = {", "<b>")


# ---- parts --------------------------------------------------------------------------------------------------------


def test_a_ring_gives_a_buffer_again_only_when_nothing_refers_to_it() -> None:
    ring = Ring(torch.float32, (4,), torch.device("cpu"), depth=2)
    first = ring.take()
    address, view = first.data_ptr(), first.view(2, 2)
    del first
    second = ring.take()
    assert second.data_ptr() != address, "a view still refers to the first buffer"
    del view
    assert ring.take().data_ptr() == address
    kept = [ring.take() for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == 5 and len(ring) == 2


def test_receive_buffers_are_used_again() -> None:
    ranks = ThreadRanks(chain(2, "1f1b", 4), chain_parameters(2), [{}, {}], {"pp": 2, "tp": 1}, 4, timeout_seconds=120)
    for seed in range(5):
        ranks.step(batch_of(rows=8, seed=seed))
    workers = [rank.worker for rank in ranks._ranks]
    assert workers[0] is not None and workers[1] is not None
    tables = [chunk._ring_table for worker in workers if worker is not None for chunk in worker._chunks]
    kept = [rings for table in tables for rings in table.kept.values()]
    rings = {id(ring): ring for each in kept for listed in (*each.received, *each.gradients) for ring in listed}
    ranks.close()
    assert sorted(len(ring) for ring in rings.values()) == [2, 2], "one in use, one that is being filled"


def on_threads(mesh: dict[str, int], work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on each rank of a mesh of threads."""
    import torch.distributed as dist

    from autopar.runtime.board import Board

    num_ranks = 1
    for size in mesh.values():
        num_ranks *= size
    store, memory, results = dist.HashStore(), Board.memory(num_ranks), [None] * num_ranks

    def run(rank: int) -> None:
        world = World.in_thread(mesh, rank, store, memory, timeout_seconds=120)
        results[rank] = work(world)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (40000,), (0, 4), ()])
def test_collectives(size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def value(coord: int) -> torch.Tensor:
        return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(coord)).to(dtype)

    def work(world: World) -> list[torch.Tensor]:
        axis, coord = world.axis("tp"), world.coords["tp"]
        rows = torch.stack([value(10 * coord + other) for other in range(size)])
        source = value(size - 1) if coord == size - 1 else value(77)
        return [
            axis.all_reduce(value(coord)),
            axis.all_reduce(value(coord), "max"),
            axis.all_gather(value(coord)),
            axis.reduce_scatter(rows.clone()),
            axis.all_to_all(rows) if rows.numel() else rows,
            axis.broadcast(source, size - 1),
        ]

    results = on_threads({"pp": 1, "tp": size}, work)
    every = torch.stack([value(coord) for coord in range(size)])
    for coord, (total, largest, gathered, mine, exchanged, sent) in enumerate(results):
        assert torch.equal(total, every.sum(0).to(dtype)) and total.shape == shape
        assert torch.equal(largest, every.amax(0)) if every.numel() else True
        assert torch.equal(gathered, every)
        columns = torch.stack([value(10 * other + coord) for other in range(size)])
        assert torch.equal(mine, columns.sum(0).to(dtype))
        assert torch.equal(exchanged, columns)
        assert torch.equal(sent, value(size - 1))


def test_places_in_a_mesh() -> None:
    mesh = {"pp": 2, "dp": 3, "tp": 2}

    def work(world: World) -> tuple[Any, ...]:
        axes = [world.axis(name) for name in mesh]
        return world.coords, world.rank_of(pp=1), world.peers, tuple(axis.ranks for axis in axes)

    results = on_threads(mesh, work)
    assert results[9] == ({"pp": 1, "dp": 1, "tp": 1}, 9, (3, 9), ((3, 9), (7, 9, 11), (8, 9)))
    assert isinstance(World.from_environment({"pp": 1, "tp": 1}).axis("tp"), LocalAxis)


def test_generators_agree_where_a_value_is_whole_and_differ_where_it_is_split() -> None:
    mesh = {"pp": 2, "tp": 2}
    drawn = {}
    for rank in range(4):
        coords = coords_of(rank, mesh)
        stage = chain(2, "1f1b", 1)[coords["pp"]].stage
        tensors = {name: torch.zeros(1) for name in stage.PARAMS}
        made = stage(tensors, {}, coords, seed=5)
        drawn[rank] = [torch.rand(3, generator=made.generator(sharded)).tolist() for sharded in (False, True)]
    assert drawn[0][0] == drawn[1][0] and drawn[2][0] == drawn[3][0]
    assert len({tuple(values) for rank in range(4) for values in drawn[rank]}) == 6


# ---- failures -----------------------------------------------------------------------------------------------------


def failing(num_stages: int, stage: int, line: str) -> list[Program]:
    programs = chain(num_stages, "1f1b", 4)
    source = programs[stage].source.replace("        p = self.p\n", f"        p = self.p\n        {line}\n")
    programs[stage] = load_program(source, f"<failing {stage} {line}>")
    return programs


def test_a_rank_that_raises_ends_the_step_everywhere() -> None:
    programs = failing(4, 1, "if x.shape[0] == 2: raise ValueError('too few')")
    ranks = ThreadRanks(programs, chain_parameters(4), [{}] * 4, {"pp": 4, "tp": 1}, 4, timeout_seconds=120)
    assert ranks.step(batch_of(rows=12)).isfinite()
    with pytest.raises(
        RankFailed, match=r"rank 1 \(pp 1, tp 0\) failed in Forward\(2\): ValueError: too few"
    ) as caught:
        ranks.step(batch_of(rows=10))
    assert isinstance(caught.value.__cause__, ValueError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("autopar")]
    assert ranks.step(batch_of(rows=12)).isfinite(), "a later step starts anew"
    ranks.close()


def test_a_rank_that_stalls_is_named_by_the_others() -> None:
    """Stage 0 stalls; stage 2 only waits for stage 1, which waits for it."""
    programs = failing(3, 0, "import time; time.sleep(8 if x.shape[0] == 2 else 0)")
    ranks = ThreadRanks(programs, chain_parameters(3), [{}] * 3, {"pp": 3, "tp": 1}, 4, timeout_seconds=2)
    with pytest.raises(RankFailed, match=r"rank 0 \(pp 0, tp 0\) does not answer; it is in Forward\(2\)"):
        ranks.step(batch_of())
    ranks.close()


def test_the_traceback_shows_the_program_s_line(capsys: pytest.CaptureFixture[str]) -> None:
    import traceback

    ranks = ThreadRanks(
        failing(2, 0, "raise ValueError('here')"),
        chain_parameters(2),
        [{}] * 2,
        {"pp": 2, "tp": 1},
        4,
        timeout_seconds=120,
    )
    with pytest.raises(RankFailed) as caught:
        ranks.step(batch_of())
    assert "raise ValueError('here')" in "".join(traceback.format_exception(caught.value.__cause__))

"""CPU seconds of a training step: autopar beside torch.distributed.pipelining + DTensor's parallelize_module.

Both train the GPT of examples/train_gpt.py from the same weights on the same batches at tp x pp, in the same processes,
in turns of a few steps; each pair of neighbouring turns gives one ratio and the median of these is the result, so that
what else the machine does falls on both. CPU seconds are those of all threads of a rank (`time.process_time`), summed
over ranks. Before anything is timed, both must give the loss of the untouched model on one device, for several steps of
AdamW, or the benchmark stops with exit status 1.

The peer is written by hand the way its own documentation does it, every choice in its favour that keeps it correct:
- qkv stays one linear; its rows are put in the order of the tensor-parallel ranks, so that ColwiseParallel's contiguous
  shards hold whole heads;
- the tied embedding and head live on both end stages, their gradients are summed over the two, each rank its shard;
- the vocabulary in three ways (`--vocabulary`): `loss-parallel` (split embedding and head, DTensor's loss_parallel),
  `gathered` (split, the logits gathered before the loss), `replicated` (embedding and head whole on every rank). The
  default, `best`, times all three first and takes the cheapest;
- the mean over microbatches is in the loss, not in a division of every gradient (scale_grads), and no outputs are kept;
- AdamW is `fused=True` on both sides, the cheapest on DTensors by far.

  python tests/benchmarks/step_cpu_seconds.py                    the example's default size at tp=2 pp=2, four processes
  python tests/benchmarks/step_cpu_seconds.py --peer-only        the peer's variants alone
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tabulate import tabulate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

import autopar

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_gpt import GPT, SIZES, VOCABULARY, batches, read_text

VOCABULARIES = ("loss-parallel", "gathered", "replicated")
CHECKED_STEPS, TOLERANCE = 3, 1e-4
Batch = dict[str, torch.Tensor]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    # DTensors are a group of their own: the fused kernel takes no list of both kinds
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    groups = [{"params": group} for group in kinds.values()]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


# ---------------------------------------------------------------- the two sides


class Side(Protocol):
    """One of the two being compared. Both methods run on every rank."""

    name: str

    def step(self, batch: Batch) -> torch.Tensor | None:
        """Forward and backward of all microbatches; the whole batch's loss, at least on the last stage's ranks."""

    def update(self) -> None:
        """AdamW, and gradients set to none."""


class Autopar:
    def __init__(self, model: GPT, batch: Batch, *, tp: int, pp: int, microbatches: int):
        self.name = "autopar"
        self.par = autopar.parallelize(model, batch, tp=tp, pp=pp, microbatches=microbatches, schedule="1f1b")
        self.optimizer: torch.optim.AdamW | None = None

    def step(self, batch: Batch) -> torch.Tensor:
        return self.par.step(**batch)

    def update(self) -> None:
        if self.optimizer is None:
            self.optimizer = adamw(self.par.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()


class LocalAttention(nn.Module):
    """The example's attention on one tensor-parallel rank's heads: only the width of the split differs."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, head_width: int):
        super().__init__()
        self.qkv, self.proj, self.head_width = qkv, proj, head_width

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.head_width).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, -1))


class PeerStage(nn.Module):
    """Stage `coord` of `pp`: its share of the blocks; embeddings on the first, final norm and head on the last."""

    def __init__(self, model: GPT, *, coord: int, pp: int, tp: int):
        super().__init__()
        first, last = coord == 0, coord == pp - 1
        depth = len(model.h)
        self.wte = model.wte if first else None
        self.wpe = model.wpe if first else None
        self.h = nn.ModuleList(list(model.h)[coord * depth // pp : (coord + 1) * depth // pp])
        self.ln_f = model.ln_f if last else None
        self.head = model.head if last else None
        for block in self.h:
            attn = block.attn
            width = attn.proj.in_features
            # rows (3, tp, width / tp) -> (tp, 3, width / tp): a contiguous shard then holds q, k and v of whole heads
            with torch.no_grad():
                for parameter in (attn.qkv.weight, attn.qkv.bias):
                    rows = parameter.view(3, tp, width // tp, -1).transpose(0, 1).reshape(parameter.shape)
                    parameter.copy_(rows)
            block.attn = LocalAttention(attn.qkv, attn.proj, width // attn.heads)

    def split(self, vocabulary: str) -> dict[str, ColwiseParallel | RowwiseParallel]:
        """parallelize_module's plan of this stage: its modules by name."""
        plan: dict[str, ColwiseParallel | RowwiseParallel] = {}
        for i in range(len(self.h)):
            plan[f"h.{i}.attn.qkv"] = plan[f"h.{i}.mlp.up"] = ColwiseParallel()
            plan[f"h.{i}.attn.proj"] = plan[f"h.{i}.mlp.down"] = RowwiseParallel()
        if vocabulary != "replicated" and self.wte is not None:
            plan["wte"] = RowwiseParallel(input_layouts=Replicate())
        if vocabulary == "gathered" and self.head is not None:
            plan["head"] = ColwiseParallel(output_layouts=Replicate())
        if vocabulary == "loss-parallel" and self.head is not None:
            plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        return plan

    def forward(self, x):
        if self.wte is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.h:
            x = block(x)
        return x if self.head is None else self.head(self.ln_f(x))


class Peer:
    """torch.distributed.pipelining's 1F1B over stages whose linears parallelize_module has made DTensors."""

    def __init__(self, model: GPT, mesh: DeviceMesh, *, microbatches: int, vocabulary: str):
        self.name = f"torch, {vocabulary}"
        self.loss_parallel = vocabulary == "loss-parallel"
        self.microbatches = microbatches
        pp, tp = mesh["pp"].size(), mesh["tp"].size()
        coord = mesh["pp"].get_local_rank()
        self.first, self.last = coord == 0, coord == pp - 1
        self.module = PeerStage(copy.deepcopy(model), coord=coord, pp=pp, tp=tp)
        parallelize_module(self.module, mesh["tp"], self.module.split(vocabulary))
        stage = PipelineStage(self.module, coord, pp, torch.device("cpu"), group=mesh["pp"].get_group())
        # the loss is divided by the microbatches here: cheaper than scale_grads, which divides every gradient
        self.schedule = Schedule1F1B(stage, microbatches, loss_fn=self.loss_share, scale_grads=False)
        self.tied = end_stages_group(mesh) if pp > 1 else None
        self.optimizer = adamw(self.module.parameters())

    def loss_share(self, logits, targets):
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1)) / self.microbatches

    def step(self, batch: Batch) -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        inputs = (batch["idx"],) if self.first else ()
        with loss_parallel() if self.loss_parallel else nullcontext():
            target = batch["targets"] if self.last else None
            self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        if self.tied is not None and (self.first or self.last):
            sum_over_stages((self.module.wte if self.first else self.module.head).weight, self.tied)
        if not self.last:
            return None
        return sum(loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach() for loss in losses)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def sum_over_stages(weight: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Sums a tied parameter's gradient over the stages that hold it, each rank its own shard."""
    if isinstance(weight, DTensor):
        # DTensor gives a split embedding a whole gradient
        weight.grad = weight.grad.redistribute(placements=weight.placements)
        dist.all_reduce(weight.grad.to_local(), group=group)
    else:
        dist.all_reduce(weight.grad, group=group)


def end_stages_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of the first and the last stage's ranks at this rank's tp coordinate. Called by all: it creates all."""
    mine = None
    for coord, column in enumerate(mesh.mesh.T.tolist()):
        group = dist.new_group([column[0], column[-1]])
        if coord == mesh["tp"].get_local_rank() and dist.get_rank() in (column[0], column[-1]):
            mine = group
    return mine


# ---------------------------------------------------------------- correctness, then time


def check(sides: list[Side], model: GPT, data: list[Batch]) -> list[tuple[str, float]]:
    """(name, largest difference of the loss from the untouched one over `data`), of each side; with AdamW."""
    last_rank = dist.get_world_size() - 1
    expected: list[float] = []
    if dist.get_rank() == last_rank:
        reference = copy.deepcopy(model)
        optimizer = adamw(reference.parameters())
        for batch in data:
            loss = reference(**batch)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    differences = []
    for side in sides:
        worst = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(data):
            loss = side.step(batch)
            side.update()
            if expected:
                worst = torch.maximum(worst, (loss.double() - expected[i]).abs())
        dist.broadcast(worst, last_rank)
        differences.append((side.name, worst.item()))
    return differences


class Turn(NamedTuple):
    """Seconds of one training step, the mean of a turn: CPU summed over ranks, wall of the slowest rank."""

    step_cpu_seconds: float
    update_cpu_seconds: float
    wall_seconds: float

    @property
    def cpu_seconds(self) -> float:
        return self.step_cpu_seconds + self.update_cpu_seconds


def take_turn(side: Side, batch: Batch, num_steps: int) -> Turn:
    dist.barrier()
    start = time.perf_counter()
    step_cpu = update_cpu = 0.0
    for _ in range(num_steps):
        before = time.process_time()
        side.step(batch)
        between = time.process_time()
        side.update()
        step_cpu += between - before
        update_cpu += time.process_time() - between
    wall = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    cpu = torch.tensor([step_cpu, update_cpu], dtype=torch.float64)
    dist.all_reduce(cpu)
    dist.all_reduce(wall, dist.ReduceOp.MAX)
    return Turn(*(cpu / num_steps).tolist(), wall.item() / num_steps)


def take_turns(sides: list[Side], batch: Batch, *, num_turns: int, num_steps: int) -> dict[str, list[Turn]]:
    """The turns of each side by name. Whoever went last begins the next round: neither always follows the other."""
    turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
    for i in range(num_turns):
        for side in sides if i % 2 == 0 else reversed(sides):
            turns[side.name].append(take_turn(side, batch, num_steps))
    return turns


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def benchmark(args: argparse.Namespace) -> dict:
    """Runs on every rank; the same result on each."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    size = SIZES[args.size]
    width, depth, heads = args.hidden or size.width, args.layers or size.depth, args.heads or size.heads
    seq = args.seq or size.seq
    torch.manual_seed(0)
    model = GPT(width, depth, heads, seq)
    source = batches(read_text(1_000_000)[0], args.batch, seq, seed=0)
    data = [next(source) for _ in range(CHECKED_STEPS)]

    mesh = init_device_mesh("cpu", (args.pp, args.tp), mesh_dim_names=("pp", "tp"))
    vocabularies = VOCABULARIES if args.vocabulary == "best" else (args.vocabulary,)
    sides: list[Side] = [Peer(model, mesh, microbatches=args.microbatches, vocabulary=v) for v in vocabularies]
    if not args.peer_only:
        sides.append(Autopar(model, data[0], tp=args.tp, pp=args.pp, microbatches=args.microbatches))
    differences = check(sides, model, data)
    num_parameters = sum(p.numel() for p in model.parameters())
    result: dict = {
        "model": f"GPT of {num_parameters / 1e6:.1f} M parameters, tp={args.tp} pp={args.pp}, "
        f"{args.microbatches} microbatches of {args.batch // args.microbatches} x {seq}",
        "loss_differences": dict(differences),
        "correct": all(difference <= TOLERANCE for _, difference in differences),
    }
    if not result["correct"]:
        return result

    peers = [side for side in sides if isinstance(side, Peer)]
    take_turns(sides, data[0], num_turns=1, num_steps=args.warm_up)
    if len(peers) > 1 and not args.peer_only:
        rehearsal = take_turns(peers, data[0], num_turns=4, num_steps=args.steps)
        best = min(peers, key=lambda side: median(turn.cpu_seconds for turn in rehearsal[side.name]))
        sides = [best, sides[-1]]
    turns = take_turns(sides, data[0], num_turns=args.turns, num_steps=args.steps)
    result["rows"] = [
        {
            "name": side.name,
            "cpu_seconds": median(turn.cpu_seconds for turn in turns[side.name]),
            "of_which_optimizer": median(turn.update_cpu_seconds for turn in turns[side.name]),
            "wall_seconds": median(turn.wall_seconds for turn in turns[side.name]),
        }
        for side in sides
    ]
    if not args.peer_only:
        pairs = list(zip(turns[sides[1].name], turns[sides[0].name], strict=True))
        for what in ("cpu_seconds", "step_cpu_seconds", "wall_seconds"):
            ratios = sorted(getattr(ours, what) / getattr(theirs, what) for ours, theirs in pairs)
            result[f"{what}_ratio"] = {"median": median(ratios), "least": ratios[0], "most": ratios[-1]}
    return result


def report(result: dict) -> str:
    lines = [result["model"], "", tabulate(
        [(name, f"{difference:.1e}") for name, difference in result["loss_differences"].items()],
        headers=["", f"loss differs from one device by ({TOLERANCE:.0e} allowed)"],
    )]  # fmt: skip
    if not result["correct"]:
        return "\n".join([*lines, "", "NOT CORRECT: nothing was timed"])
    rows = [
        (row["name"], *(f"{row[key] * 1e3:.1f}" for key in ("cpu_seconds", "of_which_optimizer", "wall_seconds")))
        for row in result["rows"]
    ]
    headers = ["milliseconds a step (median)", "CPU, all ranks", "of which AdamW", "wall"]
    lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
    names = {"cpu_seconds": "CPU", "step_cpu_seconds": "CPU without AdamW", "wall_seconds": "wall"}
    ratios = [
        (f"autopar / torch, {name}", *(f"{result[f'{what}_ratio'][key]:.2f}" for key in ("median", "least", "most")))
        for what, name in names.items()
        if f"{what}_ratio" in result
    ]
    if ratios:
        headers = ["ratio of neighbouring turns", "median", "least", "most"]
        lines += ["", tabulate(ratios, headers=headers, disable_numparse=True)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default 16)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of examples/train_gpt.py (default small)")
    parser.add_argument("--hidden", type=int, help="another width")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--heads", type=int, help="another number of heads")
    parser.add_argument("--seq", type=int, help="another sequence length")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn (default 5)")
    parser.add_argument("--turns", type=int, default=20, help="turns of each side (default 20)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before anything is timed (default 5)")
    parser.add_argument("--vocabulary", choices=("best", *VOCABULARIES), default="best", help="the peer's")
    parser.add_argument("--peer-only", action="store_true", help="time the peer's variants alone")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    if args.batch % args.microbatches:
        # the peer's loss is the mean of its microbatches' means
        parser.error(f"--batch {args.batch} is no multiple of --microbatches {args.microbatches}")
    result = autopar.launch(functools.partial(benchmark, args), args.tp * args.pp)[0]
    print(json.dumps(result, indent=2) if args.json else report(result))
    return 0 if result["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Pipeline schedules side by side: autopar beside torch.distributed.pipelining, the same GPT, the same processes, in turns.

For every schedule that both have (1f1b, gpipe, interleaved with two stages a rank, zb-v), every number of ranks,
microbatches and width that is asked for. Each pair of neighbouring turns gives one ratio; the median of these is the
result. CPU seconds are those of all threads of a rank (`time.process_time`) in forward, backward and transfers of a
step, summed over ranks; there is no optimizer in them. Before anything is timed both sides must give the loss and the
gradients of the untouched model on one device, or the benchmark stops with exit status 1.

The peer is written by hand as its documentation does it, every choice in its favour: blocks divided evenly over its
stages, the mean over microbatches in the loss and not in a division of every gradient, no outputs kept.

`--replay` measures what the runtime adds: one recorded step's compute times, as they were on every stage, are played
through the simulator without any transfer or bookkeeping time; the step's wall time over that is the overhead. It means
something only where every rank has a core of its own.

  python tests/benchmarks/pipeline.py                                     all of it: about 25 minutes on two cores
  python tests/benchmarks/pipeline.py --pp 2 --microbatches 4 --hidden 256 --schedules 1f1b,zb-v
  python tests/benchmarks/pipeline.py --replay --pp 2
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tabulate import tabulate
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

import autopar

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import GPT, gpt_batch

VOCABULARY, LAYERS, HEADS = 256, 8, 8
TOLERANCE = 1e-5  # of the loss and of gradients, relative
Batch = dict[str, torch.Tensor]


class Peers(NamedTuple):
    """What torch calls a schedule of ours, its stages a rank, and the ratio of CPU seconds that autopar asks of itself."""

    kind: type
    virtual_stages: int
    asked: float


PEERS = {
    "1f1b": Peers(Schedule1F1B, 1, 1.00),
    "gpipe": Peers(ScheduleGPipe, 1, 1.00),
    "interleaved-1f1b": Peers(ScheduleInterleaved1F1B, 2, 0.95),
    "zb-v": Peers(ScheduleZBVZeroBubble, 2, 0.90),
}


class Case(NamedTuple):
    """One comparison."""

    schedule: str
    pp: int
    microbatches: int
    hidden: int


class Side(Protocol):
    """One of the two being compared. All methods run on every rank."""

    name: str

    def step(self, batch: Batch) -> torch.Tensor | None:
        """Forward and backward of all microbatches; the whole batch's loss, at least on the rank that has it."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's, by the model's names."""

    def clear(self) -> None:
        """Gradients set to none."""


class Autopar:
    """autopar.parallelize."""

    def __init__(self, model: GPT, batch: Batch, case: Case):
        self.name = "autopar"
        virtual = PEERS[case.schedule].virtual_stages
        options = {} if virtual == 1 else {"virtual_stages": virtual}
        self.par = autopar.parallelize(
            model, batch, pp=case.pp, microbatches=case.microbatches, schedule=case.schedule, **options
        )

    def step(self, batch: Batch) -> torch.Tensor:
        return self.par.step(**batch)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad for name, parameter in self.par.named_parameters()}

    def clear(self) -> None:
        self.par.zero_grad()


class PeerStage(nn.Module):
    """Stage `index` of `num_stages`: its share of the blocks; embeddings on the first, final norm and head on the last."""

    def __init__(self, model: GPT, index: int, num_stages: int):
        super().__init__()
        first, last, depth = index == 0, index == num_stages - 1, len(model.h)
        self.wte, self.wpe = (model.wte, model.wpe) if first else (None, None)
        blocks = range(index * depth // num_stages, (index + 1) * depth // num_stages)
        self.h = nn.ModuleDict({str(i): model.h[i] for i in blocks})
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, x):
        if self.wte is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.h.values():
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


class Peer:
    """torch.distributed.pipelining."""

    def __init__(self, model: GPT, case: Case, group: dist.ProcessGroup):
        self.name, self.microbatches = "torch", case.microbatches
        kind, virtual, _ = PEERS[case.schedule]
        rank, num_stages = dist.get_rank(group), case.pp * virtual
        mine = (
            [rank]
            if virtual == 1
            else [rank, rank + case.pp]
            if kind is not ScheduleZBVZeroBubble
            else [rank, num_stages - 1 - rank]
        )
        self.modules = [PeerStage(model, index, num_stages) for index in mine]
        stages = [
            PipelineStage(module, index, num_stages, torch.device("cpu"), group=group)
            for module, index in zip(self.modules, mine, strict=True)
        ]
        self.first, self.last = 0 in mine, num_stages - 1 in mine
        # the loss is divided by the microbatches here: cheaper than scale_grads, which divides every gradient
        self.schedule = kind(
            stages[0] if virtual == 1 else stages, case.microbatches, loss_fn=self.loss_share, scale_grads=False
        )

    def loss_share(self, logits, targets):
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1)) / self.microbatches

    def step(self, batch: Batch) -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        inputs = (batch["idx"],) if self.first else ()
        target = batch["targets"] if self.last else None
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.last else None

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad for module in self.modules for name, parameter in module.named_parameters()}

    def clear(self) -> None:
        for module in self.modules:
            module.zero_grad()


# ---------------------------------------------------------------- correctness, then time


def difference(sides: list[Side], model: GPT, batch: Batch) -> dict[str, float]:
    """By side: the largest relative difference of the loss or a gradient from the untouched model's, over all ranks."""
    reference = copy.deepcopy(model)
    expected = reference(**batch)[0]
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = {}
    for side in sides:
        loss = side.step(batch)
        worst = 0.0 if loss is None else abs(loss.item() / expected.item() - 1)
        for name, gradient in side.gradients().items():
            worst = max(worst, ((gradient - gradients[name]).abs().max() / gradients[name].abs().max()).item())
        side.clear()
        everywhere = torch.tensor(worst, dtype=torch.float64)
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
        found[side.name] = everywhere.item()
    return found


class Turn(NamedTuple):
    """Seconds of one step, the mean of a turn: CPU summed over ranks, wall of the slowest rank."""

    cpu_seconds: float
    wall_seconds: float


def take_turn(side: Side, batch: Batch, num_steps: int) -> Turn:
    dist.barrier()
    cpu, start = 0.0, time.perf_counter()
    for _ in range(num_steps):
        before = time.process_time()
        side.step(batch)
        cpu += time.process_time() - before
        side.clear()
    both = torch.tensor([cpu, time.perf_counter() - start], dtype=torch.float64) / num_steps
    dist.all_reduce(both[:1])
    dist.all_reduce(both[1:], dist.ReduceOp.MAX)
    return Turn(*both.tolist())


def make(case: Case, args: argparse.Namespace) -> tuple[GPT, Batch]:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, case.hidden, HEADS, LAYERS, args.seq, tied=False)
    return model, gpt_batch(case.microbatches * args.rows, args.seq, VOCABULARY)


def compare(case: Case, args: argparse.Namespace) -> dict:
    """One row of the table; runs on every rank, the same result on each."""
    model, batch = make(case, args)
    sides: list[Side] = [Autopar(model, batch, case), Peer(copy.deepcopy(model), case, dist.group.WORLD)]
    differences = difference(sides, model, batch)
    row: dict = {**case._asdict(), "differences": differences, "correct": max(differences.values()) <= TOLERANCE}
    if not row["correct"]:
        return row
    turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
    for i in range(args.turns):
        # whoever went last begins the next round: neither always follows the other
        for side in sides if i % 2 == 0 else reversed(sides):
            turns[side.name].append(take_turn(side, batch, args.steps))
    for what in Turn._fields:
        ratios = sorted(
            getattr(a, what) / getattr(b, what) for a, b in zip(turns["autopar"], turns["torch"], strict=True)
        )
        row[what] = {name: statistics.median(getattr(turn, what) for turn in taken) for name, taken in turns.items()}
        row[f"{what}_ratio"] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    return row


def replay(case: Case, args: argparse.Namespace) -> dict:
    """Wall seconds of recorded steps beside what the simulator makes of the same steps' compute times."""
    model, batch = make(case, args)
    side = Autopar(model, batch, case)
    ratios, walls, replays = [], [], []
    for _ in range(args.turns + 1):
        dist.barrier()
        profile = side.par.profile_step(**batch)
        side.clear()
        walls.append(profile.step_seconds)
        replays.append(profile.replayed_seconds)
        ratios.append(walls[-1] / replays[-1])
    ratios = sorted(ratios[1:])
    return {
        **case._asdict(), "correct": True, "wall_seconds": statistics.median(walls[1:]),
        "replayed_seconds": statistics.median(replays[1:]),
        "ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
    }  # fmt: skip


def on_rank(cases: list[Case], args: argparse.Namespace, quiet: bool) -> list[dict]:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rows = []
    for case in cases:
        rows.append((replay if args.replay else compare)(case, args))
        if dist.get_rank() == 0 and not quiet:
            print(line(rows[-1], args), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------- the table


def name(case: dict) -> str:
    return f"{case['schedule']} pp={case['pp']} m={case['microbatches']} hidden={case['hidden']}"


def line(row: dict, args: argparse.Namespace) -> str:
    if not row["correct"]:
        return f"{name(row)}: NOT CORRECT {row['differences']}"
    if args.replay:
        return f"{name(row)}: wall / replay {row['ratio']['median']:.3f}"
    return f"{name(row)}: CPU {row['cpu_seconds_ratio']['median']:.3f}, wall {row['wall_seconds_ratio']['median']:.3f}"


def table(rows: list[dict], args: argparse.Namespace) -> str:
    cells: list[tuple] = []
    for row in rows:
        case = (row["schedule"], row["pp"], row["microbatches"], row["hidden"])
        if not row["correct"]:
            cells.append((*case, "NOT CORRECT"))
        elif args.replay:
            spread = f"{row['ratio']['least']:.3f} to {row['ratio']['most']:.3f}"
            times = (f"{row['wall_seconds'] * 1e3:.1f}", f"{row['replayed_seconds'] * 1e3:.1f}")
            cells.append((*case, *times, f"{row['ratio']['median']:.3f}", spread))
        else:
            cpu, wall = row["cpu_seconds_ratio"], row["wall_seconds_ratio"]
            cells.append((
                *case, *(f"{row['cpu_seconds'][side] * 1e3:.1f}" for side in ("autopar", "torch")), f"{cpu['median']:.3f}",
                f"{cpu['least']:.2f} to {cpu['most']:.2f}", f"{PEERS[row['schedule']].asked:.2f}", f"{wall['median']:.3f}",
            ))  # fmt: skip
    headers = ["schedule", "pp", "m", "hidden"]
    headers += (
        ["wall ms", "replay ms", "wall / replay", "spread"]
        if args.replay
        else ["CPU ms autopar", "CPU ms torch", "CPU ratio", "spread", "asked", "wall ratio"]
    )
    return tabulate(cells, headers=headers, disable_numparse=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for hidden in args.hidden:
        for pp in args.pp:
            for microbatches in args.microbatches:
                for schedule in args.schedules.split(","):
                    yield Case(schedule, pp, microbatches, hidden)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--pp", type=numbers, default=[2, 4], help="ranks (default 2,4)")
    parser.add_argument("--microbatches", type=numbers, default=[4, 8, 16], help="(default 4,8,16)")
    parser.add_argument(
        "--hidden", type=numbers, default=[256, 512], help=f"width of the {LAYERS} blocks (default 256,512)"
    )
    parser.add_argument("--rows", type=int, default=1, help="sequences of a microbatch (default 1)")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a sequence (default 64)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--replay", action="store_true", help="wall time over the replay of the measured compute times")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    unknown = set(args.schedules.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"--schedules {', '.join(sorted(unknown))}: use {', '.join(PEERS)}")
    rows: list[dict] = []
    for pp in args.pp:
        listed = [case for case in cases(args) if case.pp == pp]
        rows += autopar.launch(functools.partial(on_rank, listed, args, args.json), pp)[0]
    print(json.dumps(rows, indent=2) if args.json else table(rows, args))
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

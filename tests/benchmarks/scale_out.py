"""CPU seconds and memory of a data-parallel step: autopar beside torch's DDP, FSDP2, and FSDP2 over DTensor's tensor parallelism.

All train the GPT of examples/train_gpt.py from the same weights on the same batches, in the same processes, in turns of a few steps;
each pair of neighbouring turns gives one ratio and the median of these is the result (`step_cpu_seconds.py` says how). Before anything is
timed, both must give the loss of the untouched model on one device, for several steps of AdamW (fused on both sides).

  ddp       dp=2 beside DistributedDataParallel, gradients as views of its buckets
  fsdp      dp=2 zero=3 beside `fully_shard` of each block and of the whole
  fsdp-tp   tp=2 dp=2 zero=3 beside `fully_shard` over `parallelize_module`, embedding and head replicated over tp

Memory: each side alone in fresh processes, the most resident bytes (VmHWM, started anew after warm-up) over what the process had when it
had the whole model and had stepped a tiny one, so that code that is loaded counts on neither side, and had given back what it
had free; the largest of the ranks, and the median of `--memory-runs`, which differ by some megabytes. autopar's has its plan in it,
whose few megabytes are the same for a small model and a large one of as many layers.

  python tests/benchmarks/scale_out.py [ddp fsdp fsdp-tp]
  python tests/benchmarks/scale_out.py --size medium --batch 4 --turns 2
"""

import argparse
import copy
import ctypes
import functools
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_cpu_seconds import TOLERANCE, Batch, PeerStage, adamw, check, median, take_turns
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import autopar

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_gpt import GPT, SIZES, VOCABULARY, batches, read_text

CASES: dict[str, dict[str, int]] = {
    "ddp": {"dp": 2, "tp": 1, "zero": 0}, "fsdp": {"dp": 2, "tp": 1, "zero": 3}, "fsdp-tp": {"dp": 2, "tp": 2, "zero": 3},
}  # fmt: skip
WANTED = {"ddp": 1.02, "fsdp": 1.02, "fsdp-tp": 0.8}  # at most, of the peer's CPU seconds


class _Side:
    """A way to train on this replica's rows of a batch."""

    name: str
    optimizer: torch.optim.AdamW

    def __init__(self, dp: int, tp: int) -> None:
        self.replica, self.replicas = dist.get_rank() // tp, dp

    def rows(self, batch: Batch) -> Batch:
        return {name: tensor.tensor_split(self.replicas)[self.replica] for name, tensor in batch.items()}

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Autopar(_Side):
    name = "autopar"

    def __init__(self, model: GPT, batch: Batch, *, dp: int, tp: int, zero: int) -> None:
        super().__init__(dp, tp)
        self.par = autopar.parallelize(model, self.rows(batch), dp=dp, tp=tp, zero=zero, microbatches=1)
        self.optimizer = adamw(self.par.parameters())

    def step(self, batch: Batch) -> torch.Tensor:
        return self.par.step(**self.rows(batch))


class Torch(_Side):
    """DDP, or FSDP2 with or without tensor parallelism. The loss it gives back is the mean over replicas, as autopar's is."""

    name = "torch"

    def __init__(self, model: GPT, batch: Batch, *, dp: int, tp: int, zero: int) -> None:
        super().__init__(dp, tp)
        model = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        self.group = mesh["dp"].get_group()
        self.module: nn.Module = model
        if tp > 1:
            self.module = PeerStage(model, coord=0, pp=1, tp=tp)
            parallelize_module(self.module, mesh["tp"], self.module.split("replicated"))
        if zero == 0:
            self.module = DistributedDataParallel(self.module, process_group=self.group, gradient_as_bucket_view=True)
        else:
            for block in self.module.h:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(self.module, mesh=mesh["dp"])
        self.optimizer = adamw(self.module.parameters())

    def step(self, batch: Batch) -> torch.Tensor:
        rows = self.rows(batch)
        if isinstance(self.module, PeerStage):
            logits = self.module(rows["idx"])
            loss = nn.functional.cross_entropy(logits.view(-1, VOCABULARY), rows["targets"].view(-1))
        else:
            loss = self.module(**rows)[0]
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.replicas


def _built(args: argparse.Namespace) -> tuple[GPT, list[Batch]]:
    size = SIZES[args.size]
    torch.manual_seed(0)
    source = batches(read_text(1_000_000)[0], args.batch, size.seq, seed=0)
    return GPT(size.width, size.depth, size.heads, size.seq), [next(source) for _ in range(3)]


def _begin() -> None:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def timed(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """On every rank; the same result on each."""
    _begin()
    model, data = _built(args)
    sides = [Torch(model, data[0], **CASES[case]), Autopar(model, data[0], **CASES[case])]
    result: dict[str, Any] = {"loss_differences": dict(check(sides, model, data))}
    result["correct"] = all(difference <= TOLERANCE for difference in result["loss_differences"].values())
    if result["correct"]:
        take_turns(sides, data[0], num_turns=1, num_steps=args.steps)
        turns = take_turns(sides, data[0], num_turns=args.turns, num_steps=args.steps)
        pairs = list(zip(turns["autopar"], turns["torch"], strict=True))
        result |= {side: median(turn.cpu_seconds for turn in turns[side]) for side in turns}
        result["ratio"] = median(ours.cpu_seconds / theirs.cpu_seconds for ours, theirs in pairs)
        result["wall_ratio"] = median(ours.wall_seconds / theirs.wall_seconds for ours, theirs in pairs)
    return result


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def resident_bytes(args: argparse.Namespace, case: str, kind: type[Autopar] | type[Torch]) -> int:
    """The most that one side takes on this rank in a step."""
    _begin()
    model, data = _built(args)
    torch.manual_seed(0)
    tiny = kind(GPT(16, 2, 2, SIZES[args.size].seq), data[0], **CASES[case])
    tiny.step(data[0])
    del tiny
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if give_back is not None:
        give_back(0)
    before = _status("VmRSS")
    side = kind(model, data[0], **CASES[case])
    del model
    for index in range(6):
        if index == 3:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        side.step(data[0])
        side.update()
    return _status("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)} (default all)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, of all replicas (default 16)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of examples/train_gpt.py (default small)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn (default 5)")
    parser.add_argument("--turns", type=int, default=12, help="turns of each side (default 12)")
    parser.add_argument("--memory-runs", type=int, default=3, help="of each side, for the median (default 3)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}: one of {', '.join(CASES)}")
    results: dict[str, dict[str, Any]] = {}
    for case in args.cases:
        ranks = CASES[case]["dp"] * CASES[case]["tp"]
        results[case] = autopar.launch(functools.partial(timed, args), ranks, case)[0]
        for kind in (Torch, Autopar):
            runs = [max(autopar.launch(functools.partial(resident_bytes, args), ranks, case, kind)) for _ in range(args.memory_runs)]
            results[case][f"{kind.name}_bytes"] = median(runs)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(tabulate(
            [
                (
                    case, max(found["loss_differences"].values()), found.get("torch", 0.0) * 1e3, found.get("autopar", 0.0) * 1e3,
                    found.get("ratio"), WANTED[case], found.get("wall_ratio"), found["torch_bytes"] / 1e6, found["autopar_bytes"] / 1e6,
                )
                for case, found in results.items()
            ],
            headers=["", "loss off by", "torch CPU ms", "autopar CPU ms", "ratio", "wanted", "wall ratio", "torch MB", "autopar MB"],
            floatfmt=("", ".0e", ".1f", ".1f", ".3f", ".2f", ".2f", ".1f", ".1f"),
        ))  # fmt: skip
    return 0 if all(found["correct"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

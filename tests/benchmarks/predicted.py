"""Predicted against measured on this machine: step time and peak memory of the example GPT, with the calibrated profile.

    OMP_NUM_THREADS=1 python tests/benchmarks/predicted.py [--profile FILE] [--size small] [--rows 16]

Measures the profile first (`autopar calibrate`) unless one is given. Then for (tp, pp) = (1, 1), (2, 1), (1, 2): the plan's step time
without the optimizer beside the median of measured steps, ranks as threads with one intra-op thread each, the layouts in turns; and the
plan's peak memory beside what a rank's ops allocate in a step, counted storage by storage, with its state.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import train_gpt  # noqa: E402
from test_memory import measured_peaks  # noqa: E402

import autopar  # noqa: E402
from autopar.calibrate import calibrate  # noqa: E402
from costmodel.hardware import Hardware  # noqa: E402
from costmodel.memory import optimizer_seconds  # noqa: E402

LAYOUTS = ((1, 1), (2, 1), (1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--size", default="small", choices=train_gpt.SIZES)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    profile = Hardware.from_json(arguments.profile.read_text()) if arguments.profile else calibrate("cpu")
    size = train_gpt.SIZES[arguments.size]
    torch.manual_seed(0)
    model = train_gpt.GPT(size.width, size.depth, size.heads, size.seq)
    batch = {
        name: torch.randint(0, train_gpt.VOCABULARY, (arguments.rows, size.seq)) for name in ("idx", "targets")
    }
    jobs = [autopar.parallelize(model, batch, tp=tp, pp=pp, hardware=profile) for tp, pp in LAYOUTS]
    times: list[list[float]] = [[] for _ in jobs]
    for step in range(arguments.steps + 3):
        for job, found in zip(jobs, times, strict=True):
            job.zero_grad()
            gc.collect()
            begin = time.perf_counter()
            job.step(**batch)
            if step >= 3:
                found.append(time.perf_counter() - begin)
    print(f"{profile.name}; {arguments.size} GPT, {arguments.rows} rows of {size.seq} tokens; step without optimizer")
    print(" tp  pp  predicted ms  measured ms    error  predicted MiB  measured MiB    error")
    for (tp, pp), job, found in zip(LAYOUTS, jobs, times, strict=True):
        plan = job.plan
        numel = max(sum(s.cost.parameter_count for s in plan.stages if plan.stage_ranks[s.index] == rank) for rank in range(pp))
        predicted = plan.predicted.step_seconds - float(optimizer_seconds(numel, profile.for_ranks(tp * pp)))
        measured = statistics.median(found)
        peak = max(measured_peaks(job, batch, pytest.MonkeyPatch()).values())
        print(
            f"{tp:>3} {pp:>3} {predicted * 1e3:>13.1f} {measured * 1e3:>12.1f} {predicted / measured - 1:>+8.1%} "
            f"{plan.predicted.peak_bytes / 2**20:>14.1f} {peak / 2**20:>13.1f} {plan.predicted.peak_bytes / peak - 1:>+8.1%}"
        )


if __name__ == "__main__":
    main()

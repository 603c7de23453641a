"""`autopar calibrate`: this machine as a hardware profile."""

from __future__ import annotations

import argparse
from pathlib import Path

from autopar.calibrate import calibrate
from autopar.cli_options import DONE, Progress, check_writable
from costmodel.errors import BadArgument


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="write the profile (JSON); `--hardware FILE` takes it (default: print it)")
    parser.add_argument("--name", metavar="NAME", help="the profile's name (default: what was measured, and when)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to measure (default: a GPU where there is one)")


def run_calibrate(arguments: argparse.Namespace, progress: Progress) -> int:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("there is no CUDA device here", use="--device cpu")
    if arguments.out is not None:
        check_writable(arguments.out)
    profile = calibrate(arguments.device, name=arguments.name, progress=lambda text: progress(f"measuring {text}"))
    progress.end()
    if arguments.out is None:
        print(profile.to_json(), end="")
        return DONE
    Path(arguments.out).write_text(profile.to_json(), encoding="utf-8")
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in profile.peak_flops.items())
    print(
        f"{arguments.out}: {profile.name}\n"
        f"  matrix products, GFLOP/s: {rates} (typical: {profile.matmul_efficiency:.0%} of it in f32)\n"
        f"  memory: {profile.memory_bandwidth_bytes_per_second / 1e9:.1f} GB/s (fresh results: {profile.memory_efficiency:.0%})\n"
        f"  a call: {profile.launch_seconds * 1e6:.1f} us\n"
        f"  between ranks: {profile.inside.latency_seconds * 1e6:.0f} us a step, "
        f"{profile.inside.bandwidth_bytes_per_second / 1e9:.2f} GB/s"
    )
    return DONE

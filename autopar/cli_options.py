"""What the commands of the command line share: their options, the model or plan that they name, and progress."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autopar.auto import decided, is_auto
from autopar.options import call_arguments
from autopar.parallelize import ParallelModel, parallelize
from autopar.plan import Plan
from autopar.precision import PRECISIONS
from autopar.targets import Target, resolve
from costmodel.errors import AutoparError, BadArgument
from costmodel.hardware import Hardware
from costmodel.hardware import hardware as hardware_named
from passes.schedules import SCHEDULES

DONE, CHECK_FAILED, BAD = 0, 1, 2

# ---- progress -----------------------------------------------------------------------------------------------------


class Progress:
    """What is being done, on one line of a terminal that is gone afterwards. Silent in a pipe."""

    def __init__(self) -> None:
        self.stream = sys.stderr  # as it is now: `quiet` keeps what others write off it
        self.shown, self.begin, self.filled = self.stream.isatty(), time.monotonic(), -1

    def __call__(self, text: str) -> None:
        if self.shown:
            seconds = time.monotonic() - self.begin
            print(f"\r\x1b[2K{text} ... ({seconds:.0f} s)", end="", file=self.stream, flush=True)

    def bar(self, done: int, total: int) -> None:
        """A bar of 30 columns, drawn when it grows."""
        filled = 30 * done // max(total, 1)
        if self.shown and filled != self.filled:
            self.filled = filled
            self(f"[{'#' * filled}{'.' * (30 - filled)}] {100 * done // max(total, 1)}% of the layouts")

    def end(self) -> None:
        if self.shown:
            print("\r\x1b[2K", end="", file=self.stream, flush=True)


@contextlib.contextmanager
def progress_line() -> Iterator[Progress]:
    progress = Progress()
    try:
        yield progress
    finally:
        progress.end()


# ---- options that several commands share --------------------------------------------------------------------------


def degree(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def degree_or_auto(text: str) -> int | str:
    return text if text == "auto" else degree(text)


def recompute_choice(text: str) -> str | int:
    """none, selective, full, or bytes: `24000000000`, `24GB`, `512MiB`."""
    return text if text in ("none", "selective", "full") else num_bytes(text, "neither none, selective or full nor ")


def num_bytes(text: str, neither: str = "not ") -> int:
    """`24000000000`, `24GB`, `512MiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    found = int(float(match[1]) * _BYTES.get(match[2].upper(), 0)) if match else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is {neither}a number of bytes such as 24GB")
    return found


def target_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs=None if required else "?",
        help="path/to/file.py:name or package.module:name (a function returning (model, example_inputs), "
        "or a module class or instance "
        "with example_inputs), or hf:MODEL_TYPE",
    )
    hub = parser.add_argument_group("for hf: targets")
    hub.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="change the model's config (repeatable)",
    )
    hub.add_argument("--batch", type=degree, metavar="N", help="rows of the example batch (default 8)")
    hub.add_argument("--seq", type=degree, metavar="N", help="tokens of a row (default 128)")


def plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the plan")
    group.add_argument("--tp", type=degree_or_auto, default=1, metavar="N", help="tensor-parallel ranks a stage, or auto (default 1)")
    group.add_argument("--pp", type=degree_or_auto, default=1, metavar="N", help="pipeline stages, or auto (default 1)")
    group.add_argument("--dp", type=degree_or_auto, default=1, metavar="N", help="data-parallel replicas, or auto (default 1)")
    group.add_argument("--zero", type=int, choices=range(4), default=0, metavar="N", help="ZeRO stage: what replicas share out (default 0)")
    group.add_argument("--gpus", type=degree, metavar="N", help="ranks that auto degrees are for (default: this machine's)")
    group.add_argument("--microbatches", type=degree, metavar="N", help="parts of the batch (default: chosen)")
    group.add_argument(
        "--schedule", default="1f1b", metavar="NAME", help=f"one of {', '.join(SCHEDULES)} (default 1f1b)"
    )
    group.add_argument(
        "--virtual-stages", type=degree, metavar="N", help="stages a pipeline rank (default: the schedule's own)"
    )
    group.add_argument(
        "--recompute",
        type=recompute_choice,
        default="none",
        metavar="WHAT",
        help="what backward computes again: none, selective, full, or the most bytes a rank may hold (default none)",
    )
    group.add_argument(
        "--precision", default="fp32", metavar="NAME", help=f"one of {', '.join(PRECISIONS)} (default fp32)"
    )
    group.add_argument(
        "--hardware", metavar="NAME", help="a profile's name or its JSON file (default: this machine's kind)"
    )
    group.add_argument(
        "--nodes",
        type=degree,
        metavar="N",
        help="nodes that the ranks are spread over (default: as few as the profile's node size allows)",
    )


def hardware_of(arguments: argparse.Namespace) -> Hardware | None:
    profile = None if arguments.hardware is None else hardware_named(arguments.hardware)
    if arguments.nodes is None:
        return profile
    degrees = (arguments.tp, arguments.pp, arguments.dp)
    if "auto" in degrees and arguments.gpus is None:
        raise BadArgument("--nodes and auto degrees need --gpus", use="--gpus N")
    ranks = arguments.gpus if "auto" in degrees else math.prod(degrees)
    return (profile or hardware_named("cpu")).on_nodes(ranks, arguments.nodes)


def parallel(arguments: argparse.Namespace, target: Target, progress: Progress) -> ParallelModel:
    """The model traced and planned."""
    inputs = target.example_inputs
    par = parallelize(target.model, None, **layout(arguments, target))
    progress("tracing and planning")
    with quiet(arguments.debug):
        par._trace(*call_arguments(inputs))
    return par


def layout(arguments: argparse.Namespace, target: Target) -> dict[str, Any]:
    """The options of `parallelize` and `verify` that every command takes, with auto degrees decided."""
    options = {
        "tp": arguments.tp,
        "pp": arguments.pp,
        "dp": arguments.dp,
        "microbatches": arguments.microbatches,
        "schedule": arguments.schedule,
        "virtual_stages": arguments.virtual_stages,
        "recompute": arguments.recompute,
        "zero": arguments.zero,
        "precision": arguments.precision,
        "hardware": hardware_of(arguments),
    }
    if not is_auto(options):
        return options
    with quiet(arguments.debug):
        return decided(target.model, target.example_inputs, options, gpus=arguments.gpus)


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Keep what torch prints and logs about its insides, such as the graph it gave up on, off the terminal."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def load_plan(path: str) -> Plan:
    """A saved plan; every error names the file."""
    try:
        return Plan.load(path)
    except AutoparError as error:
        if path in str(error):
            raise
        raise type(error)(error.what, where=path, why=error.why, use=error.use) from error


def resolve_target(arguments: argparse.Namespace, progress: Progress, meta: bool = True) -> Target:
    progress(f"building {arguments.target}")
    return resolve(arguments.target, meta=meta, settings=arguments.settings, batch=arguments.batch, seq=arguments.seq)


def plan_of(arguments: argparse.Namespace, progress: Progress) -> Plan:
    """The plan of `--plan FILE` or of TARGET."""
    if (arguments.plan is None) == (arguments.target is None):
        raise BadArgument("give a TARGET or --plan FILE" + ("" if arguments.plan is None else ", not both"))
    if arguments.plan is not None:
        if used := given_options(arguments):
            raise BadArgument(f"{', '.join(used)} cannot be changed in a saved plan", use="a TARGET, to make a new one")
        progress(f"reading {arguments.plan}")
        return load_plan(arguments.plan)
    return parallel(arguments, resolve_target(arguments, progress), progress).plan


def given_options(arguments: argparse.Namespace) -> list[str]:
    defaults: dict[str, Any] = {
        "tp": 1,
        "pp": 1,
        "dp": 1,
        "zero": 0,
        "gpus": None,
        "microbatches": None,
        "schedule": "1f1b",
        "recompute": "none",
        "precision": "fp32",
        "virtual_stages": None,
        "hardware": None,
        "nodes": None,
        "settings": [],
        "batch": None,
        "seq": None,
    }
    return [
        f"--{'set' if name == 'settings' else name.replace('_', '-')}"
        for name, value in defaults.items()
        if getattr(arguments, name) != value
    ]


def check_writable(path: str) -> None:
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadArgument(
            f"cannot write {path}",
            why="it is a folder" if Path(path).is_dir() else f"{folder} is no folder that can be written to",
        )

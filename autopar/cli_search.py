"""`autopar search`: the fastest plans for so many devices, as a table, JSON or a page, and as plan files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from autopar.cli_options import (
    DONE,
    Progress,
    check_writable,
    degree,
    degree_or_auto,
    num_bytes,
    quiet,
    resolve_target,
    target_options,
)
from autopar.explain_decision import LEGEND as DECISION_LEGEND
from autopar.explain_decision import decision_of
from autopar.precision import PRECISIONS
from autopar.search import Plans, search
from autopar.search_text import search_text, to_json
from autopar.targets import Target
from costmodel.errors import BadArgument
from costmodel.hardware import hardware as hardware_named

AUTO = "auto"
_DEFAULT_HARDWARE = "h100-sxm"


def search_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser)
    job = parser.add_argument_group("the job")
    job.add_argument("--gpus", type=int, required=True, metavar="N", help="devices to use, all of them")
    job.add_argument("--hardware", metavar="NAME", default=_DEFAULT_HARDWARE, help="a profile's name or its JSON file (default h100-sxm)")
    job.add_argument("--nodes", type=degree, metavar="N", help="nodes that they are in (default: the profile's node size)")
    job.add_argument("--memory", type=num_bytes, metavar="BYTES", help="of a device, such as 70GiB (default: the profile's)")
    job.add_argument("--global-batch", type=degree, metavar="ROWS", help="rows a step (default: the example's on each replica)")
    job.add_argument("--precision", default="fp32", metavar="NAME", help=f"one of {', '.join(PRECISIONS)} (default fp32)")
    fixed = parser.add_argument_group("decisions (default: all auto)")
    for name in ("tp", "pp", "dp", "microbatches"):
        fixed.add_argument(f"--{name}", type=degree_or_auto, default=AUTO, metavar="N")
    fixed.add_argument("--schedule", default=AUTO, metavar="NAME")
    fixed.add_argument("--virtual-stages", type=degree, metavar="N")
    fixed.add_argument("--recompute", default=AUTO, metavar="WHAT", help="none, selective or full")
    fixed.add_argument("--zero", default=AUTO, choices=(AUTO, "0", "1", "2", "3"))
    out = parser.add_argument_group("the result")
    out.add_argument("--top", type=degree, default=10, metavar="K", help="plans to show (default 10)")
    out.add_argument("--json", action="store_true", help="print as JSON")
    out.add_argument("--html", metavar="FILE", help="also write a page: the front of time and memory, timelines")
    out.add_argument("--save", metavar="FILE", help="also write the best plan, for `autopar emit --plan`")


def is_decision(name: str) -> bool:
    """True for a decision of a search ("tp") or a value of one ("tp=16")."""
    return decision_of(name) is not None


def _plans(arguments: argparse.Namespace, target: Target, progress: Progress, **further: Any) -> Plans:
    """What a command's arguments search; a decision that is not given is the search's."""
    given = {name: getattr(arguments, name) for name in ("tp", "pp", "dp", "microbatches", "schedule", "recompute", "zero")}
    decisions: dict[str, Any] = {name: AUTO if value is None else value for name, value in given.items()}
    if decisions["zero"] != AUTO:
        decisions["zero"] = int(decisions["zero"])
    return search(
        target.model, target.example_inputs, gpus=arguments.gpus, nodes=arguments.nodes, memory_bytes=arguments.memory,
        global_batch=arguments.global_batch, precision=arguments.precision, virtual_stages=arguments.virtual_stages,
        progress=progress.bar, **decisions, **further,
    )  # fmt: skip


def run_explain_decision(arguments: argparse.Namespace, progress: Progress) -> int:
    """`autopar explain TARGET tp=16 --gpus N`."""
    if arguments.gpus is None:
        raise BadArgument(f"explain {arguments.name} is about a search", why="it needs to know for how many devices", use="--gpus N")
    target = resolve_target(arguments, progress)
    progress("tracing")
    with quiet(arguments.debug):
        plans = _plans(arguments, target, progress, hardware=arguments.hardware or _DEFAULT_HARDWARE)
        found = plans.explain(arguments.name)
    progress.end()
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(f"{DECISION_LEGEND}\n\n{found}")
    return DONE


def run_search(arguments: argparse.Namespace, progress: Progress) -> int:
    for path in (arguments.html, arguments.save):
        if path is not None:
            check_writable(path)
    if arguments.gpus < 1:
        raise BadArgument(f"--gpus {arguments.gpus}: there is nothing to plan for", use="the number of devices, 1 or more")
    profile = hardware_named(arguments.hardware)
    target = resolve_target(arguments, progress)
    progress("tracing")
    with quiet(arguments.debug):
        plans = _plans(arguments, target, progress, hardware=profile, top=arguments.top)
        if arguments.html is not None:
            from autopar.search_html import search_html

            progress(f"writing {arguments.html}")
            Path(arguments.html).write_text(search_html(plans), encoding="utf-8")
        if arguments.save is not None:
            progress("planning the best")
            plans[0].save(arguments.save)
    progress.end()
    if arguments.json:
        print(json.dumps(to_json(plans), indent=1))
    else:
        print(search_text(plans), end="")
    return DONE

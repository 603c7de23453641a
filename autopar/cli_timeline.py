"""`autopar timeline`: the schedule as text, SVG, an HTML page or a Chrome trace; with `--measure` beside a real step of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

from autopar.cli_options import (
    DONE,
    Progress,
    check_writable,
    parallel,
    plan_of,
    plan_options,
    quiet,
    resolve_target,
    target_options,
)
from autopar.options import call_arguments
from autopar.plan_text import timeline_text, title
from autopar.step_profile import StepProfile
from autopar.timeline_drawing import Drawing, plan_drawing
from autopar.timeline_view import lane_text, time_line, time_table
from costmodel.errors import BadArgument

_FILES: dict[str, tuple[str, Callable[[Drawing, str], None]]] = {
    "svg": ("also draw it, as SVG", Drawing.save_svg),
    "html": ("also write a page to look into it: hover, zoom, tables", Drawing.save_html),
    "trace": ("also write Chrome trace JSON, which ui.perfetto.dev opens", Drawing.save_trace),
}
_WARM_UP, _MEASURED = 2, 5  # steps before those that count, and of those the one of median length is shown


def timeline_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser, required=False)
    parser.add_argument("--plan", metavar="FILE", help="a saved plan, instead of TARGET")
    plan_options(parser)
    for name, (what, _) in _FILES.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=what)
    parser.add_argument(
        "--measure", action="store_true", help="build the model, run steps of it on this machine, and show one beside the prediction"
    )
    parser.add_argument("--json", action="store_true", help="print the spans as JSON")


def run_timeline(arguments: argparse.Namespace, progress: Progress) -> int:
    wanted = {name: getattr(arguments, name) for name in _FILES if getattr(arguments, name) is not None}
    for path in wanted.values():
        check_writable(path)
    profile = _measured(arguments, progress) if arguments.measure else None
    plan = profile.plan if profile else plan_of(arguments, progress)
    drawing = profile.compare() if profile else plan_drawing(plan)
    for name, path in wanted.items():
        progress(f"writing {path}")
        _FILES[name][1](drawing, path)
    progress.end()
    if arguments.json:
        spans = {lane.name: [dataclasses.asdict(span) for span in lane.spans] for lane in drawing.lanes}
        print(json.dumps(spans if profile else spans["predicted"], indent=1))
        return DONE
    predicted = drawing.lanes[0]
    parts = [f"{title(plan)[0]}\n{timeline_text(plan)}", f"{time_line(predicted)}\n{time_table(predicted)}"]
    if profile:
        parts += [f"{time_line(profile.lane)}\n{lane_text(profile.lane)}", time_table(profile.lane)]
    parts += ["\n".join(f"wrote {path}" for path in wanted.values())] if wanted else []
    print("\n\n".join(parts))
    return DONE


def _measured(arguments: argparse.Namespace, progress: Progress) -> StepProfile:
    """Steps of the model on all ranks, here; the one of median length."""
    if arguments.plan is not None or arguments.target is None:
        raise BadArgument("--measure needs a TARGET", why="a saved plan has no weights")
    target = resolve_target(arguments, progress, meta=False)
    par = parallel(arguments, target, progress)
    args, kwargs = call_arguments(target.example_inputs)
    profiles = []
    with quiet(arguments.debug):
        for step in range(_WARM_UP + _MEASURED):
            progress(f"step {step + 1} of {_WARM_UP + _MEASURED}")
            par.zero_grad()
            if step < _WARM_UP:
                par.step(*args, **kwargs)
            else:
                profiles.append(par.profile_step(*args, **kwargs))
    par.close()
    return sorted(profiles, key=lambda profile: profile.step_seconds)[_MEASURED // 2]

"""The command line: `autopar COMMAND TARGET [options]`.

One row of `_COMMANDS` per command. Exit status 0: done; 1: a check failed; 2: bad arguments or a model that cannot be
handled, with one message on stderr. Results go to stdout; progress goes to stderr, on a terminal only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from autopar.emit_files import emit_files, save_weights
from autopar.explain import LEGEND, explain
from autopar.parallelize import ParallelModel, _arguments, parallelize
from autopar.plan import Plan
from autopar.plan_diff import diff_text
from autopar.plan_text import plan_json, plan_text, timeline_text, title
from autopar.state import local_tensors
from autopar.targets import Target, resolve
from autopar.verify import verify
from costmodel.errors import AutoparError, BadArgument
from costmodel.hardware import Hardware
from costmodel.hardware import hardware as hardware_named
from passes.schedules import SCHEDULES

DONE, CHECK_FAILED, BAD = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one message, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise BadArgument(message, use=f"{self.prog} --help")


# ---- progress -----------------------------------------------------------------------------------------------------


class _Progress:
    """What is being done, on one line of a terminal that is gone afterwards. Silent in a pipe."""

    def __init__(self) -> None:
        self.shown, self.begin = sys.stderr.isatty(), time.monotonic()

    def __call__(self, text: str) -> None:
        if self.shown:
            seconds = time.monotonic() - self.begin
            print(f"\r\x1b[2K{text} ... ({seconds:.0f} s)", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress() -> Iterator[_Progress]:
    progress = _Progress()
    try:
        yield progress
    finally:
        progress.end()


# ---- options that several commands share --------------------------------------------------------------------------


def _degree(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _target_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
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
    hub.add_argument("--batch", type=_degree, metavar="N", help="rows of the example batch (default 8)")
    hub.add_argument("--seq", type=_degree, metavar="N", help="tokens of a row (default 128)")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the plan")
    group.add_argument("--tp", type=_degree, default=1, metavar="N", help="tensor-parallel ranks a stage (default 1)")
    group.add_argument("--pp", type=_degree, default=1, metavar="N", help="pipeline stages (default 1)")
    group.add_argument("--dp", type=_degree, default=1, metavar="N", help="data-parallel replicas (default 1)")
    group.add_argument("--microbatches", type=_degree, metavar="N", help="parts of the batch (default: chosen)")
    group.add_argument(
        "--schedule", default="1f1b", metavar="NAME", help=f"one of {', '.join(SCHEDULES)} (default 1f1b)"
    )
    group.add_argument(
        "--hardware", metavar="NAME", help="a profile's name or its JSON file (default: this machine's kind)"
    )
    group.add_argument(
        "--nodes",
        type=_degree,
        metavar="N",
        help="nodes that the ranks are spread over (default: as few as the profile's node size allows)",
    )


def _hardware(arguments: argparse.Namespace) -> Hardware | str | None:
    given = arguments.hardware
    profile: Hardware | None = None
    if given is not None:
        path = Path(given)
        if path.suffix == ".json" or path.is_file():
            try:
                profile = Hardware.from_json(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise BadArgument(f"cannot read the hardware profile {given}", why=str(error)) from error
        else:
            profile = hardware_named(given)
    if arguments.nodes is None:
        return profile
    ranks = arguments.tp * arguments.pp * arguments.dp
    if ranks % arguments.nodes:
        raise BadArgument(
            f"{ranks} ranks cannot be spread evenly over {arguments.nodes} nodes", use="a divisor of the ranks"
        )
    profile = profile or hardware_named("cpu")
    name = f"{profile.name} on {arguments.nodes} node{'s' if arguments.nodes > 1 else ''}"
    return dataclasses.replace(profile, name=name, devices_per_node=ranks // arguments.nodes)


def _parallel(arguments: argparse.Namespace, target: Target, progress: _Progress) -> ParallelModel:
    """The model traced and planned."""
    inputs = target.example_inputs
    par = parallelize(
        target.model,
        None,
        **_layout(arguments),
    )
    progress("tracing and planning")
    with _quiet(arguments.debug):
        par._trace(*_arguments(inputs))
    return par


def _layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `parallelize` and `verify` that every command takes."""
    return {
        "tp": arguments.tp,
        "pp": arguments.pp,
        "dp": arguments.dp,
        "microbatches": arguments.microbatches,
        "schedule": arguments.schedule,
        "hardware": _hardware(arguments),
    }


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
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


def _load(path: str) -> Plan:
    """A saved plan; every error names the file."""
    try:
        return Plan.load(path)
    except AutoparError as error:
        if path in str(error):
            raise
        raise type(error)(error.what, where=path, why=error.why, use=error.use) from error


def _resolve(arguments: argparse.Namespace, progress: _Progress, meta: bool = True) -> Target:
    progress(f"building {arguments.target}")
    return resolve(arguments.target, meta=meta, settings=arguments.settings, batch=arguments.batch, seq=arguments.seq)


def _plan(arguments: argparse.Namespace, progress: _Progress) -> Plan:
    """The plan of `--plan FILE` or of TARGET."""
    if (arguments.plan is None) == (arguments.target is None):
        raise BadArgument("give a TARGET or --plan FILE" + ("" if arguments.plan is None else ", not both"))
    if arguments.plan is not None:
        if used := _given_options(arguments):
            raise BadArgument(f"{', '.join(used)} cannot be changed in a saved plan", use="a TARGET, to make a new one")
        progress(f"reading {arguments.plan}")
        return _load(arguments.plan)
    return _parallel(arguments, _resolve(arguments, progress), progress).plan


def _given_options(arguments: argparse.Namespace) -> list[str]:
    defaults: dict[str, Any] = {
        "tp": 1,
        "pp": 1,
        "dp": 1,
        "microbatches": None,
        "schedule": "1f1b",
        "hardware": None,
        "nodes": None,
        "settings": [],
        "batch": None,
        "seq": None,
    }
    return [
        f"--{'set' if name == 'settings' else name}"
        for name, value in defaults.items()
        if getattr(arguments, name) != value
    ]


# ---- the commands -------------------------------------------------------------------------------------------------


def _run_plan(arguments: argparse.Namespace, progress: _Progress) -> int:
    if arguments.save is not None:
        _check_writable(arguments.save)
    plan = _parallel(arguments, _resolve(arguments, progress), progress).plan
    text = plan_json(plan) if arguments.json else plan_text(plan)
    progress.end()
    if arguments.save is not None:
        try:
            plan.save(arguments.save)
        except OSError as error:
            raise BadArgument(f"cannot write {arguments.save}", why=str(error)) from error
    print(text, end="")
    return DONE


def _check_writable(path: str) -> None:
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadArgument(
            f"cannot write {path}",
            why="it is a folder" if Path(path).is_dir() else f"{folder} is no folder that can be written to",
        )


def _run_emit(arguments: argparse.Namespace, progress: _Progress) -> int:
    out = Path(arguments.out)
    if not arguments.weights:
        plan = _plan(arguments, progress)
        progress("emitting")
        paths = emit_files(plan, out)
    else:
        if arguments.plan is not None or arguments.target is None:
            raise BadArgument("--weights needs a TARGET", why="a saved plan has no weights")
        par = _parallel(arguments, _resolve(arguments, progress, meta=False), progress)
        plan, traced = par.plan, par._traced
        assert traced is not None
        paths = emit_files(plan, out)
        state = {**traced.state, **traced.constants}
        for rank in range(plan.num_ranks):
            progress(f"weights of rank {rank} of {plan.num_ranks}")
            pieces = local_tensors(plan, rank, state, torch.device("cpu"), lambda name: False)
            paths.append(save_weights(out, rank, *pieces))
    progress.end()
    print("\n".join(map(str, paths)))
    buffers = sorted({name for stage in plan.stages for name in stage.buffers})
    if buffers and not arguments.weights:
        print(
            f"note: the programs do not hold the values of buffers ({', '.join(buffers[:3])}"
            f"{', ...' if len(buffers) > 3 else ''}): run.py takes them from a checkpoint, or `emit --weights`",
            file=sys.stderr,
        )
    return DONE


def _run_verify(arguments: argparse.Namespace, progress: _Progress) -> int:
    target = _resolve(arguments, progress, meta=False)
    if arguments.target.startswith("hf:"):
        target.model.eval()  # dropout draws other numbers on other ranks: nothing to compare
    progress("running the untouched model and all ranks")
    options: dict[str, Any] = {} if arguments.tolerance is None else {"tolerance": arguments.tolerance}
    with _quiet(arguments.debug):
        report = verify(
            target.model,
            target.example_inputs,
            **_layout(arguments),
            **options,
        )
    progress.end()
    if arguments.json:
        values = {
            field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "plan"
        }
        values["worst"], values["differences"] = (
            dataclasses.asdict(report.worst),
            [dataclasses.asdict(d) for d in report.differences],
        )
        print(json.dumps(values, indent=1))
    else:
        print(report)
    return DONE if report.ok else CHECK_FAILED


def _run_explain(arguments: argparse.Namespace, progress: _Progress) -> int:
    par = _parallel(arguments, _resolve(arguments, progress), progress)
    traced = par._traced
    assert traced is not None
    found = explain(
        traced,
        arguments.name,
        mesh=par.plan.mesh,
        hardware=par._options.hardware,
        microbatches=par.plan.microbatches,
        schedule=par.plan.schedule,
        progress=lambda name: progress(f"solving for {name}"),
    )
    progress.end()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(explanation) for explanation in found], indent=1, default=str))
        return DONE
    print(f"{title(par.plan)[0]}\n{LEGEND}")
    for explanation in found:
        print(f"\n{explanation}")
    return DONE


def _run_timeline(arguments: argparse.Namespace, progress: _Progress) -> int:
    plan = _plan(arguments, progress)
    progress.end()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(span) for span in plan.timeline()], indent=1))
    else:
        print(f"{title(plan)[0]}\n{timeline_text(plan)}")
    return DONE


def _run_diff(arguments: argparse.Namespace, progress: _Progress) -> int:
    print(diff_text(_load(arguments.before), _load(arguments.after)), end="")
    return DONE


# ---- the parser ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    """A row: what it does, an example, its options and the function that runs it."""

    help: str
    examples: tuple[str, ...]
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, _Progress], int]


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _target_options(parser)
    _plan_options(parser)
    parser.add_argument(
        "--save", metavar="FILE", help="also write the plan, for `autopar emit --plan` and `autopar diff`"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the plan as JSON: what --save writes, and the tables as numbers"
    )


def _emit_arguments(parser: argparse.ArgumentParser) -> None:
    _target_options(parser, required=False)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder, or one emitted before")
    parser.add_argument("--plan", metavar="FILE", help="a saved plan, instead of TARGET")
    parser.add_argument(
        "--weights",
        action="store_true",
        help="build the model with its weights and write each rank's shards beside its program",
    )
    _plan_options(parser)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _target_options(parser)
    _plan_options(parser)
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="largest relative difference of a gradient (default 1e-5 in fp32)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _target_options(parser)
    parser.add_argument("name", metavar="NAME", help="a parameter's name, or a module's path for all of its parameters")
    _plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON")


def _timeline_arguments(parser: argparse.ArgumentParser) -> None:
    _target_options(parser, required=False)
    parser.add_argument("--plan", metavar="FILE", help="a saved plan, instead of TARGET")
    _plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print the spans as JSON")


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="PLAN", help="a saved plan")
    parser.add_argument("after", metavar="PLAN", help="another")


_COMMANDS: dict[str, _Command] = {
    "plan": _Command(
        "print the partition plan of a model",
        (
            "autopar plan examples/mlp.py:example --tp 2 --pp 2",
            "autopar plan hf:MODEL_TYPE --set num_hidden_layers=32 --tp 8 --pp 4 --hardware h100-sxm --save plan.json",
        ),
        _plan_arguments,
        _run_plan,
    ),
    "emit": _Command(
        "write one program per rank, and run.py for torchrun",
        (
            "autopar emit examples/mlp.py:example --tp 2 --pp 2 --out out/ --weights",
            "autopar emit --plan plan.json --out out/",
        ),
        _emit_arguments,
        _run_emit,
    ),
    "verify": _Command(
        "run the model on local ranks and compare loss, gradients and buffers with the untouched model",
        (
            "autopar verify examples/mlp.py:example --tp 2 --pp 2",
            "autopar verify hf:MODEL_TYPE --set num_hidden_layers=4 --set hidden_size=256 --tp 2 --batch 4 --seq 32",
        ),
        _verify_arguments,
        _run_verify,
    ),
    "explain": _Command(
        "show what each placement of a parameter would cost",
        (
            "autopar explain examples/mlp.py:example block0.up.weight --tp 2",
            "autopar explain hf:MODEL_TYPE model.layers.0 --tp 4 --hardware h100-sxm",
        ),
        _explain_arguments,
        _run_explain,
    ),
    "timeline": _Command(
        "print the schedule as it should run",
        ("autopar timeline examples/mlp.py:example --pp 2 --schedule gpipe", "autopar timeline --plan plan.json"),
        _timeline_arguments,
        _run_timeline,
    ),
    "diff": _Command(
        "show what differs between two saved plans, and what it does to time and memory",
        ("autopar diff before.json after.json",),
        _diff_arguments,
        _run_diff,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main_parser = _Parser(
        prog="autopar",
        description="Tensor and pipeline parallelism for unmodified PyTorch models.",
        epilog="`autopar COMMAND --help` has examples.",
    )
    commands = main_parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        examples = "\n".join(f"  {example}" for example in command.examples)
        sub = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.options(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parser().parse_args(words)
        with warnings.catch_warnings(), _progress() as progress:
            if not debug:
                warnings.simplefilter("ignore")  # torch's own, about its insides
            return _COMMANDS[arguments.command].run(arguments, progress)
    except AutoparError as error:
        if debug:
            raise
        kind = type(error).__name__
        print(f"autopar: {kind}: {error}", file=sys.stderr)
        return BAD
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # ours, or the model's own while it runs
        if debug:
            raise
        lines = str(error).strip().splitlines() or [""]
        print(f"autopar: {type(error).__name__}: {lines[0]}\n  use --debug to see where", file=sys.stderr)
        return BAD

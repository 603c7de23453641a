"""The command line: `autopar COMMAND TARGET [options]`.

One row of `_COMMANDS` per command. Exit status 0: done; 1: a check failed; 2: bad arguments or a model that cannot be
handled, with one message on stderr. Results go to stdout; progress goes to stderr, on a terminal only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from autopar.cli_calibrate import calibrate_arguments, run_calibrate
from autopar.cli_options import (
    BAD,
    CHECK_FAILED,
    DONE,
    Progress,
    check_writable,
    degree,
    layout,
    load_plan,
    num_bytes,
    parallel,
    plan_of,
    plan_options,
    progress_line,
    quiet,
    resolve_target,
    target_options,
)
from autopar.cli_search import is_decision, run_explain_decision, run_search, search_arguments
from autopar.cli_timeline import run_timeline, timeline_arguments
from autopar.emit_files import emit_files, save_weights
from autopar.explain import LEGEND, explain
from autopar.plan_diff import diff_text
from autopar.plan_text import plan_json, plan_text, title
from autopar.ranks import whole_state
from autopar.state import local_tensors
from autopar.verify import verify
from costmodel.errors import AutoparError, BadArgument


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one message, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise BadArgument(message, use=f"{self.prog} --help")


# ---- the commands -------------------------------------------------------------------------------------------------


def _run_plan(arguments: argparse.Namespace, progress: Progress) -> int:
    if arguments.save is not None:
        check_writable(arguments.save)
    plan = parallel(arguments, resolve_target(arguments, progress), progress).plan
    text = plan_json(plan) if arguments.json else plan_text(plan)
    progress.end()
    if arguments.save is not None:
        try:
            plan.save(arguments.save)
        except OSError as error:
            raise BadArgument(f"cannot write {arguments.save}", why=str(error)) from error
    print(text, end="")
    return DONE


def _run_emit(arguments: argparse.Namespace, progress: Progress) -> int:
    out = Path(arguments.out)
    if not arguments.weights:
        plan = plan_of(arguments, progress)
        progress("emitting")
        paths = emit_files(plan, out)
    else:
        if arguments.plan is not None or arguments.target is None:
            raise BadArgument("--weights needs a TARGET", why="a saved plan has no weights")
        par = parallel(arguments, resolve_target(arguments, progress, meta=False), progress)
        plan, traced = par.plan, par._traced
        assert traced is not None
        paths = emit_files(plan, out)
        state = whole_state(traced)
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


def _run_verify(arguments: argparse.Namespace, progress: Progress) -> int:
    target = resolve_target(arguments, progress, meta=False)
    if arguments.target.startswith("hf:"):
        target.model.eval()  # dropout draws other numbers on other ranks: nothing to compare
    progress("running the untouched model and all ranks")
    options: dict[str, Any] = {} if arguments.tolerance is None else {"tolerance": arguments.tolerance}
    with quiet(arguments.debug):
        report = verify(
            target.model,
            target.example_inputs,
            **layout(arguments, target),
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


def _run_explain(arguments: argparse.Namespace, progress: Progress) -> int:
    if is_decision(arguments.name):
        return run_explain_decision(arguments, progress)
    for name, value in _EXPLAINED.items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    par = parallel(arguments, resolve_target(arguments, progress), progress)
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


def _run_diff(arguments: argparse.Namespace, progress: Progress) -> int:
    print(diff_text(load_plan(arguments.before), load_plan(arguments.after)), end="")
    return DONE


# ---- the parser ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    """A row: what it does, an example, its options and the function that runs it."""

    help: str
    examples: tuple[str, ...]
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Progress], int]


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser)
    plan_options(parser)
    parser.add_argument(
        "--save", metavar="FILE", help="also write the plan, for `autopar emit --plan` and `autopar diff`"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the plan as JSON: what --save writes, and the tables as numbers"
    )


def _emit_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser, required=False)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder, or one emitted before")
    parser.add_argument("--plan", metavar="FILE", help="a saved plan, instead of TARGET")
    parser.add_argument(
        "--weights",
        action="store_true",
        help="build the model with its weights and write each rank's shards beside its program",
    )
    plan_options(parser)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser)
    plan_options(parser)
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="largest relative difference of a gradient (default 1e-5 in fp32)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


# What of a plan's options is 1f1b and the like for a parameter, and left to the search for a decision.
_EXPLAINED: dict[str, Any] = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "schedule": "1f1b", "recompute": "none"}


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    target_options(parser)
    parser.add_argument(
        "name", metavar="NAME",
        help="a parameter's name, or a module's path for all of its parameters; or, with --gpus, a decision of `autopar search` (tp) "
        "or one value of it (tp=16): options that are not given are then left to the search",
    )  # fmt: skip
    plan_options(parser)
    parser.set_defaults(**dict.fromkeys(_EXPLAINED))
    parser.add_argument("--global-batch", type=degree, metavar="ROWS", help="of a decision: rows a step")
    parser.add_argument("--memory", type=num_bytes, metavar="BYTES", help="of a decision: of a device, such as 70GiB")
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON")


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
            "autopar explain hf:MODEL_TYPE tp=16 --gpus 64 --hardware h100-sxm --global-batch 256 --precision bf16",
        ),
        _explain_arguments,
        _run_explain,
    ),
    "timeline": _Command(
        "print the schedule as it should run",
        ("autopar timeline examples/mlp.py:example --pp 2 --schedule gpipe", "autopar timeline --plan plan.json"),
        timeline_arguments,
        run_timeline,
    ),
    "search": _Command(
        "find the fastest plans for so many devices, and say why the others lost",
        (
            "autopar search hf:MODEL_TYPE --set num_hidden_layers=32 --seq 4096 --gpus 64 --global-batch 512 --precision bf16",
            "autopar search model.py:build --gpus 16 --hardware a100-80gb --nodes 4 --html search.html --save best.json",
        ),
        search_arguments,
        run_search,
    ),
    "calibrate": _Command(
        "measure this machine into a hardware profile: matrix products, memory, launches, collectives",
        ("autopar calibrate --out here.json", "autopar plan examples/mlp.py:example --tp 2 --hardware here.json"),
        calibrate_arguments,
        run_calibrate,
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
        with warnings.catch_warnings(), progress_line() as progress:
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

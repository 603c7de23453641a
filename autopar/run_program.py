"""What an emitted folder's `run.py` does on each rank: load the program and its weights, train on saved batches.

It needs the folder, autopar and torch; the model's own source is not there. Weights come from one of three places,
each cut into this rank's shards one tensor at a time: `weights_<rank>.pt` beside the program, a checkpoint of the
whole model, or random numbers that every rank draws alike.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.emit_files import PLAN_FILE, load_weights, read_program, save_weights, weights_file
from autopar.plan import Plan
from autopar.precision import PRECISIONS
from autopar.program import Program
from autopar.runtime.batch import BatchTypes
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.scaling import LossScale
from autopar.runtime.worker import Worker
from autopar.runtime.world import World, check_world_size
from autopar.state import check_shape, local_piece
from costmodel.errors import AutoparError, BadArgument, BadPlan, WeightsMissing
from costmodel.mesh import axis_stride
from passes.placement import parse_notation, parse_type

INITIAL_STD = 0.02


def _parser(folder: Path, num_ranks: int) -> argparse.ArgumentParser:
    start = f"torchrun --nproc-per-node {num_ranks} {os.path.relpath(folder / 'run.py')}"
    parser = argparse.ArgumentParser(
        prog="run.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train the emitted programs of this folder, one rank a process.",
        epilog=f"examples:\n  {start} --data batches.pt --random --steps 100 --save\n"
        f"  {start} --data batches.pt --checkpoint model.pt --lr 1e-4\n\n"
        "batches.pt holds a list of dicts of tensors, torch.save([{...}, ...], 'batches.pt'), under the names of\n"
        "BATCH in the programs. Without --random or --checkpoint the weights are weights_<rank>.pt beside the\n"
        "programs, as --save writes them.",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="the batches to train on (of all replicas), used again from the first when they are over",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="a state_dict of the whole model; each rank cuts out its shards"
    )
    weights.add_argument(
        "--random",
        action="store_true",
        help=f"initial weights: normal with standard deviation {INITIAL_STD}, "
        "biases 0, other one-dimensional parameters 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and of dropout (default 0)")
    parser.add_argument("--steps", type=int, help="default: each batch once")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate (default 1e-3)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--save", action="store_true", help="write the trained shards to weights_<rank>.pt beside the programs"
    )
    return parser


def main(folder: Path, argv: Sequence[str] | None = None) -> int:
    """Run this process's rank. Exit status 2 with one message for bad arguments, files or weights."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        mesh = read_program(folder, 0).mesh
        arguments = _parser(folder, math.prod(mesh.values())).parse_args(argv)
        check_world_size(int(os.environ.get("WORLD_SIZE", "1")), mesh)
        _train(folder, rank, arguments)
    except AutoparError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _train(folder: Path, rank: int, arguments: argparse.Namespace) -> None:
    if arguments.steps is not None and arguments.steps < 1:
        raise BadArgument(f"--steps {arguments.steps}", use="a positive number")
    program = read_program(folder, rank)
    if "loss" not in _outputs(folder, program):
        raise BadArgument("these programs compute no loss to train on", use="a plan of a model that returns its loss")
    batches = read_batches(arguments.data)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parameters, buffers = rank_tensors(
        folder, rank, program, checkpoint=arguments.checkpoint, random=arguments.random, seed=arguments.seed
    )
    world = World.from_environment(program.mesh, device=device)
    try:
        parameters = {
            name: torch.nn.Parameter(p.detach().to(world.device), requires_grad=p.requires_grad)
            for name, p in parameters.items()
        }
        scale = LossScale() if PRECISIONS[_plan(folder).precision].scales_loss else None
        shards = None
        if program.zero:
            placed = [stage.PARAMS for stage in program.stages]
            shards = ParameterShards(parameters, placed, program.mesh, program.coords["dp"], program.zero)
        held = HeldGradients(parameters, shards)
        worker = Worker(
            program, world, parameters, {name: b.to(world.device) for name, b in buffers.items()}, seed=arguments.seed,
            held=held, loss_scale=scale,
        )  # fmt: skip
        axes = [world.axis(name) for name in program.mesh]
        trained = [p for p in held.updated.values() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=arguments.lr) if trained else None
        for step in range(arguments.steps or len(batches)):
            of_replicas = BatchTypes(program.batch, 1).over_replicas(batches[step % len(batches)], program.mesh.get("dp", 1))
            with scale.step([held], world.device, axes) if scale is not None else nullcontext():
                loss = worker.step(of_replicas[program.coords.get("dp", 0)])
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if rank == 0:
                print(f"step {step}: loss {loss.item():.9g}", flush=True)
        worker.refresh()
        if arguments.save:
            values = worker.parameters
            if shards is not None and shards.gathers:
                values = {name: shards.gathered(name, world.axis("dp")) for name in shards.of}
            save_weights(folder, rank, values, worker.buffers)
    finally:
        world.close()


def _outputs(folder: Path, program: Program) -> Mapping[str, str]:
    """The outputs of the last stage, which one of the pipeline ranks has."""
    last = program.stage_ranks[-1]
    if program.coords.get("pp", 0) == last:
        return program.stages[-1].OUTPUTS
    stride = axis_stride(program.mesh, "pp") if "pp" in program.mesh else 1
    return read_program(folder, last * stride).stages[-1].OUTPUTS


def read_batches(path: str) -> list[dict[str, torch.Tensor]]:
    """A saved list of dicts of tensors. BadArgument if it is anything else."""
    content = _load(path)
    if not isinstance(content, list) or not content:
        raise BadArgument(
            f"{path} holds a {type(content).__name__}", use="a list of dicts of tensors with at least one batch"
        )
    for batch in content:
        if not isinstance(batch, dict) or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            raise BadArgument(f"a batch in {path} is no dict of tensors")
    return content


def _load(path: str) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many kinds for files that are not its own
        raise BadArgument(
            f"cannot read {path}", why=str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        ) from error


# ---- this rank's tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """What the plan says of a tensor that a rank holds."""

    text: str  # placement in the notation
    dtype: torch.dtype
    shape: tuple[int, ...]  # whole
    is_parameter: bool
    trainable: bool


def rank_tensors(
    folder: Path, rank: int, program: Program, *, checkpoint: str | None, random: bool, seed: int
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """(parameters, buffers) of a rank. WeightsMissing if a tensor has no source; DifferentModel if the checkpoint has
    other shapes.
    """
    plan = _plan(folder)
    held = _held(plan, program)
    file = folder / weights_file(rank, plan.num_ranks)
    saved = load_weights(file, program) if file.is_file() else {}
    whole: Callable[[str, _Held], torch.Tensor | None]
    if checkpoint is not None:
        whole = _from_checkpoint(checkpoint, plan)
        source = f"{checkpoint} does not have it"
    elif random:
        whole = lambda name, h: _initial(name, h, seed) if h.is_parameter else None  # noqa: E731
        source = f"only parameters are random, and there is no {file.name}"
    else:
        whole = lambda name, h: None  # noqa: E731
        source = f"there is no {file.name}"
    found: dict[str, torch.Tensor] = {}
    missing = []
    for name, h in held.items():
        value = whole(name, h)
        if value is not None:
            check_shape(name, value, h.shape)
            found[name] = local_piece(value.to(h.dtype), h.text, plan, program.coords)
        elif name in saved and not (checkpoint is not None and h.is_parameter):
            found[name] = saved[name]
        else:
            missing.append(name)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsMissing(
            f"no values for {missing[0]}{others} of rank {rank}",
            why=source,
            use=f"{'' if random else '--random, '}--checkpoint model.pt with them, or `autopar emit --weights`",
        )
    parameters = {
        name: torch.nn.Parameter(t, requires_grad=held[name].trainable)
        for name, t in found.items()
        if held[name].is_parameter
    }
    return parameters, {name: t for name, t in found.items() if not held[name].is_parameter}


def _plan(folder: Path) -> Plan:
    try:
        return Plan.from_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadPlan(f"cannot read {folder / PLAN_FILE}", why=str(error)) from error


def _held(plan: Plan, program: Program) -> dict[str, _Held]:
    axes = tuple(program.mesh)
    stages = [plan.stages[number] for number in program.stage_numbers]
    records = {r["target"]: r for stage in stages for r in stage.records if r["op"] == "get_attr"}
    held = {}
    for name, text in {**program.parameters, **program.buffers}.items():
        if name not in records:
            raise BadPlan(
                f"{name} is in the program of {dict(program.coords)} and not in {PLAN_FILE}",
                why="they are of different plans",
            )
        shape = tuple(int(size) for size in parse_notation(text, axes)[0])
        is_parameter = name in program.parameters
        dtype = parse_type(records[name]["type"], axes)[0].dtype
        held[name] = _Held(text, dtype, shape, is_parameter, bool(records[name].get("trainable")))
    return held


def _from_checkpoint(path: str, plan: Plan) -> Callable[[str, _Held], torch.Tensor | None]:
    """Look up a whole tensor under any of its names. The file is mapped: a rank reads the pages of its own shards."""
    content = _load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise BadArgument(f"{path} is not a state_dict", use="torch.save(model.state_dict(), path)")
    names: dict[str, list[str]] = {}
    for alias, name in plan.aliases.items():
        names.setdefault(name, []).append(alias)
    return lambda name, held: next((content[n] for n in (name, *names.get(name, ())) if n in content), None)


def _initial(name: str, held: _Held, seed: int) -> torch.Tensor:
    """The whole initial parameter: the same numbers on every rank that holds a piece of it."""
    if len(held.shape) < 2:
        return torch.full(held.shape, 0.0 if name.rpartition(".")[2] == "bias" else 1.0, dtype=held.dtype)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(held.shape, generator=generator).mul_(INITIAL_STD).to(held.dtype)

"""The files of a plan: one program per rank, the plan itself, and `run.py`, which torchrun starts on every rank.

    rank_0.py rank_1.py ...   the programs            plan.json       the plan
    run.py                    trains them             weights_0.pt    a rank's shards, where somebody wrote them

The folder needs autopar and torch, not the model. Nothing is half-done: everything is written into a folder beside it
first, and moved when it is complete. A folder that holds anything else is left alone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autopar.program import Program, load_program
from costmodel.errors import BadArgument, BadPlan

if TYPE_CHECKING:
    from autopar.plan import Plan

PLAN_FILE = "plan.json"
RUN_FILE = "run.py"

_RUN = '''"""Trains the programs in this folder, one per rank.

    torchrun --nproc-per-node {num_ranks} run.py --data batches.pt --random        `python run.py --help` says more

Emitted by autopar from {model} (plan {identity}).
"""

from pathlib import Path

from autopar.run_program import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).parent))
'''


def rank_file(rank: int, num_ranks: int) -> str:
    """`rank_0.py`; `rank_00.py` where there are more than ten, so that they sort."""
    return f"rank_{rank:0{len(str(num_ranks - 1))}}.py"


def weights_file(rank: int, num_ranks: int) -> str:
    """`weights_0.pt`, numbered as the programs are."""
    return rank_file(rank, num_ranks).replace("rank_", "weights_").replace(".py", ".pt")


def emit_files(plan: Plan, folder: str | Path) -> list[Path]:
    """Write every rank's program, `plan.json` and `run.py`; returns their paths, programs first.

    A folder emitted before gets the new files, and loses the programs of ranks that are no more; weights and other
    files in it stay. BadArgument if the path is a file, or a folder with files in it that was not emitted, or cannot
    be written.
    """
    folder = Path(folder)
    _check_folder(folder)
    texts = {rank_file(rank, plan.num_ranks): plan.source(rank) for rank in range(plan.num_ranks)}
    texts[PLAN_FILE] = plan.to_json()
    texts[RUN_FILE] = _RUN.format(num_ranks=plan.num_ranks, model=plan.model, identity=plan.identity)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, text in texts.items():
                (written / name).write_text(text, encoding="utf-8")
            _move(written, folder, texts)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    except OSError as error:
        raise BadArgument(f"cannot write the programs to {folder}", why=str(error)) from error
    return [folder / name for name in texts]


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadArgument(f"{folder} is a file", use="a folder to write the programs to")
    if folder.is_dir() and not (folder / PLAN_FILE).is_file() and any(folder.iterdir()):
        some = sorted(path.name for path in folder.iterdir())
        raise BadArgument(
            f"{folder} holds files that are not autopar's",
            why=f"it has no {PLAN_FILE}, and {', '.join(some[:4])}{', ...' if len(some) > 4 else ''}",
            use="a new or empty folder, or one emitted before",
        )


def _move(written: Path, folder: Path, texts: Mapping[str, str]) -> None:
    if not folder.exists():
        written.chmod(0o777 & ~_umask())  # a temporary folder is its owner's alone
        os.rename(written, folder)
        return
    for name in texts:
        os.replace(written / name, folder / name)
    for stale in folder.glob("rank_*.py"):
        if stale.name not in texts and stale.stem.removeprefix("rank_").isdigit():
            stale.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- weights ------------------------------------------------------------------------------------------------------


def read_program(folder: str | Path, rank: int) -> Program:
    """A rank's program from an emitted folder. BadPlan if there is none."""
    found = sorted(Path(folder).glob("rank_*.py"), key=lambda path: (len(path.name), path.name))
    path = next(
        (path for path in found if path.stem.removeprefix("rank_").lstrip("0") == (str(rank) if rank else "")), None
    )
    if path is None:
        raise BadPlan(
            f"{folder} has no program for rank {rank}", why=f"it holds {len(found)} programs", use="plan.emit(folder)"
        )
    return load_program(path.read_text(encoding="utf-8"), str(path))


def save_weights(
    folder: str | Path, rank: int, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> Path:
    """Write a rank's shards as `weights_<rank>.pt` beside its program in an emitted folder.

    The file says how each is split, so that it is never read into a plan that splits otherwise. BadArgument for other
    names than the program's; BadPlan if there is no such program.
    """
    program = read_program(folder, rank)
    placements = {**program.parameters, **program.buffers}
    tensors = {**parameters, **buffers}
    if set(tensors) != set(placements):
        raise BadArgument(
            f"these are not the weights of rank {rank}",
            why=f"other names: {', '.join(sorted(set(tensors) ^ set(placements))[:6])}",
        )
    without = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without:
        raise BadArgument(f"{without[0]} has no values to save", why="it is on the meta device")
    path = Path(folder) / weights_file(rank, _num_ranks(program))
    content = {
        "mesh": dict(program.mesh),
        "coords": dict(program.coords),
        "placements": placements,
        "tensors": {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_weights(path: Path, program: Program) -> dict[str, torch.Tensor]:
    """The shards that `save_weights` wrote for this program. BadPlan if they are another plan's."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        found = (content["mesh"], content["coords"], content["placements"])
        tensors = dict(content["tensors"])
    except Exception as error:  # torch raises many kinds for files that are not its own
        raise BadPlan(
            f"cannot read the weights {path}",
            why=str(error).strip().splitlines()[0] if str(error) else type(error).__name__,
        ) from error
    if found != (dict(program.mesh), dict(program.coords), {**program.parameters, **program.buffers}):
        raise BadPlan(
            f"the weights {path} belong to another plan",
            why="its mesh or its placements differ",
            use="weights saved for this plan",
        )
    return tensors


def _num_ranks(program: Program) -> int:
    total = 1
    for size in program.mesh.values():
        total *= size
    return total

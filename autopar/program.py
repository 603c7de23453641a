"""What an emitted rank program imports, and how the text of one becomes a `Program`.

A program is a plain Python file: MESH and COORDS, one StageModule per stage of the rank, SCHEDULE, and for a model
with a loss the function `loss_weights`. It runs under the runtime's Worker; it holds no weights.

- `BATCH` (optional): the types of all of the model's inputs. It binds the size names on stages that read few inputs
  or none. If it is missing, the stages' own INPUTS are used.
- `loss_weights(*, <inputs>, <sizes>) -> tuple`: how much each of the loss terms of these rows counts: the number of
  labels for a mean over labels, None for a sum. A microbatch's `loss_share` is its weight over the sum of all
  microbatches' weights, `loss_total` that sum. It may ask for `p` and `device`, which are then the stage's.
- `LOSS_STAGE` (optional): the stage whose outputs hold `loss`; the last if it is missing.
- `STAGE_RANKS` (where a rank has several stages): the pipeline rank of every stage. A program's classes are the stages
  of its rank, in ascending order.
- `ZERO` (where data-parallel replicas share out the optimizer's work): the ZeRO stage.
- `EVALUATION` (where a rank has several stages): the instructions of a forward pass without gradients.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from autopar.casts import HeldCasts, as_cast
from autopar.deferred import Product, deferred_linear, deferred_matmul
from autopar.random_ops import attention_with_dropout, draw, dropout
from autopar.recompute import recompute
from costmodel.errors import BadPlan
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
    SumGradients,
)
from passes.ir import DTYPES
from passes.local_ops import pad_shard, sharded_batch_norm, sharded_cross_entropy, sharded_embedding
from passes.reshard import all_gather, all_reduce, all_to_all, copy_to, own_gradient, reduce_scatter, take_shard

FUNCTIONS = (
    all_gather, all_reduce, all_to_all, as_cast, attention_with_dropout, copy_to, deferred_linear, deferred_matmul, draw, dropout,
    own_gradient, pad_shard, recompute, reduce_scatter, sharded_batch_norm, sharded_cross_entropy, sharded_embedding, take_shard,
)  # fmt: skip
FUNCTION_NAMES = frozenset(function.__name__ for function in FUNCTIONS)

__all__ = [
    "Backward",
    "BackwardInput",
    "BackwardWeight",
    "Forward",
    "Instruction",
    "Program",
    "Receive",
    "RecvActivation",
    "RecvGradient",
    "Send",
    "SendActivation",
    "SendGradient",
    "StageModule",
    "SumGradients",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "as_cast",
    "attention_with_dropout",
    "copy_to",
    "deferred_linear",
    "deferred_matmul",
    "draw",
    "dropout",
    "load_program",
    "own_gradient",
    "pad_shard",
    "recompute",
    "reduce_scatter",
    "sharded_batch_norm",
    "sharded_cross_entropy",
    "sharded_embedding",
    "take_shard",
]


@dataclass(frozen=True)
class Receive:
    """A value that comes from stage `source`. `gradient=False`: nothing flows back (integers never do)."""

    source: int
    type: str
    gradient: bool = True


@dataclass(frozen=True)
class Send:
    """A value that goes to the stages `to`. `gradient=False`: none of them sends a gradient back."""

    to: tuple[int, ...]
    type: str
    gradient: bool = True


class StageModule:
    """The base of emitted stages. Not an nn.Module: a stage has no submodules or hooks, and p(name) is one dictionary
    look-up: of a parameter or buffer, and p(name, dtype) of the cast of a parameter that CASTS says is made once a step.

    Each mesh axis is an attribute (`self.tp`) that holds the runtime's Axis.
    """

    PARAMS: ClassVar[Mapping[str, str]] = {}
    CASTS: ClassVar[Mapping[str, str]] = {}  # the parameters that are cast once a step, and to what
    BUFFERS: ClassVar[Mapping[str, str]] = {}
    INPUTS: ClassVar[Mapping[str, str]] = {}
    RECEIVES: ClassVar[Mapping[str, Receive]] = {}
    SENDS: ClassVar[Mapping[str, Send]] = {}
    OUTPUTS: ClassVar[Mapping[str, str]] = {}
    SHARES: ClassVar[Mapping[str, str]] = {}  # the types of loss shares that are not f32[]
    PARTIAL_GRADIENTS: ClassVar[tuple[str, ...]] = ()
    TIED: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    TIED_EXACT: ClassVar[bool] = True
    OWN_BUFFERS: ClassVar[tuple[str, ...]] = ()  # updated by forward, and by an earlier stage of this rank as well
    UPDATED_BUFFERS: ClassVar[tuple[str, ...]] = ()  # by forward; with data parallelism: averaged over replicas after a step

    forward: Callable[..., Any]
    tp: Any

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        axes: Mapping[str, Any],
        coords: Mapping[str, int],
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        missing = [name for name in (*self.PARAMS, *self.BUFFERS) if name not in tensors]
        if missing:
            raise BadPlan(f"{type(self).__name__} needs {', '.join(missing)}, which was not given.")
        self._tensors = dict(tensors)
        self.p: Callable[..., torch.Tensor] = self._state
        self.casts: HeldCasts | None = None  # while microbatches run
        self._cast_of: Mapping[str, torch.Tensor] = {}
        self.device = torch.device(device)
        self.training = True
        self.deferred: list[Product] | None = None  # a list while weight gradients are put off
        for name, axis in axes.items():
            setattr(self, name, axis)
        self._coords = dict(coords)
        self.seed(seed)

    def _state(self, name: str, dtype: str | None = None) -> torch.Tensor:
        if dtype is None:
            return self._tensors[name]
        found = self._cast_of.get(name)
        return self.casts.make(name) if found is None else found  # type: ignore[union-attr]

    def hold_casts(self, added: Callable[[torch.Tensor], None] | None = None) -> HeldCasts:
        """From now on until `drop_casts`, cast each parameter when it is first asked for. `added`: see HeldCasts."""
        dtypes = {name: DTYPES[dtype] for name, dtype in self.CASTS.items()}
        self.casts = HeldCasts(self._tensors, dtypes, added)
        self._cast_of = self.casts.of
        return self.casts

    def drop_casts(self) -> None:
        """Let go of the casts: parameters may change."""
        if self.casts is not None:
            self.casts.clear()
        self.casts, self._cast_of = None, {}

    def seed(self, seed: int) -> None:
        """Start the random generators anew."""
        whole = {name: coord for name, coord in self._coords.items() if name != "tp"}
        self._shared = self._generator(seed, whole)
        self._sharded = self._generator(seed, {**whole, "tp": self._coords.get("tp", 0)})

    def _generator(self, seed: int, coords: Mapping[str, int]) -> torch.Generator:
        digest = hashlib.blake2b(
            repr((seed, type(self).__name__, sorted(coords.items()))).encode(), digest_size=7
        ).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "big"))

    def generator(self, sharded: bool) -> torch.Generator:
        """Random numbers for a value that is split over tp (others on each tp rank) or whole (the same on all)."""
        return self._sharded if sharded else self._shared

    def random_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the two generators are."""
        return self._shared.get_state(), self._sharded.get_state()

    def set_random_state(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Put the generators where they were."""
        self._shared.set_state(state[0])
        self._sharded.set_state(state[1])


@dataclass(frozen=True)
class Program:
    """A loaded rank program. `stages` are the classes of this rank's stages, whose numbers `stage_numbers` gives."""

    title: str
    stages: tuple[type[StageModule], ...]
    schedule: tuple[Instruction, ...]
    mesh: Mapping[str, int]
    coords: Mapping[str, int]
    batch: Mapping[str, str]
    loss_weights: Callable[..., tuple[Any, ...]] | None = None
    loss_stage: int = -1
    stage_ranks: tuple[int, ...] = ()
    evaluation: tuple[Instruction, ...] | None = None
    zero: int = 0
    filename: str = ""
    source: str = field(default="", repr=False)

    @property
    def stage(self) -> type[StageModule]:
        """The first (with most schedules the only) stage of this rank."""
        return self.stages[0]

    @property
    def stage_numbers(self) -> tuple[int, ...]:
        """The numbers of this rank's stages, ascending: the place in it is the chunk of instructions."""
        own = self.coords.get("pp", 0)
        return tuple(stage for stage, rank in enumerate(self.stage_ranks) if rank == own)

    @property
    def parameters(self) -> dict[str, str]:
        """The placements of the parameters of all of this rank's stages, by name."""
        return {name: text for stage in self.stages for name, text in stage.PARAMS.items()}

    @property
    def buffers(self) -> dict[str, str]:
        """The placements of the buffers of all of this rank's stages, by name."""
        return {name: text for stage in self.stages for name, text in stage.BUFFERS.items()}

    @property
    def num_microbatches(self) -> int:
        """As many as the schedule runs forward."""
        return len({instruction.microbatch for instruction in self.schedule if isinstance(instruction, Forward)})


def freeing(tree: ast.Module) -> ast.Module:
    """The program with every value of a stage's methods let go after its last use, as it is when modules call each other.

    Straight-line code would otherwise hold all values to the end; what autograd needs it keeps by itself.
    """
    for stage in tree.body:
        for function in stage.body if isinstance(stage, ast.ClassDef) else ():
            if isinstance(function, ast.FunctionDef):
                function.body = _with_deletions(function)
    return ast.fix_missing_locations(tree)


def _with_deletions(function: ast.FunctionDef) -> list[ast.stmt]:
    names = [[node.id for node in ast.walk(statement) if isinstance(node, ast.Name)] for statement in function.body]
    arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    local = arguments - {"self"} | {
        node.id
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    last = {name: index for index, used in enumerate(names) for name in used if name in local}
    body: list[ast.stmt] = []
    for index, statement in enumerate(function.body):
        body.append(statement)
        done = [name for name, end in last.items() if end == index]
        if done and not isinstance(statement, ast.Return):
            body.append(ast.copy_location(ast.Delete([ast.Name(name, ast.Del()) for name in done]), statement))
    return body


def load_program(source_text: str, filename: str) -> Program:
    """Run the text of an emitted program. Tracebacks through it show its lines. BadPlan if it is not one."""
    linecache.cache[filename] = (len(source_text), None, source_text.splitlines(keepends=True), filename)
    module = types.ModuleType(f"autopar_program_{hashlib.blake2b(source_text.encode(), digest_size=6).hexdigest()}")
    module.__file__ = filename
    try:
        exec(compile(freeing(ast.parse(source_text, filename)), filename, "exec"), module.__dict__)
    except SyntaxError as error:
        raise BadPlan(f"{filename} is not Python.", where=f"line {error.lineno}", why=str(error)) from error
    names = vars(module)
    stages = tuple(
        value
        for value in names.values()
        if inspect.isclass(value) and issubclass(value, StageModule) and value.__module__ == module.__name__
    )
    absent = [name for name in ("MESH", "COORDS", "SCHEDULE") if name not in names]
    if absent or not stages:
        raise BadPlan(f"{filename} is not a rank program.", why=f"it has no {absent[0] if absent else 'StageModule'}")
    inputs: dict[str, str] = {}
    for stage in stages:
        inputs.update(stage.INPUTS)
    mesh, coords = dict(names["MESH"]), dict(names["COORDS"])
    stage_ranks = tuple(names.get("STAGE_RANKS", range(mesh.get("pp", 1))))
    if (own := stage_ranks.count(coords.get("pp", 0))) != len(stages):
        raise BadPlan(f"{filename} has {len(stages)} stages; STAGE_RANKS gives pipeline rank {coords.get('pp', 0)} {own}.")
    if len(stages) > 1 and "EVALUATION" not in names:
        raise BadPlan(f"{filename} has {len(stages)} stages and no EVALUATION.")
    return Program(
        title=(module.__doc__ or "").strip(),
        stages=stages,
        schedule=tuple(names["SCHEDULE"]),
        mesh=mesh,
        coords=coords,
        batch=dict(names.get("BATCH", inputs)),
        loss_weights=names.get("loss_weights"),
        loss_stage=names.get("LOSS_STAGE", len(stage_ranks) - 1),
        stage_ranks=stage_ranks,
        evaluation=tuple(names["EVALUATION"]) if "EVALUATION" in names else None,
        zero=int(names.get("ZERO", 0)),
        filename=filename,
        source=source_text,
    )

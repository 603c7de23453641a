"""The ranks behind a ParallelModel: all of them as threads of this process, or this process as one of them."""

from __future__ import annotations

import hashlib
import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from autopar.clipping import clip_by_part, norm_dtype, norm_part, over_axes
from autopar.plan import Plan
from autopar.precision import PRECISIONS
from autopar.program import load_program
from autopar.runtime.agreement import agree
from autopar.runtime.axis import Axis, TransferFailed
from autopar.runtime.board import padded
from autopar.runtime.compiled import Compile
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.optimizers import register_piece
from autopar.runtime.outputs import join
from autopar.runtime.parameter_shards import ParameterShards, joined
from autopar.runtime.record import RankRecord
from autopar.runtime.scaling import LossScale
from autopar.runtime.threads import ThreadRanks
from autopar.runtime.worker import Worker
from autopar.runtime.world import World
from autopar.state import (
    check_names,
    check_shape,
    full_value,
    gather_whole,
    local_piece,
    local_shape_of,
    local_tensors,
    padded_piece,
    require_values,
    split_axis,
    stage_of_parameter,
    text_of,
)  # fmt: skip
from autopar.trace import Traced
from passes.placement import Shard, local_shard, parse_notation, parse_type

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Tensors = dict[str, torch.Tensor]

_MEETING = padded("the meeting of replicas before a step")


class Ranks(Protocol):
    """What a ParallelModel asks of its ranks. `rows_of_all`: the rows of the replica that has fewest, of a batch with `rows`; see
    `runtime/agreement.py` for its arguments.
    """

    @property
    def loss_scale(self) -> LossScale | None: ...
    def rows_of_all(self, shape: str, rows: int, refusal: str | None = None) -> int: ...
    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool) -> torch.Tensor: ...
    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[RankRecord]]: ...
    def forward(self, batch: Mapping[str, torch.Tensor]) -> Tensors | None: ...
    def train(self, mode: bool) -> None: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor: ...
    def reductions(self) -> dict[str, int]: ...
    def state_dict(self) -> Tensors: ...
    def replicated(self, values: Tensors) -> Tensors: ...
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None: ...
    def assign(self, values: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def whole_tensors(self) -> Tensors | None: ...
    def close(self) -> None: ...


def _program(plan: Plan, rank: int) -> Any:
    return load_program(plan.source(rank), f"<autopar plan {plan.identity} rank {rank}>")


def _requires_grad(traced: Traced) -> Callable[[str], bool]:
    return lambda name: traced.state[name].requires_grad


def whole_state(traced: Traced) -> Mapping[str, torch.Tensor]:
    """Every tensor that programs read, whole: the user's, in the plan's precision, and constants."""
    return ChainMap(traced.constants, traced.state)  # type: ignore[arg-type]


def _counts_here(plan: Plan, coords: Mapping[str, int], name: str) -> bool:
    """True if this rank's piece is the one to count in a norm: one replica's (with ZeRO each one's part), one copy of a whole tensor, the
    first stage of a tied one.
    """
    first = plan.stages[stage_of_parameter(plan)[name]]
    if plan.stage_ranks[first.index] != coords["pp"] or (coords.get("dp", 0) != 0 and not plan.zero):
        return False
    return split_axis(first.parameters[name], plan) is not None or coords.get("tp", 0) == 0


def _normed(plan: Plan, coords: Mapping[str, int], held: HeldGradients) -> list[tuple[torch.Tensor, bool]]:
    """A rank's gradients, and whether they count in a norm. BadArgument while they are not summed."""
    held.check_summed("clip_grad_norm_")
    return [(each.grad, _counts_here(plan, coords, name)) for name, each in held.updated.items() if each.grad is not None]


def _norm_dtype(traced: Traced) -> torch.dtype:
    return norm_dtype(value for value in traced.state.values() if value.requires_grad)


def _loss_scale(plan: Plan, like: Ranks | None) -> LossScale | None:
    """All forms of the call share one."""
    if like is not None:
        return like.loss_scale
    return LossScale() if PRECISIONS[plan.precision].scales_loss else None


def _loadable(plan: Plan, traced: Traced, state_dict: Mapping[str, torch.Tensor], wanted: Mapping[str, str]) -> Tensors:
    """The values for `wanted` (name -> notation) from a state dict that may use any alias. DifferentModel if it does not fit."""
    by_first: Tensors = {}
    known = {*traced.state, *traced.constants}
    for name, tensor in state_dict.items():
        by_first[plan.aliases.get(name, name)] = tensor
    check_names({name: None for name in by_first if name not in known}, (), "the state dict") if any(
        n not in known for n in by_first
    ) else None
    missing = [
        name for name in wanted if name not in by_first and name in traced.state and name not in traced.constants
    ]
    if missing:
        check_names({name: None for name in wanted if name not in missing}, wanted, "the state dict")
    for name, text in wanted.items():
        if name in by_first:
            check_shape(name, by_first[name], [int(size) for size in parse_notation(text, tuple(plan.mesh))[0]])
    return {name: by_first[name] for name in wanted if name in by_first}


def _shards_of(plan: Plan, rank: int, parameters: Mapping[str, nn.Parameter]) -> ParameterShards | None:
    """This rank's shards over dp of its parameters; None where it holds them whole."""
    if not plan.zero or "dp" not in plan.mesh:
        return None
    return ParameterShards(parameters, plan.mesh["dp"], plan.coords(rank)["dp"], plan.zero)


def _handed_out(
    plan: Plan, parameters: Mapping[str, nn.Parameter], shards: ParameterShards | None
) -> Iterator[tuple[str, nn.Parameter]]:
    """What an optimizer updates: a rank's parameters, or its shards of them."""
    for name, parameter in {**parameters, **(shards.of if shards is not None else {})}.items():
        text = plan.parameter_notation.get(name)
        if text is not None and any(isinstance(p, Shard) for p in parse_notation(text, plan.mesh)[1].values()):
            register_piece(parameter, name)
        yield name, parameter


def _assign(target: torch.Tensor, value: torch.Tensor, name: str, shards: ParameterShards | None) -> torch.Tensor:
    """Copy in place, into the rank's shard where it has one; a tensor without values is replaced."""
    if shards is not None and name in shards.of and not target.is_meta:
        shards.load(name, value)
        return target
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(value)
        return target
    value = value.detach().to(target.dtype).clone()
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def _shared_buffers(plan: Plan, traced: Traced, rank: int, device: torch.device, shared: Tensors) -> Tensors:
    """The buffers of a rank for another form of the call: the user's are shared, constants are the form's own."""
    coords = plan.coords(rank)
    found: Tensors = {}
    for name, text in plan.rank_state(rank)[1].items():
        if name in traced.state and name in shared:
            found[name] = shared[name]
        else:
            found[name] = local_piece(whole_state(traced)[name], text, plan, coords).to(device)
    return found


def _assign_piece(
    plan: Plan, coords: Mapping[str, int], texts: Mapping[str, str], name: str, value: torch.Tensor,
    tables: tuple[dict[str, nn.Parameter], Tensors], shards: ParameterShards | None,
) -> None:  # fmt: skip
    """This rank's piece of a whole value, if it holds one."""
    for tensors in tables:
        if name in tensors:
            filled = None if shards is not None and shards.on_meta else shards
            piece = local_piece(value, texts[name], plan, coords)
            tensors[name] = _assign(tensors[name], piece, name, filled)  # type: ignore[assignment]


class ThreadedRanks:
    """All ranks as threads of this process."""

    def __init__(
        self, plan: Plan, traced: Traced, device: torch.device, seed: int, like: ThreadedRanks | None = None,
        compile: Compile = False,
    ) -> None:  # fmt: skip
        self.plan, self.traced, self.device, self.seed, self.compile = plan, traced, device, seed, compile
        if like is None:
            pairs = [
                local_tensors(plan, rank, whole_state(traced), device, _requires_grad(traced))
                for rank in range(plan.num_ranks)
            ]
            self.parameters_of = [parameters for parameters, _ in pairs]
            self.buffers_of = [buffers for _, buffers in pairs]
            self.shards_of = [_shards_of(plan, rank, parameters) for rank, parameters in enumerate(self.parameters_of)]
            self.held_of = list(map(HeldGradients, self.parameters_of, self.shards_of))
        else:
            self.parameters_of, self.shards_of, self.held_of = like.parameters_of, like.shards_of, like.held_of
            self.buffers_of = [
                _shared_buffers(plan, traced, rank, device, shared) for rank, shared in enumerate(like.buffers_of)
            ]
        self.loss_scale = _loss_scale(plan, like)
        self._threads: ThreadRanks | None = None
        self._training = True

    def _started(self) -> ThreadRanks:
        if self._threads is None:
            for parameters, buffers in zip(self.parameters_of, self.buffers_of, strict=True):
                require_values([*parameters.items(), *buffers.items()])
            programs = [_program(self.plan, rank) for rank in range(self.plan.num_ranks)]
            self._threads = ThreadRanks(
                programs,
                self.parameters_of,
                self.buffers_of,
                self.plan.mesh,
                self.plan.microbatches,
                device=self.device,
                seed=self.seed,
                compile=self.compile,
                held_per_rank=self.held_of,
                loss_scale=self.loss_scale,
            )
        return self._threads

    def rows_of_all(self, shape: str, rows: int, refusal: str | None = None) -> int:
        return rows // self.plan.mesh.get("dp", 1)

    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool) -> torch.Tensor:
        with self._scaling(accumulate):
            return self._run("step", batch, accumulate=accumulate)

    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[RankRecord]]:
        with self._scaling(False):
            return self._run("profile", batch)

    def _scaling(self, accumulate: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.loss_scale is None else self.loss_scale.step(self.held_of, self.device, accumulate=accumulate)

    def _run(self, method: str, batch: Mapping[str, torch.Tensor], **options: bool) -> Any:
        threads = self._started()
        threads.train(self._training)
        return getattr(threads, method)(batch, **options)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Tensors | None:
        results = self._run("forward", batch)
        outputs: Tensors = {}
        for name, text in self.plan.stages[-1].outputs.items():
            replicas = [
                _whole_output(self.plan, text, [results[rank][name] for rank in self._ranks_of(len(self.plan.stages) - 1, replica)])
                for replica in range(self.plan.mesh.get("dp", 1))
            ]
            outputs[name] = join(name, text, replicas, self.plan.mesh)
        return outputs

    def _ranks_of(self, stage: int, replica: int = 0) -> list[int]:
        """The ranks of a stage in one replica, in order of their coords on tp."""
        held = [(rank, self.plan.coords(rank)) for rank in range(self.plan.num_ranks)]
        return [
            rank for rank, coords in held if coords["pp"] == self.plan.stage_ranks[stage] and coords.get("dp", 0) == replica
        ]

    def train(self, mode: bool) -> None:
        self._training = mode

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        alone = self.plan.num_ranks == 1
        for rank, parameters in enumerate(self.parameters_of):
            for name, parameter in _handed_out(self.plan, parameters, self.shards_of[rank]):
                yield (name if alone else f"rank {rank}: {name}"), parameter

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        gradients = [
            pair for rank, held in enumerate(self.held_of) for pair in _normed(self.plan, self.plan.coords(rank), held)
        ]
        part = norm_part(gradients, norm_type, self.device)
        parameters = (parameter for _, parameter in self.named_parameters())
        return clip_by_part(parameters, part, max_norm, norm_type, error_if_nonfinite, _norm_dtype(self.traced))

    def reductions(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for worker in self._threads.workers if self._threads is not None else ():
            found |= worker.reductions
        return dict(found)

    def whole(self, name: str, of: str = "value") -> torch.Tensor | None:
        """A whole parameter or buffer (or with of="grad" its gradient) from its first stage's ranks; None for no gradient."""
        stage = stage_of_parameter(self.plan)[name]
        pieces = []
        for place, rank in enumerate(self._ranks_of(stage)):
            tensor = {**self.parameters_of[rank], **self.buffers_of[rank]}[name]
            piece = tensor.grad if of == "grad" else tensor.detach()
            shards = [
                held.of[name] for replica in range(self.plan.mesh.get("dp", 1))
                if (held := self.shards_of[self._ranks_of(stage, replica)[place]]) is not None and name in held.of
            ]  # fmt: skip
            if shards and of == "grad":
                parts = [shard.grad for shard in shards if shard.grad is not None]
                piece = joined(parts, tensor.shape) if parts else None
            elif shards:
                piece = joined(shards, tensor.shape)
            if piece is None:
                return None
            pieces.append(piece)
        return gather_whole(self.plan, name, text_of(self.plan.stages[stage], name), pieces).clone()

    def whole_tensors(self) -> Tensors | None:
        found = {name: self.whole(name) for name in stage_of_parameter(self.plan)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def state_dict(self) -> Tensors:
        whole = self.whole_tensors() or {}
        whole = {name: tensor for name, tensor in whole.items() if name in self.traced.state}
        return whole | {alias: whole[name] for alias, name in self.plan.aliases.items() if name in whole}

    def replicated(self, values: Tensors) -> Tensors:
        return {name: value.clone() for name, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        wanted = {
            name: text_of(stage, name) for stage in self.plan.stages for name in (*stage.parameters, *stage.buffers)
        }
        values = _loadable(
            self.plan,
            self.traced,
            state_dict,
            {n: t for n, t in wanted.items() if n in state_dict or n in self.plan.parameter_notation},
        )
        for rank in range(self.plan.num_ranks):
            coords = self.plan.coords(rank)
            for tensors in (self.parameters_of[rank], self.buffers_of[rank]):
                for name in list(tensors):
                    if name in values:
                        piece = local_piece(values[name], wanted[name], self.plan, coords)
                        tensors[name] = _assign(tensors[name], piece, name, self.shards_of[rank])  # type: ignore[assignment]
        self._renew()

    def _renew(self) -> None:
        """Shards of parameters that have got values."""
        for shards, parameters in zip(self.shards_of, self.parameters_of, strict=True):
            if shards is not None:
                shards.renew(parameters)

    def assign(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Each rank's piece of whole values of the model, one at a time."""
        for name, value in values:
            for rank in range(self.plan.num_ranks):
                placed, others = self.plan.rank_state(rank)
                _assign_piece(
                    self.plan, self.plan.coords(rank), {**placed, **others}, name, value.to(self.device),
                    (self.parameters_of[rank], self.buffers_of[rank]), self.shards_of[rank],
                )  # fmt: skip
        self._renew()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()


def _whole_output(plan: Plan, text: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    from passes.placement import Partial, is_padded, whole_tensor

    kind, sharding = parse_type(text, plan.mesh)
    axis, placement = next(((a, p) for a, p in sharding.items() if isinstance(p, (Shard, Partial))), ("", None))
    if placement is None:
        return pieces[0]
    size = kind.shape[placement.dim] if isinstance(placement, Shard) else 0
    return whole_tensor(pieces, placement, int(size) if is_padded(size, placement, plan.mesh[axis]) else None)


def _shared_text(plan: Plan) -> str:
    """What the plans of all ranks must have alike. Replicas' example batches, and so predictions and microbatches, may differ in rows."""
    stages = [[*stage.parameters.items(), *stage.buffers.items()] for stage in plan.stages]
    shared = repr((plan.mesh, plan.stage_ranks, plan.zero, plan.precision, plan.inputs, stages))
    return hashlib.blake2b(shared.encode(), digest_size=3).hexdigest()


class ProcessRank:
    """This process as one rank of a job."""

    def __init__(
        self, plan: Plan, traced: Traced, device: torch.device, seed: int, like: ProcessRank | None = None,
        compile: Compile = False,
    ) -> None:  # fmt: skip
        self.plan, self.traced, self.seed, self.compile = plan, traced, seed, compile
        self.world: World = World.from_environment(plan.mesh, device=device, plan=_shared_text(plan)) if like is None else like.world
        self.rank, self.coords = self.world.rank, self.world.coords
        if like is None:
            self.parameters, self.buffers = local_tensors(
                plan, self.rank, whole_state(traced), self.world.device, _requires_grad(traced)
            )
            self._begin_alike()
            self.shards = _shards_of(plan, self.rank, self.parameters)
            self.held = HeldGradients(self.parameters, self.shards)
        else:
            self.parameters, self.shards, self.held = like.parameters, like.shards, like.held
            self.buffers = _shared_buffers(plan, traced, self.rank, self.world.device, like.buffers)
        placed, others = plan.rank_state(self.rank)
        self._texts = {**placed, **others}
        self.loss_scale = _loss_scale(plan, like)
        self._worker: Worker | None = None
        self._training = True

    def _begin_alike(self) -> None:
        """All replicas begin with the first one's values, whatever each process's model has, as in DistributedDataParallel."""
        replicas = self.world.axis("dp")
        if replicas.size > 1:
            for tensor in (*self.parameters.values(), *self.buffers.values()):
                if not tensor.is_meta:
                    tensor.detach().copy_(replicas.broadcast(tensor.detach().contiguous(), 0))

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            require_values([*self.parameters.items(), *self.buffers.items()])
            self._worker = Worker(
                _program(self.plan, self.rank), self.world, self.parameters, self.buffers,
                seed=self.seed, compile=self.compile, held=self.held, loss_scale=self.loss_scale,
            )  # fmt: skip
        return self._worker

    def rows_of_all(self, shape: str, rows: int, refusal: str | None = None) -> int:
        replicas = self.world.axis("dp")
        if replicas.size == 1 or self.world.closed:
            return rows
        self.world.board.show(_MEETING)
        try:
            return agree(replicas, shape, rows, refusal, self.world.device)
        except TransferFailed as error:
            suspects, reason = error.suspects, str(error)
        raise self.world.lost(suspects, reason)

    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool) -> torch.Tensor:
        with self._scaling(accumulate):
            return self.worker.step(batch, accumulate=accumulate)

    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[RankRecord]]:
        with self._scaling(False):
            loss, record = self.worker.profile(batch)
        records: list[RankRecord] = [record] * self.plan.num_ranks
        if self.plan.num_ranks > 1:
            dist.all_gather_object(records, record)
        return loss, records

    def _scaling(self, accumulate: bool) -> AbstractContextManager[None]:
        self.worker.train(self._training)
        if self.loss_scale is None:
            return nullcontext()
        return self.loss_scale.step([self.held], self.world.device, self._axes(), accumulate=accumulate)

    def _axes(self) -> list[Axis]:
        return [self.world.axis(name) for name in self.plan.mesh]

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Tensors | None:
        self.worker.train(self._training)
        outputs = self.worker.forward(batch)
        if self.coords["pp"] != self.plan.stage_ranks[-1]:
            return None
        return {name: self._whole_output(text, outputs[name]) for name, text in self.plan.stages[-1].outputs.items()}

    def _whole_output(self, text: str, piece: torch.Tensor) -> torch.Tensor:
        _, sharding = parse_type(text, tuple(self.plan.mesh))
        if not sharding:
            return piece
        axis = self.world.axis(next(iter(sharding)))
        return _whole_output(self.plan, text, list(axis.all_gather(piece.contiguous()).unbind(0)))

    def train(self, mode: bool) -> None:
        self._training = mode

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return _handed_out(self.plan, self.parameters, self.shards)

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        part = norm_part(_normed(self.plan, self.coords, self.held), norm_type, self.world.device)
        part = over_axes(part, norm_type, [axis.all_gather for axis in self._axes()])
        parameters = (parameter for _, parameter in self.named_parameters())
        return clip_by_part(parameters, part, max_norm, norm_type, error_if_nonfinite, _norm_dtype(self.traced))

    def reductions(self) -> dict[str, int]:
        return dict(self.worker.reductions)

    def _refresh(self) -> None:
        """Bring whole parameters up to date with all replicas' shards. All ranks take part."""
        if self.shards is not None and not self.shards.on_meta:
            self.shards.refresh(self.world.axis("dp"))

    def _value(self, name: str) -> torch.Tensor:
        """This rank's piece of a tensor; with ZeRO 3 all replicas take part."""
        if self.shards is not None and self.shards.gathers and name in self.shards.of and not self.shards.on_meta:
            return self.shards.gathered([name], self.world.axis("dp"))[name]
        return {**self.parameters, **self.buffers}[name].detach()

    def _pieces(self, name: str) -> torch.Tensor:
        """The pieces of a tensor that this rank holds, [axis size, ...]; all ranks of its pipeline rank take part."""
        tensor = self._value(name)
        found = split_axis(self._texts[name], self.plan)
        if found is None:
            return tensor[None]
        axis = self.world.axis(found[0])
        tensor = padded_piece(tensor, self._texts[name], self.plan, self.coords)
        pieces = tensor.new_empty((axis.size, *tensor.shape))
        pieces[axis.coord] = tensor
        for coord in range(
            axis.size
        ):  # piece by piece: a gather over gloo takes more than the whole tensor's memory again
            axis.broadcast(pieces[coord], coord)
        return pieces

    def _gathered(self, name: str) -> torch.Tensor:
        """A whole tensor of this rank's stages; all ranks of its pipeline rank take part."""
        return gather_whole(self.plan, name, self._texts[name], self._pieces(name).unbind(0))

    def whole_tensors(self) -> Tensors | None:
        """Rank 0 gets them all, one at a time, and puts them together; None on the others, which hold one parameter's pieces at most."""
        self._refresh()
        found: Tensors = {}
        collects = self.rank == 0
        sends = not collects and all(coord == 0 for axis, coord in self.coords.items() if axis != "pp")
        for tag, (name, stage) in enumerate(stage_of_parameter(self.plan).items()):
            text, holder = text_of(self.plan.stages[stage], name), self.plan.stage_ranks[stage]
            if self.coords["pp"] == holder:
                pieces = self._pieces(name)
                if sends:
                    self.world.wait(self.world.send(pieces.contiguous(), 0, tag), 0)
            elif collects:
                split = split_axis(text, self.plan)
                count = 1 if split is None else self.plan.mesh[split[0]]
                dtype = whole_state(self.traced)[name].dtype
                pieces = torch.empty((count, *local_shape_of(text, self.plan)), dtype=dtype, device=self.world.device)
                self.world.wait(self.world.recv(pieces, holder, tag), holder)
            else:
                continue
            if collects:
                found[name] = gather_whole(self.plan, name, text, pieces.unbind(0)).clone()
            del pieces
        return found if collects else None

    @cached_property
    def _device_mesh(self) -> DeviceMesh:
        """The ranks that hold pieces and copies of what this one holds: axes tp and, with data parallelism, dp."""
        from torch.distributed.device_mesh import DeviceMesh

        axes, shape = list(self.plan.mesh), list(self.plan.mesh.values())
        held = [axis for axis in ("tp", "dp") if axis in axes]
        ordered = [*(axis for axis in axes if axis not in held), *held]
        ranks = torch.arange(math.prod(shape)).view(shape).permute([axes.index(axis) for axis in ordered])
        return DeviceMesh(self.world.device.type, ranks.contiguous(), mesh_dim_names=tuple(ordered))[tuple(held)]

    def state_dict(self) -> Tensors:
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as DShard

        if not dist.is_initialized():
            return {name: self._value(name) for name in (*self.parameters, *self.buffers)}
        self._refresh()
        mesh = self._device_mesh
        found: Tensors = {}
        for name in (*self.parameters, *self.buffers):
            if name not in self.traced.state:
                continue
            local = self._value(name)
            split = split_axis(self._texts[name], self.plan)
            whole = tuple(self.traced.state[name].shape)
            if split is None:
                value = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
            else:
                placement = split[1]
                assert isinstance(placement, Shard)
                if placement.segments != 1 or placement.piece:  # DTensor knows contiguous shards only, in pieces of ceil(size / axis)
                    axis_size, coord = self.plan.mesh[split[0]], self.coords[split[0]]
                    contiguous = local_shard(self._gathered(name), Shard(placement.dim), axis_size=axis_size, coord=coord)
                    local = contiguous.contiguous()
                stride = torch.empty(whole, device="meta").stride()
                placements = [DShard(placement.dim), *[Replicate()] * (mesh.ndim - 1)]
                value = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride
                )
            found[name] = value
        return found | {alias: found[name] for alias, name in self.plan.aliases.items() if name in found}

    def replicated(self, values: Tensors) -> Tensors:
        from torch.distributed.tensor import DTensor, Replicate

        if self.coords.get("pp", 0) != 0 or not dist.is_initialized():
            return dict(values) if self.coords.get("pp", 0) == 0 else {}
        mesh, device = self._device_mesh, self.world.device
        placements = [Replicate()] * mesh.ndim
        return {n: DTensor.from_local(value.to(device), mesh, placements, run_check=False) for n, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        placed = self.plan.rank_state(self.rank)[0]
        wanted = {name: text for name, text in self._texts.items() if name in state_dict or name in placed}
        values = _loadable(self.plan, self.traced, state_dict, wanted)
        for tensors in (self.parameters, self.buffers):
            for name in list(tensors):
                if name in values:
                    piece = local_piece(full_value(values[name]).to(self.world.device), wanted[name], self.plan, self.coords)
                    tensors[name] = _assign(tensors[name], piece, name, self.shards)  # type: ignore[assignment]
        if self.shards is not None:
            self.shards.renew(self.parameters)

    def assign(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """This rank's piece of whole values of the model, one at a time."""
        tensors = (self.parameters, self.buffers)
        for name, value in values:
            _assign_piece(self.plan, self.coords, self._texts, name, value.to(self.world.device), tensors, self.shards)
        if self.shards is not None:
            self.shards.renew(self.parameters)

    def close(self) -> None:
        self.world.close()

"""This process as one rank of a job."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from autopar.clipping import clip_by_part, norm_part, over_axes
from autopar.plan import Plan
from autopar.ranks import (
    Tensors,
    assign_piece,
    assigned,
    handed_out,
    loadable,
    loss_scale_for,
    model_norm_dtype,
    normed_gradients,
    rank_program,
    shared_buffers,
    tensors_of_rank,
    whole_output,
    whole_state,
)
from autopar.runtime.agreement import agree
from autopar.runtime.axis import Axis, TransferFailed
from autopar.runtime.board import padded
from autopar.runtime.compiled import Compile
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.record import RankRecord
from autopar.runtime.worker import Worker
from autopar.runtime.world import World
from autopar.state import (
    full_value,
    gather_whole,
    local_piece,
    padded_piece,
    require_values,
    split_axis,
    stage_of_parameter,
    text_of,
)  # fmt: skip
from autopar.trace import Traced
from passes.placement import Shard, local_shape_of, local_shard, parse_type

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


_MEETING = padded("the meeting of replicas before a step")


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
            self.parameters, self.buffers, self.shards = tensors_of_rank(
                plan, traced, self.rank, self.world.device, self._of_first_replica
            )
            self.held = HeldGradients(self.parameters, self.shards)
        else:
            self.parameters, self.shards, self.held = like.parameters, like.shards, like.held
            self.buffers = shared_buffers(plan, traced, self.rank, self.world.device, like.buffers)
        placed, others = plan.rank_state(self.rank)
        self._texts = {**placed, **others}
        self.loss_scale = loss_scale_for(plan, like)
        self._worker: Worker | None = None
        self._training = True

    def _of_first_replica(self, value: torch.Tensor) -> torch.Tensor:
        """All replicas begin with the first one's values, whatever each process's model has, as in DistributedDataParallel."""
        replicas = self.world.axis("dp")
        return replicas.broadcast(value.contiguous(), 0) if replicas.size > 1 else value

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            require_values([*self.parameters.items(), *self.buffers.items()])
            try:
                self._worker = Worker(
                    rank_program(self.plan, self.rank), self.world, self.parameters, self.buffers,
                    seed=self.seed, compile=self.compile, held=self.held, loss_scale=self.loss_scale,
                )  # fmt: skip
            except BaseException as error:
                self.world.failed(error)  # the others do not wait for this rank
                raise
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
        return whole_output(self.plan, text, list(axis.all_gather(piece.contiguous()).unbind(0)))

    def train(self, mode: bool) -> None:
        self._training = mode

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return handed_out(self.plan, self.parameters, self.shards, together=False)

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        part = norm_part(normed_gradients(self.plan, self.coords, self.held), norm_type, self.world.device)
        part = over_axes(part, norm_type, [axis.all_gather for axis in self._axes()])
        parameters = (parameter for _, parameter in self.named_parameters())
        return clip_by_part(parameters, part, max_norm, norm_type, error_if_nonfinite, model_norm_dtype(self.traced))

    def reductions(self) -> dict[str, int]:
        return dict(self.worker.reductions)

    def _refresh(self) -> None:
        """Bring whole parameters up to date with all replicas' shards. All ranks take part."""
        if self.shards is not None and not any(shard.is_meta for shard in self.shards.of.values()):
            self.shards.expect(self.world.axis("dp"))
            self.shards.refresh()

    def _gathering(self, name: str) -> ParameterShards | None:
        """What has to be gathered for a parameter's value: with ZeRO 3."""
        return self.shards if self.shards is not None and self.shards.gathers and name in self.shards.of else None

    def _value(self, name: str) -> torch.Tensor:
        """This rank's piece of a tensor; with ZeRO 3 all replicas take part."""
        shards = self._gathering(name)
        if shards is not None and not shards.of[name].is_meta:
            return shards.gathered(name, self.world.axis("dp"))
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
                pieces = torch.empty((count, *local_shape_of(text, self.plan.mesh)), dtype=dtype, device=self.world.device)
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
                value = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)
            if self._gathering(name) is not None and value.ndim:
                value = self._over_replicas(value)
            found[name] = value
        return found | {alias: found[name] for alias, name in self.plan.aliases.items() if name in found}

    def _over_replicas(self, value: DTensor) -> DTensor:
        """The same with dim 0 split over dp, so that a state dict of ZeRO 3 never holds more than one whole tensor."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as DShard

        local, axis = value.to_local(), self.world.axis("dp")
        rows = -(-local.shape[0] // axis.size)  # as DTensor cuts
        mine = local[rows * axis.coord : rows * (axis.coord + 1)].clone()
        placements = [*value.placements[:-1], DShard(0)]  # the mesh's last dim is dp
        return DTensor.from_local(mine, value.device_mesh, placements, run_check=False, shape=value.shape, stride=value.stride())

    def replicated(self, values: Tensors) -> Tensors:
        from torch.distributed.tensor import DTensor, Replicate

        if self.coords.get("pp", 0) != 0 or not dist.is_initialized():
            return dict(values) if self.coords.get("pp", 0) == 0 else {}
        mesh, device = self._device_mesh, self.world.device
        placements = [Replicate()] * mesh.ndim
        return {n: DTensor.from_local(value.to(device), mesh, placements, run_check=False) for n, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        values = loadable(self.plan, self.traced, state_dict, self._texts)
        for tensors in (self.parameters, self.buffers):
            for name in list(tensors):
                if name in values:
                    piece = local_piece(full_value(values[name]).to(self.world.device), self._texts[name], self.plan, self.coords)
                    tensors[name] = assigned(tensors[name], piece, name, self.shards)  # type: ignore[assignment]

    def assign(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """This rank's piece of whole values of the model, one at a time."""
        tensors = (self.parameters, self.buffers)
        for name, value in values:
            assign_piece(self.plan, self.coords, self._texts, name, value.to(self.world.device), tensors, self.shards)

    def close(self) -> None:
        self.world.close()

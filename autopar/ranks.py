"""What a ParallelModel asks of its ranks, and what both kinds of them share: all ranks as threads of this process
(`autopar.threaded_ranks`), or this process as one of them (`autopar.process_rank`).
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from autopar.clipping import norm_dtype
from autopar.plan import Plan
from autopar.precision import PRECISIONS
from autopar.program import load_program
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.optimizers import register_part
from autopar.runtime.parameter_shards import ParameterShards, is_shared_out
from autopar.runtime.record import RankRecord
from autopar.runtime.scaling import LossScale
from autopar.shared_copies import counts_here
from autopar.state import (
    check_names,
    check_shape,
    local_piece,
    local_tensors,
    stage_of_parameter,
)  # fmt: skip
from autopar.trace import Traced
from costmodel.mesh import REPLICA_AXIS
from passes.ir import is_state
from passes.placement import Partial, Shard, is_padded, parse_notation, parse_type, whole_tensor

Tensors = dict[str, torch.Tensor]


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


def rank_program(plan: Plan, rank: int) -> Any:
    return load_program(plan.source(rank), f"<autopar plan {plan.identity} rank {rank}>")


def requires_grad_of(traced: Traced) -> Callable[[str], bool]:
    return lambda name: traced.state[name].requires_grad


def whole_state(traced: Traced) -> Mapping[str, torch.Tensor]:
    """Every tensor that programs read, whole: the user's, in the plan's precision, and constants."""
    return ChainMap(traced.constants, traced.state)  # type: ignore[arg-type]


def normed_gradients(plan: Plan, coords: Mapping[str, int], held: HeldGradients) -> list[tuple[torch.Tensor, bool]]:
    """A rank's gradients, and whether they count in a norm. BadArgument while they are not summed."""
    held.check_summed("clip_grad_norm_")
    stages = stage_of_parameter(plan)
    return [(each.grad, counts_here(plan, coords, name, stages[name])) for name, each in held.updated.items() if each.grad is not None]


def model_norm_dtype(traced: Traced) -> torch.dtype:
    return norm_dtype(value for value in traced.state.values() if value.requires_grad)


def loss_scale_for(plan: Plan, like: Ranks | None) -> LossScale | None:
    """All forms of the call share one."""
    if like is not None:
        return like.loss_scale
    return LossScale() if PRECISIONS[plan.precision].scales_loss else None


def loadable(plan: Plan, traced: Traced, state_dict: Mapping[str, torch.Tensor], held: Mapping[str, str]) -> Tensors:
    """The values for `held` (name -> notation) from a state dict that may use any alias and may lack buffers that are not persistent.
    DifferentModel if it does not fit.
    """
    transient = {str(node.target) for node in traced.graph_module.graph.nodes if is_state(node) and not node.meta["persistent"]}
    wanted = {name: text for name, text in held.items() if name in state_dict or name not in transient}
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


def shards_for(plan: Plan, rank: int, parameters: Mapping[str, nn.Parameter]) -> ParameterShards | None:
    """This rank's shards over dp of its parameters; None where it holds them whole."""
    if not plan.zero or "dp" not in plan.mesh:
        return None
    coords = plan.coords(rank)
    placed = [stage.parameters for stage in plan.stages if plan.stage_ranks[stage.index] == coords["pp"]]
    return ParameterShards(parameters, placed, plan.mesh, coords["dp"], plan.zero)


def tensors_of_rank(
    plan: Plan, traced: Traced, rank: int, device: torch.device, alike: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
) -> tuple[dict[str, nn.Parameter], Tensors, ParameterShards | None]:
    """(parameters, buffers, shards over dp) of a rank. What is sharded is cut one tensor at a time, so that beside the shards never more
    than one whole one is alive. `alike`: what all replicas begin with, of this one's value.
    """
    state, trained = whole_state(traced), requires_grad_of(traced)
    placed = plan.rank_state(rank)[0]
    sharded = {name for name in placed if is_shared_out(trained(name), plan.zero)} if "dp" in plan.mesh else set()
    begun = ChainMap({name: state[name].to("meta") for name in sharded}, state)  # type: ignore[arg-type]
    parameters, buffers = local_tensors(plan, rank, begun, device, trained)
    for name, tensor in (*parameters.items(), *buffers.items()):
        if name not in sharded and not tensor.is_meta:
            tensor.detach().copy_(alike(tensor.detach()))
    shards = shards_for(plan, rank, parameters)
    for name in shards.whole if shards is not None else ():
        if not state[name].is_meta:
            piece = local_piece(state[name], placed[name], plan, plan.coords(rank)).to(device)
            parameters[name] = shards.load(name, alike(piece))  # type: ignore[union-attr]
    return parameters, buffers, shards


def handed_out(
    plan: Plan, parameters: Mapping[str, nn.Parameter], shards: ParameterShards | None, *, together: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    """What an optimizer updates: a rank's parameters, or its shards of them. `together`: with those of all other ranks."""
    has_all = together or math.prod(size for axis, size in plan.mesh.items() if axis != REPLICA_AXIS) == 1
    for name, parameter in {**parameters, **(shards.of if shards is not None else {})}.items():
        text = plan.parameter_notation.get(name)
        if text is not None and any(isinstance(p, Shard) for p in parse_notation(text, plan.mesh)[1].values()):
            register_part(parameter, "piece" if together else "piece apart", name)
        elif not has_all:
            register_part(parameter, "stage", name)
        yield name, parameter


def assigned(target: torch.Tensor, value: torch.Tensor, name: str, shards: ParameterShards | None) -> torch.Tensor:
    """Copy in place, into the rank's shard where it has one; a tensor without values is replaced."""
    if shards is not None and name in shards.of:
        return shards.load(name, value)
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(value)
        return target
    value = value.detach().to(target.dtype).clone()
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def shared_buffers(plan: Plan, traced: Traced, rank: int, device: torch.device, shared: Tensors) -> Tensors:
    """The buffers of a rank for another form of the call: the user's are shared, constants are the form's own."""
    coords = plan.coords(rank)
    found: Tensors = {}
    for name, text in plan.rank_state(rank)[1].items():
        if name in traced.state and name in shared:
            found[name] = shared[name]
        else:
            found[name] = local_piece(whole_state(traced)[name], text, plan, coords).to(device)
    return found


def assign_piece(
    plan: Plan, coords: Mapping[str, int], texts: Mapping[str, str], name: str, value: torch.Tensor,
    tables: tuple[dict[str, nn.Parameter], Tensors], shards: ParameterShards | None,
) -> None:  # fmt: skip
    """This rank's piece of a whole value, if it holds one."""
    for tensors in tables:
        if name in tensors:
            piece = local_piece(value, texts[name], plan, coords)
            tensors[name] = assigned(tensors[name], piece, name, shards)  # type: ignore[assignment]


def whole_output(plan: Plan, text: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    """The whole output from its pieces on the ranks of the axis that it is on; `text` is its type in the notation."""
    kind, sharding = parse_type(text, plan.mesh)
    axis, placement = next(((a, p) for a, p in sharding.items() if isinstance(p, (Shard, Partial))), ("", None))
    if placement is None:
        return pieces[0]
    size = kind.shape[placement.dim] if isinstance(placement, Shard) else 0
    return whole_tensor(pieces, placement, int(size) if is_padded(size, placement, plan.mesh[axis]) else None)

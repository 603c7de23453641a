"""A rank's share of the model's state, and the way back to whole tensors.

A rank holds its pieces of the parameters and buffers of its stages, nothing else: each is cut out of the user's tensor and copied, so
that the user's model is never modified and, beside the shards, at most one whole tensor is alive at a time. A piece has true entries
only, so the last ranks' may be shorter or empty; programs pad what they read (`passes.placement`), state never does. Pieces that travel
together are padded to one length, and cut again when they are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autopar.plan import Plan, StagePlan
from costmodel.errors import DifferentModel, WeightsMissing
from passes.placement import Placement, Shard, local_shard, pad_piece, parse_notation, whole_tensor

Tensors = dict[str, torch.Tensor]


def split_axis(text: str, plan: Plan) -> tuple[str, Placement] | None:
    """(axis, placement) of a tensor in the notation if it is split, else None."""
    _, sharding = parse_notation(text, plan.mesh)
    return next(((axis, p) for axis, p in sharding.items() if isinstance(p, Shard)), None)


def local_piece(whole: torch.Tensor, text: str, plan: Plan, coords: Mapping[str, int]) -> torch.Tensor:
    """A rank's own copy of its piece of a whole tensor."""
    found = split_axis(text, plan)
    if found is None:
        return whole.detach().clone()
    axis, placement = found
    piece = local_shard(whole.detach(), placement, axis_size=plan.mesh[axis], coord=coords[axis])
    return piece.clone(memory_format=torch.contiguous_format)


def local_tensors(
    plan: Plan, rank: int, state: Mapping[str, torch.Tensor], device: torch.device, requires_grad: Callable[[str], bool]
) -> tuple[dict[str, nn.Parameter], Tensors]:
    """(parameters, buffers) of a rank, cut out of the whole tensors in `state`. Meta tensors give empty meta pieces."""
    placed, others = plan.rank_state(rank)
    coords = plan.coords(rank)
    parameters: dict[str, nn.Parameter] = {}
    for name, text in placed.items():
        piece = local_piece(state[name], text, plan, coords).to(device if not state[name].is_meta else "meta")
        parameters[name] = nn.Parameter(piece, requires_grad=requires_grad(name))
    buffers = {
        name: local_piece(state[name], text, plan, coords).to(device if not state[name].is_meta else "meta")
        for name, text in others.items()
    }
    return parameters, buffers


def require_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """WeightsMissing if any tensor is on the meta device."""
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise WeightsMissing(
            f"{len(missing)} parameters and buffers have no values, {missing[0]} first", why="the model was built on the meta device",
            use="par.initialize(seed) before the first step, and then par.load_state_dict(...) for a checkpoint, which has no values of "
            "buffers that are not persistent; or a model with weights",
        )  # fmt: skip


def gather_whole(plan: Plan, name: str, text: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from its pieces, padded or not, in order of coords on the axis that splits it."""
    shape, sharding = parse_notation(text, plan.mesh)
    shard = next((p for p in sharding.values() if isinstance(p, Shard)), None)
    return pieces[0] if shard is None else whole_tensor(list(pieces), shard, int(shape[shard.dim]))


def padded_piece(piece: torch.Tensor, text: str, plan: Plan, coords: Mapping[str, int]) -> torch.Tensor:
    """A rank's piece with zeros behind it, as long as every other rank's."""
    shape, sharding = parse_notation(text, plan.mesh)
    found = next(((axis, p) for axis, p in sharding.items() if isinstance(p, Shard)), None)
    if found is None:
        return piece
    axis, shard = found
    return pad_piece(piece, shard, int(shape[shard.dim]), axis_size=plan.mesh[axis], coord=coords[axis])


def stage_of_parameter(plan: Plan) -> dict[str, int]:
    """The first stage that holds each parameter and buffer."""
    found: dict[str, int] = {}
    for stage in plan.stages:
        for name in (*stage.parameters, *stage.buffers):
            found.setdefault(name, stage.index)
    return found


def text_of(stage: StagePlan, name: str) -> str:
    """A parameter's or buffer's placement in the notation."""
    return stage.parameters[name] if name in stage.parameters else stage.buffers[name]


def full_value(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what a DTensor is of; all ranks of its mesh take part."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_names(given: Mapping[str, Any], expected: Iterable[str], what: str) -> None:
    """DifferentModel if names are missing or unknown."""
    expected = set(expected)
    missing, unknown = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing or unknown:
        raise DifferentModel(
            f"{what} is of another model",
            why="; ".join(
                filter(
                    None,
                    (
                        f"missing: {', '.join(missing[:6])}" if missing else "",
                        f"unknown: {', '.join(unknown[:6])}" if unknown else "",
                    ),
                )
            ),
        )


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """DifferentModel if a tensor has another shape than the model's."""
    if tuple(tensor.shape) != tuple(shape):
        raise DifferentModel(f"{name} is {tuple(tensor.shape)}; the model's is {tuple(shape)}")

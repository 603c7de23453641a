"""What a step and an evaluation return: the loss of the whole batch on every rank, outputs of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autopar.runtime.chunk import LOSS
from autopar.runtime.world import PIPELINE_AXIS, World
from costmodel.errors import BadArgument
from costmodel.mesh import REPLICA_AXIS
from passes.ir import size_symbol
from passes.placement import parse_type

_LOSS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def share_loss(
    losses: Sequence[torch.Tensor], dtype: torch.dtype | None, source: int, world: World
) -> tuple[torch.Tensor, torch.dtype]:
    """(loss, its dtype): the sum of the microbatches' and replicas' shares, from pipeline rank `source`, which has them, to all.

    `dtype` None: not known yet. It goes along as a number that is read once, since reading one off a GPU waits for it.
    """
    axis = world.axis(PIPELINE_AXIS)
    message = torch.zeros(2, dtype=torch.float64, device=world.device)
    total: torch.Tensor | None = None
    if losses:
        total = _sum(losses)
        dtype = total.dtype
        message[0] = total
        message[1] = _LOSS_DTYPES.index(dtype)
        replicas = world.axis(REPLICA_AXIS)
        if replicas.size > 1:
            message[0] = replicas.all_reduce(message[0])
            total = message[0].to(dtype)
    if axis.size > 1:
        axis.broadcast(message, source)
    if dtype is None:
        dtype = _LOSS_DTYPES[int(message[1])]
    return (message[0].to(dtype) if total is None else total), dtype


def join(name: str, type_text: str, pieces: Sequence[torch.Tensor], mesh: Mapping[str, int]) -> torch.Tensor:
    """One output of the whole batch from its microbatches'. BadArgument if it has no rows and they differ."""
    if name == LOSS:
        return _sum(pieces)
    if len(pieces) == 1:
        return pieces[0]
    value, _ = parse_type(type_text, tuple(mesh))
    for dim, size in enumerate(value.shape):
        if not isinstance(size, int) and size_symbol("B") in size.free_symbols:
            return torch.cat(list(pieces), dim)
    if all(torch.equal(piece, pieces[0]) for piece in pieces[1:]):
        return pieces[0]
    raise BadArgument(
        f"The output {name!r} cannot be put together from the {len(pieces)} of microbatches or replicas.",
        why=f"{type_text} has no rows, and they differ",
        use="microbatches=1, and replicas as processes of their own (torchrun) or dp=1",
    )

"""RESHARDS: how a value moves from the placement it has to the one that is wanted. One row each: the function, its
gradient, its bytes.

The functions are what emitted programs call. They talk to an `Axis`, a mesh axis as one rank sees it; the runtime
implements it over
torch.distributed, so this package stays free of process groups.

There is no row that makes a `Partial` out of a whole value: it would only postpone an all_reduce, and move roundings
about.

Padding (see `passes.placement`): where the axis does not divide a dim, its true `size` is an argument, and `unit` where units of the dim
stay together. What makes pieces puts zeros behind the true entries, what puts pieces together leaves the padding out; gradients likewise.
Without `size` a dim that the axis does not divide is an error: a sequence that does not fit, at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from costmodel.collectives import (
    AnyLink,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    reduce_scatter_seconds,
)
from costmodel.errors import UnevenShard
from costmodel.hardware import Hardware
from passes.placement import (
    Copied,
    Partial,
    Placement,
    Replicate,
    Shard,
    divides,
    in_units,
    is_whole,
    local_shard,
    whole_tensor,
)  # fmt: skip

Segments = int | tuple[int, ...]
Sizes = tuple[int | None, int | None]
UNPADDED: Sizes = (None, None)


class Axis(Protocol):
    """One mesh axis as a rank sees it. Tensors passed in are contiguous and left as they are."""

    name: str
    size: int
    coord: int

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor: ...
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor: ...  # [*shape] -> [size, *shape]
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor: ...  # [size, *shape] -> [*shape]
    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor: ...  # [size, *shape] -> [size, *shape]


@dataclass(frozen=True)
class _Split:
    """How a dim is split: its placement, and its true size if the pieces are padded."""

    placement: Shard
    size: int | None = None

    @classmethod
    def of(cls, axis: Axis, dim: int, segments: Segments, size: int | None, unit: Segments) -> _Split:
        segments, unit = (tuple(given) if isinstance(given, (list, tuple)) else given for given in (segments, unit))
        if size is None:
            return cls(Shard(dim, segments))
        return cls(in_units(dim, size, segments, unit, axis_size=axis.size), size)


def _piece(x: torch.Tensor, axis: Axis, split: _Split, coord: int) -> torch.Tensor:
    """A rank's piece of a whole tensor. UnevenShard if it would have padding and the split knows of none."""
    placement = split.placement
    if split.size is None and not divides(x.shape[placement.dim], placement.segments, axis.size):
        raise UnevenShard(
            f"cannot split dim {placement.dim} of {tuple(x.shape)} in blocks {placement.segments} over {axis.size} ranks"
        )
    return local_shard(x, placement, axis_size=axis.size, coord=coord, padded=True)


def _pieces(x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
    return torch.stack([_piece(x, axis, split, coord) for coord in range(axis.size)])


def _gather(x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
    pieces = axis.all_gather(x.contiguous())
    if split.placement.dim == 0 and split.placement.segments == 1:
        together = pieces.flatten(0, 1)
        return together if split.size is None else together.narrow(0, 0, split.size)
    return whole_tensor(pieces.unbind(0), split.placement, split.size)


def _scatter_sum(x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
    return axis.reduce_scatter(_pieces(x, axis, split))


def _mine(x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
    return _piece(x, axis, split, axis.coord).contiguous()


def _in_place(x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
    """The whole tensor, zero but for this rank's piece."""
    pieces = [x if coord == axis.coord else torch.zeros_like(x) for coord in range(axis.size)]
    return whole_tensor(pieces, split.placement, split.size)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.axis.all_reduce(grads[0].contiguous()), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, partial_gradient: bool) -> torch.Tensor:
        ctx.axis, ctx.partial_gradient = axis, partial_gradient
        return axis.all_reduce(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if ctx.partial_gradient:
            return ctx.axis.all_reduce(grads[0].contiguous()), None, None
        return grads[0], None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, axis: Axis, split: _Split, partial_gradient: bool
    ) -> torch.Tensor:
        ctx.rest, ctx.partial_gradient = (axis, split), partial_gradient
        return _gather(x, axis, split)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        back = _scatter_sum if ctx.partial_gradient else _mine
        return back(grads[0], *ctx.rest), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, split: _Split) -> torch.Tensor:
        ctx.rest = (axis, split)
        return _scatter_sum(x, axis, split)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gather(grads[0], *ctx.rest), None, None


class _TakeShard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, axis: Axis, split: _Split, partial_gradient: bool
    ) -> torch.Tensor:
        ctx.rest, ctx.partial_gradient = (axis, split), partial_gradient
        return _mine(x, axis, split)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        back = _in_place if ctx.partial_gradient else _gather
        return back(grads[0], *ctx.rest), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, have: _Split, want: _Split) -> torch.Tensor:
        ctx.rest = (axis, want, have)
        return _exchange(x, axis, have, want)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _exchange(grads[0], *ctx.rest), None, None, None


def _exchange(x: torch.Tensor, axis: Axis, have: _Split, want: _Split) -> torch.Tensor:
    pieces = axis.all_to_all(_pieces(x, axis, want))
    return whole_tensor(pieces.unbind(0), have.placement, have.size)


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] if ctx.axis.coord == 0 else torch.zeros_like(grads[0]), None


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The value as it is; its gradient is all-reduced. Replicate -> Copied, the entry of a column-parallel region."""
    return _CopyTo.apply(x, axis)


def all_reduce(x: torch.Tensor, axis: Axis, *, partial_gradient: bool = False) -> torch.Tensor:
    """The sum over the axis; its gradient passes as it is (all-reduced too if partial). Partial -> Replicate
    (Copied)."""
    return _AllReduce.apply(x, axis, partial_gradient)


def all_gather(
    x: torch.Tensor, axis: Axis, *, dim: int, segments: Segments = 1, size: int | None = None, unit: Segments = 1,
    partial_gradient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The whole value from its shards; the gradient is sliced (reduce-scattered if partial). Shard -> Replicate
    (Copied)."""
    return _AllGather.apply(x, axis, _Split.of(axis, dim, segments, size, unit), partial_gradient)


def reduce_scatter(
    x: torch.Tensor, axis: Axis, *, dim: int, segments: Segments = 1, size: int | None = None, unit: Segments = 1
) -> torch.Tensor:
    """This rank's shard of the sum; the gradient is gathered. Partial -> Shard."""
    return _ReduceScatter.apply(x, axis, _Split.of(axis, dim, segments, size, unit))


def take_shard(
    x: torch.Tensor, axis: Axis, *, dim: int, segments: Segments = 1, size: int | None = None, unit: Segments = 1,
    partial_gradient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """This rank's shard of a whole value; the gradient is gathered (left in its place among zeros if partial).
    Replicate (Copied) -> Shard."""
    return _TakeShard.apply(x, axis, _Split.of(axis, dim, segments, size, unit), partial_gradient)


def all_to_all(x: torch.Tensor, axis: Axis, *, have: tuple[Any, ...], want: tuple[Any, ...]) -> torch.Tensor:
    """A value split along one dim, split along another; `have` and `want` are (dim, segments), and (dim, segments, size, unit) where
    padded. The gradient goes back the same way."""
    given = [(*split, None, 1)[:4] if len(split) == 2 else tuple(split) for split in (have, want)]
    return _AllToAll.apply(x, axis, *(_Split.of(axis, *split) for split in given))


def own_gradient(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The value as it is; of the equal gradients only the first rank's counts. Copied -> Replicate."""
    return _OwnGradient.apply(x, axis)


@dataclass(frozen=True)
class Reshard:
    """One row: from `have` to `want` by `function`; which collective runs forward and which in backward ("" for none).

    `arguments(have, want, sizes)`: what the function is called with; `sizes` are the true sizes of the dims that `have` and `want`
    split, None where they are not padded.

    `regroups`: splits a whole value or a sum, or gathers a split one, outside of what a matmul does by itself. That
    is how activations
    between the matmuls get split (sequence parallelism and its kin over features); it is only used where a plan asks
    for it.
    """

    have: type
    want: type
    function: Callable[..., torch.Tensor]
    arguments: Callable[[Any, Any, Sizes], dict[str, Any]]
    forward: str
    backward: str
    regroups: bool = False


def _split_of(placement: Shard, size: int | None) -> tuple[Any, ...]:
    """(dim, segments), and the true size and the unit where pieces are padded."""
    plain = (placement.dim, placement.segments)
    return plain if size is None else (*plain, size, placement.unit)


def _shard_of(placement: Shard, size: int | None) -> dict[str, Any]:
    dim, segments, *padded = _split_of(placement, size)
    options = {"segments": segments} if segments != 1 else {}
    if padded:
        options |= {"size": padded[0]} | ({"unit": padded[1]} if placement.piece else {})
    return {"dim": dim} | options


_PARTIAL_GRADIENT = {"partial_gradient": True}

RESHARDS: tuple[Reshard, ...] = (
    Reshard(Replicate, Copied, copy_to, lambda have, want, sizes: {}, "", "all_reduce"),
    Reshard(Copied, Replicate, own_gradient, lambda have, want, sizes: {}, "", ""),
    Reshard(Partial, Replicate, all_reduce, lambda have, want, sizes: {}, "all_reduce", ""),
    Reshard(Partial, Copied, all_reduce, lambda have, want, sizes: _PARTIAL_GRADIENT, "all_reduce", "all_reduce"),
    Reshard(
        Partial, Shard, reduce_scatter, lambda have, want, sizes: _shard_of(want, sizes[1]),
        "reduce_scatter", "all_gather", regroups=True,
    ),
    Reshard(
        Shard, Replicate, all_gather, lambda have, want, sizes: _shard_of(have, sizes[0]), "all_gather", "", regroups=True
    ),
    Reshard(
        Shard, Copied, all_gather, lambda have, want, sizes: _shard_of(have, sizes[0]) | _PARTIAL_GRADIENT,
        "all_gather", "reduce_scatter", regroups=True,
    ),
    Reshard(
        Replicate, Shard, take_shard, lambda have, want, sizes: _shard_of(want, sizes[1]), "", "all_gather", regroups=True
    ),
    Reshard(
        Copied, Shard, take_shard, lambda have, want, sizes: _shard_of(want, sizes[1]) | _PARTIAL_GRADIENT, "", "",
        regroups=True,
    ),
    Reshard(
        Shard, Shard, all_to_all,
        lambda have, want, sizes: {"have": _split_of(have, sizes[0]), "want": _split_of(want, sizes[1])},
        "all_to_all", "all_to_all", regroups=True,
    ),
)  # fmt: skip

_BY_KINDS = {(row.have, row.want): row for row in RESHARDS}
_SECONDS = {
    "all_reduce": all_reduce_seconds,
    "all_gather": all_gather_seconds,
    "reduce_scatter": reduce_scatter_seconds,
    "all_to_all": all_to_all_seconds,
}


def find_reshard(have: Placement, want: Placement) -> Reshard | None:
    """The row that leads from `have` to `want`; None if there is none. Other blocks of the same dim cannot be
    exchanged."""
    if isinstance(have, Shard) and isinstance(want, Shard) and have.dim == want.dim:
        return None
    return _BY_KINDS.get((type(have), type(want)))


def collective_seconds(collective: str, *, num_bytes: float, axis_size: int, link: AnyLink) -> float:
    """Seconds of a named collective on a value of `num_bytes` whole bytes; 0 for ""."""
    return _SECONDS[collective](num_bytes=num_bytes, axis_size=axis_size, link=link) if collective else 0.0


def reshard_seconds(
    have: Placement,
    want: Placement,
    *,
    num_bytes: float,
    axis_size: int,
    hardware: Hardware,
    link: AnyLink,
    trainable: bool,
    regroup: bool = True,
) -> float:
    """Forward plus backward seconds of moving a value of `num_bytes` (whole) from `have` to `want`; inf if there is
    no way.
    `regroup=False` leaves out the rows that split or gather activations between the matmuls.

    Beside the collective itself, pieces that are not contiguous in memory (any dim but the first, fused dims) cost
    one read and one
    write of the whole value where they are put together or taken apart.
    """
    if have == want or (
        not trainable and is_whole(have) and is_whole(want)
    ):
        return 0.0
    row = find_reshard(have, want)
    if row is None or (row.regroups and trainable and not regroup):
        return float("inf")
    seconds = collective_seconds(row.forward, num_bytes=num_bytes, axis_size=axis_size, link=link)
    if trainable:
        seconds += collective_seconds(row.backward, num_bytes=num_bytes, axis_size=axis_size, link=link)
    shards = [p for p in (have, want) if isinstance(p, Shard)]
    copies = sum(1 for p in shards if p.dim != 0 or p.segments != 1) * (2 if trainable else 1)
    return seconds + copies * (2 * num_bytes / hardware.memory_bandwidth_bytes_per_second + hardware.launch_seconds)

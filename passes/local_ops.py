"""Ops that need more than their shard: what one rank computes when the vocabulary of an embedding or of a cross
entropy is split, or
the channels of a batch norm.

Each is the `local=` rewrite of one rule. They talk to an `Axis` and are called by emitted programs. `size` is the true size
of the split dim where the axis does not divide it; `pad_shard` is how every other op reads such a parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from passes.placement import Shard, held, in_units, local_shard, pad_piece, piece_sizes, together, whole_tensor
from passes.reshard import Axis, Segments


def pad_shard(
    shard: torch.Tensor, axis: Axis, *, dim: int, size: int, segments: Segments = 1, unit: Segments = 1
) -> torch.Tensor:
    """A parameter's shard with zeros behind it, as long as every other rank's; the shard itself where nothing is missing.

    The parameter's dim of `size` is split in `segments` whose `unit`s stay together. The gradient of the zeros is dropped.
    """
    segments, unit = (tuple(given) if isinstance(given, (list, tuple)) else given for given in (segments, unit))
    split = in_units(dim, size, segments, unit, axis_size=axis.size)
    return pad_piece(shard, split, size, axis_size=axis.size, coord=axis.coord)


def _valid(axis: Axis, size: int) -> tuple[int, int]:
    """(first, how many) of the entries of a split dim of `size` that this rank has."""
    (piece,) = piece_sizes([size], Shard(0), axis.size)
    return axis.coord * piece, held([size], [piece], axis.coord)[0]


def _require_in_range(indices: torch.Tensor, count: int, ignored: int | None = None) -> None:
    """What no rank has would be silence on all of them. No wait for the device: it stops there, as a whole lookup does."""
    known = (indices >= 0) & (indices < count)
    torch._assert_async((known if ignored is None else known | (indices == ignored)).all(), "index out of range")


def sharded_embedding(
    weight: torch.Tensor, indices: torch.Tensor, axis: Axis, *, padding_idx: int = -1, size: int | None = None
) -> torch.Tensor:
    """Rows of a table whose dim 0 is split over `axis`: this rank's summand of the result, zero where another rank
    has the row.

    `padding_idx` is the row of the whole table that gets no gradient (-1: none). `size`: how many rows the whole table has, where
    that is not as many on each rank; `weight` then has this rank's rows, with or without padding behind them.
    """
    size = weight.shape[0] * axis.size if size is None else size
    _require_in_range(indices, size)
    first, count = _valid(axis, size)
    local = indices - first
    elsewhere = (local < 0) | (local >= count)
    if padding_idx >= 0:
        # that row's value is wanted but its gradient is not; which row it is differs per shard
        mine = padding_idx - first
        keep = mine if 0 <= mine < count else None
    else:
        keep = None
    if weight.shape[0] == 0:  # a row to look up where the rank has none
        weight = together([weight], [1], 0)
    rows = F.embedding(local.masked_fill(elsewhere, 0), weight)
    if keep is not None:
        rows = torch.where((local == keep).unsqueeze(-1), rows.detach(), rows)
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)


def sharded_batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, axis: Axis,
    *, training: bool, momentum: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Batch norm of this rank's channels. The running statistics are whole on every rank and are kept so: what a rank
    has learnt of its
    channels is told to the others (one all_gather of both).
    """
    if running_mean is None or running_var is None:
        return F.batch_norm(x, None, None, weight, bias, training, momentum, eps)
    states = torch.stack([running_mean, running_var])
    mine = local_shard(states, Shard(1), axis_size=axis.size, coord=axis.coord).contiguous()
    result = F.batch_norm(x, mine[0], mine[1], weight, bias, training, momentum, eps)
    if training:
        states = whole_tensor(axis.all_gather(mine).unbind(0), Shard(1))
        running_mean.copy_(states[0])
        running_var.copy_(states[1])
    return result


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        axis: Axis,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        size: int | None,
    ) -> torch.Tensor:
        dim = 1 if logits.ndim > 1 else 0
        ctx.padded_to = logits.shape[dim]
        num_classes = logits.shape[dim] * axis.size if size is None else size
        first, num_local = _valid(axis, num_classes)
        logits = logits.narrow(dim, 0, max(num_local, 1))
        if num_local == 0:  # none of the classes are this rank's: one that is impossible
            logits = torch.full_like(logits, float("-inf"))
        _require_in_range(target, num_classes, ignore_index)
        largest = axis.all_reduce(logits.amax(dim).contiguous(), "max")
        shifted = logits - largest.unsqueeze(dim)
        exponentials = shifted.exp()
        local = target - first
        elsewhere = (local < 0) | (local >= num_local)
        local = local.masked_fill(elsewhere, 0).unsqueeze(dim)
        predicted = shifted.gather(dim, local).squeeze(dim).masked_fill(elsewhere, 0.0)
        sums = [exponentials.sum(dim), predicted] + ([shifted.narrow(dim, 0, num_local).sum(dim)] if label_smoothing else [])
        total, predicted, *rest = axis.all_reduce(torch.stack(sums)).unbind(0)
        log_total = total.log()
        losses = log_total - predicted
        if label_smoothing:
            losses = (1 - label_smoothing) * losses + label_smoothing * (log_total - rest[0] / num_classes)
        ignored = target == ignore_index
        losses = losses.masked_fill(ignored, 0.0)
        count = (~ignored).sum().to(logits.dtype)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(dim)), local, elsewhere, ignored, count)
        ctx.num_local = num_local
        ctx.dim, ctx.reduction, ctx.label_smoothing, ctx.num_classes = dim, reduction, label_smoothing, num_classes
        if reduction == 0:
            return losses
        return losses.sum() / count if reduction == 1 else losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        probabilities, local, elsewhere, ignored, count = ctx.saved_tensors
        dim, smoothing = ctx.dim, ctx.label_smoothing
        scale = grads[0] / count if ctx.reduction == 1 else grads[0]
        scale = (scale if ctx.reduction == 0 else scale.expand(ignored.shape)).masked_fill(ignored, 0.0).unsqueeze(dim)
        grad = probabilities * scale
        one_hot = scale * (1 - smoothing)
        grad.scatter_add_(dim, local, -one_hot.masked_fill(elsewhere.unsqueeze(dim), 0.0))
        if smoothing:
            grad -= scale * (smoothing / ctx.num_classes)
        if ctx.num_local != ctx.padded_to:
            grad = together([grad.narrow(dim, 0, ctx.num_local)], [ctx.padded_to], dim)
        return grad, None, None, None, None, None, None


def sharded_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    axis: Axis,
    *,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    size: int | None = None,
) -> torch.Tensor:
    """Cross entropy of logits whose class dim is split over `axis`, without ever gathering them; the same result on
    every rank.

    logits f[N, C/axis, ...], target i64[N, ...]. Two all_reduces of [N] values: the largest logit, then the sums.
    `reduction` is ATen's: 0 none, 1 mean over the targets that are not ignored, 2 sum. `size`: how many classes there are, where the
    last ranks' logits are padded; what stands there counts for nothing.
    """
    return _ShardedCrossEntropy.apply(logits, target, axis, reduction, ignore_index, label_smoothing, size)

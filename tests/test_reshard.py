"""Every row of RESHARDS on real gloo groups keeps what the pieces mean, of the value and of its gradient."""

import itertools

import pytest
import torch
from rank_threads import rank_threads

from costmodel.errors import UnevenShard
from costmodel.hardware import hardware
from passes.placement import (
    COPIED,
    PARTIAL,
    REPLICATE,
    Copied,
    Partial,
    Placement,
    Replicate,
    Shard,
    in_units,
    is_padded,
    local_shard,
    whole_tensor,
)
from passes.reshard import RESHARDS, UNPADDED, find_reshard, reshard_seconds, take_shard

SHAPE = (12, 6, 18)
UNEVEN = (18, 7, 12)  # on 4 ranks: 18 rows, 7 columns, 6 heads of 2
SHARDS = [Shard(0), Shard(1), Shard(2), Shard(0, 2), Shard(2, 3), Shard(0, (6, 6)), Shard(2, (6, 12))]
DUAL: dict[type, Placement] = {
    Replicate: REPLICATE,
    Copied: PARTIAL,
    Partial: REPLICATE,
}  # what a gradient's pieces mean


def spread(whole: torch.Tensor, placement: Placement, axis_size: int) -> list[torch.Tensor]:
    if placement == PARTIAL:
        parts = [torch.randn_like(whole) for _ in range(axis_size - 1)]
        return [*parts, whole - sum(parts)]
    return [local_shard(whole, placement, axis_size=axis_size, coord=coord, padded=True) for coord in range(axis_size)]


def check_means(pieces: list[torch.Tensor], placement: Placement, whole: torch.Tensor) -> None:
    if isinstance(placement, Shard):
        pieces = [whole_tensor(pieces, placement, whole.shape[placement.dim])]
    for together in [whole_tensor(pieces, placement)] if isinstance(placement, Partial) else pieces:
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-12)


def choices(kind: type) -> list[Placement]:
    return list(SHARDS) if kind is Shard else [{Replicate: REPLICATE, Copied: COPIED, Partial: PARTIAL}[kind]]


def padded_sizes(shape: tuple[int, ...], placements: tuple[Placement, Placement], axis_size: int) -> tuple[int | None, ...]:
    """The true sizes of the dims that are split, where they are padded."""
    sizes = [shape[p.dim] if isinstance(p, Shard) else 0 for p in placements]
    return tuple(size if is_padded(size, p, axis_size) else None for size, p in zip(sizes, placements, strict=True))


def check_row(row, have: Placement, want: Placement, axis_size: int, shape: tuple[int, ...] = SHAPE) -> None:
    value, gradient = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    pieces = spread(value, have, axis_size)
    gradients = spread(gradient, DUAL.get(type(want), want), axis_size)
    sizes = padded_sizes(shape, (have, want), axis_size)
    if isinstance(have, Shard) and sizes[0] is not None:  # what stands in padding must not matter
        mask = spread(torch.ones(shape, dtype=torch.bool), have, axis_size)
        pieces = [torch.where(true, piece, 1e3) for piece, true in zip(pieces, mask, strict=True)]

    def run(axis):
        x = pieces[axis.coord].clone().requires_grad_()
        y = row.function(x, axis, **row.arguments(have, want, sizes))
        (grad,) = torch.autograd.grad(y, x, gradients[axis.coord])
        assert torch.equal(x, pieces[axis.coord])  # not changed in place
        return y.detach(), grad

    results, grads = zip(*rank_threads(axis_size).run(run), strict=True)
    check_means(list(results), want, value)
    check_means(list(grads), DUAL.get(type(have), have), gradient)
    for placement, whole, given in ((want, value, results), (have, gradient, grads)):
        if isinstance(placement, Shard):  # padding that a reshard makes is zero, of values and of gradients
            for found, expected in zip(given, spread(whole, placement, axis_size), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis_size", [2, 3])
@pytest.mark.parametrize("row", RESHARDS, ids=lambda row: f"{row.have.__name__}-{row.want.__name__}")
def test_a_reshard_keeps_the_value_and_the_gradient(row, axis_size):
    torch.manual_seed(0)
    for have, want in itertools.product(choices(row.have), choices(row.want)):
        if find_reshard(have, want) is not None:
            check_row(row, have, want, axis_size)


PADDED = [Shard(0), Shard(1), in_units(2, 12, 1, 2, axis_size=4), Shard(0, (4, 14)), in_units(0, 18, 3, 2, axis_size=4)]


@pytest.mark.parametrize("row", RESHARDS, ids=lambda row: f"{row.have.__name__}-{row.want.__name__}")
def test_a_reshard_of_dims_that_the_axis_does_not_divide(row):
    torch.manual_seed(0)
    choices_of = {Shard: [*PADDED, Shard(2)]}
    for have in choices_of.get(row.have) or choices(row.have):
        for want in choices_of.get(row.want) or choices(row.want):
            if find_reshard(have, want) is not None:
                check_row(row, have, want, 4, UNEVEN)


def test_a_dim_that_does_not_fit_and_was_not_planned_so_is_an_error():
    with pytest.raises(UnevenShard, match="over 2 ranks"):
        rank_threads(2).run(lambda axis: take_shard(torch.zeros(3), axis, dim=0))


def test_a_wrong_row_is_caught():
    """The function of one row in the place of another."""
    caught = 0
    pairs = 0
    for right, wrong in itertools.permutations(RESHARDS, 2):
        have, want = choices(right.have)[0], choices(right.want)[-1]
        if wrong.function is right.function and wrong.arguments(*_own(wrong)) == right.arguments(*_own(right)):
            continue
        pairs += 1
        try:
            swapped = type(right)(
                right.have, right.want, wrong.function, lambda h, w, sizes, row=wrong: row.arguments(*_own(row)), "", ""
            )
            check_row(swapped, have, want, 2)
        except (AssertionError, RuntimeError):
            caught += 1
    assert pairs > 50 and caught == pairs


def _own(row) -> tuple[Placement, Placement, tuple[None, None]]:
    have = choices(row.have)[0]
    return have, next(want for want in reversed(choices(row.want)) if find_reshard(have, want)), UNPADDED


def test_the_pairs_without_a_row_are_the_documented_ones():
    """Nothing makes partial sums out of a whole value; and there is nothing to do between equals."""
    kinds = (Replicate, Copied, Partial, Shard)
    rows = {(row.have, row.want) for row in RESHARDS}
    assert len(rows) == len(RESHARDS)
    missing = set(itertools.product(kinds, kinds)) - rows
    assert missing == {(kind, Partial) for kind in kinds} | {(Replicate, Replicate), (Copied, Copied)}
    for have, want in rows:
        assert find_reshard(choices(have)[0], choices(want)[-1]).want is want
    for have, want in itertools.product(SHARDS, SHARDS):
        assert (find_reshard(have, want) is None) == (have.dim == want.dim)


@pytest.mark.parametrize("trainable", [True, False])
def test_seconds(trainable):
    device = hardware("cpu")
    link = device.link(2)

    def seconds(have: Placement, want: Placement, **options) -> float:
        return reshard_seconds(
            have, want, num_bytes=1e6, axis_size=2, hardware=device, link=link, trainable=trainable, **options
        )

    everything = [REPLICATE, COPIED, PARTIAL, *SHARDS]
    for have, want in itertools.product(everything, everything):
        cost = seconds(have, want)
        if have == want:
            assert cost == 0.0
        elif find_reshard(have, want) is None:
            assert cost == float("inf")
        else:
            assert 0.0 <= cost < 1.0
    assert (seconds(REPLICATE, COPIED) > 0) == trainable  # the gradient's all_reduce
    assert seconds(COPIED, REPLICATE) == 0.0
    assert seconds(PARTIAL, COPIED) == (2 if trainable else 1) * seconds(PARTIAL, REPLICATE)
    assert seconds(Shard(0), REPLICATE) < seconds(Shard(1), REPLICATE)  # pieces of other dims are copied together
    for have, want in [(PARTIAL, Shard(0)), (Shard(0), REPLICATE), (REPLICATE, Shard(0)), (Shard(0), Shard(1))]:
        assert (seconds(have, want, regroup=False) == float("inf")) == trainable

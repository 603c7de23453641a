"""Interleaved 1F1B: each rank has several stages, v of them, and takes turns with them.

Design note. Rank r of p has the stages r, p + r, 2p + r and so on. It runs the microbatches in groups: a group through
its first stage, then through its second, ...; forwards ascend the stages, backwards descend them, and after a warm-up
one of each alternate (Narayanan et al. 2021, Megatron-LM, section 2.2). With groups of exactly p the first result
comes back around the ring just when it is needed, and the bubble shrinks by v.

The published schedule needs a multiple of p microbatches. Here any count is split into as many groups as have at least
p, of sizes as equal as can be, larger ones first: a group larger than p never waits for its own result either, and so
the bubble stays the published one for every count from p on. It costs memory instead, a microbatch a further stage for
each one that the first group is larger than p. Below p there is one group, and the stages are one pipeline of p v.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from passes.instructions import Backward, Compute, Forward


def groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """The microbatches in groups of at least `num_ranks`, or all in one; sizes differ by at most one, larger first."""
    count = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, count)
    bounds = [index * size + min(index, larger) for index in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _warm_up(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> int:
    """The forwards before the first backward's forward: the first group up to its last stage, and the way back."""
    ahead = (virtual_stages - 1) * len(groups(num_ranks, num_microbatches)[0]) + 2 * (num_ranks - 1 - rank)
    return min(ahead, num_microbatches * virtual_stages)


def interleaved_1f1b(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Iterator[Compute]:
    """Groups of microbatches through stage after stage of the rank; after a warm-up a forward and a backward in turn."""
    split = groups(num_ranks, num_microbatches)
    forwards = [Forward(one, chunk) for group in split for chunk in range(virtual_stages) for one in group]
    backwards = [Backward(one, chunk) for group in split for chunk in reversed(range(virtual_stages)) for one in group]
    ahead = _warm_up(rank, num_ranks, num_microbatches, virtual_stages)
    yield from forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - ahead :]


def forwards(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
    """Evaluation: the forwards alone, with the same bubble in a step of forwards."""
    for group in groups(num_ranks, num_microbatches):
        for chunk in range(virtual_stages):
            yield from (Forward(microbatch, chunk) for microbatch in group)


def in_flight(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> int:
    """The warm-up and the forward after it. In whole microbatches, at rank 0 and a multiple of p: p + (p - 1) / v."""
    total = num_microbatches * virtual_stages
    return min(_warm_up(rank, num_ranks, num_microbatches, virtual_stages) + 1, total)


def bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Fraction:
    """(p - 1) / (m v + p - 1); below p microbatches that of a pipeline of p v stages, seen by a rank with v of them."""
    idle = _idle(num_ranks, num_microbatches, virtual_stages)
    return Fraction(idle, num_microbatches * virtual_stages + idle)


def bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float:
    """(p - 1) forwards and backwards of a stage, which are 1 / v of a rank's; more below p microbatches."""
    return _idle(num_ranks, num_microbatches, virtual_stages) * (forward + inputs + weights)


def idle(num_ranks: int, num_microbatches: int, virtual_stages: int) -> tuple[tuple[int, int, int], ...] | None:
    """Over the whole step it is the same, where the ranks divide the microbatches and a backward takes up to four forwards."""
    if num_microbatches % num_ranks:
        return None
    turns = _idle(num_ranks, num_microbatches, virtual_stages)
    return ((turns, turns, turns),)


def _idle(num_ranks: int, num_microbatches: int, virtual_stages: int) -> int:
    """The stages' turns that a rank idles: p - 1, and v for each microbatch below p, where it fills no turn."""
    missing = max(0, num_ranks - num_microbatches)
    return num_ranks - 1 + (virtual_stages - 1) * missing

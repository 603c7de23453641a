"""DualPipeV: two stages a rank, down the ranks and up again, a forward of one beside a backward of the other.

Design note. The schedule of the DualPipe repository (arXiv 2412.19437), in its V form, which keeps one copy of the parameters. In its
main part a rank pairs a forward of one stage with a backward of its other, so that the transfers of one can hide
behind the computes of the other; the weight gradients are split off only where that fills a gap.

Published for the bubble is (p - 1)(F&B + B - 3 W), with B the whole backward and F&B a pair run as one, whose results
come at its end. Here the two of a pair run one after the other and the forward's result leaves before the backward
begins. For F = 1, B = 2, W = 1 that leaves p - 1 of the 2 (p - 1) that the formula gives for F&B = F + B; the tests
hold this, and that with pairs run as one the published figure comes out. Both need 2p microbatches, as the original
demands; with fewer those that are not there are left out, and no figure is stated.

In flight are at most 2p + 1 microbatches of a stage, with 2p stages: "PP + 1" there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from fractions import Fraction

from passes.instructions import Backward, BackwardInput, BackwardWeight, Compute, Forward


def dualpipe_v(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Iterator[Compute]:
    """The eight parts of DualPipeV, in its words: 0 is the rank's first stage, 1 its second."""
    count = max(num_microbatches, 2 * num_ranks)
    return (one for one in _dualpipe_v(rank, num_ranks, count) if one.microbatch < num_microbatches)


def _dualpipe_v(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Compute]:
    counts: Counter[tuple[type, int]] = Counter()
    deferred: deque[BackwardWeight] = deque()

    def next_of(cls: type, chunk: int) -> int:
        counts[cls, chunk] += 1
        return counts[cls, chunk] - 1

    def forward(chunk: int) -> Compute:
        return Forward(next_of(Forward, chunk), chunk)

    def backward(chunk: int, split: bool = False) -> Compute:
        microbatch = next_of(Backward, chunk)
        if not split:
            return Backward(microbatch, chunk)
        deferred.append(BackwardWeight(microbatch, chunk))
        return BackwardInput(microbatch, chunk)

    below = num_ranks - 1 - rank
    for _ in range(2 * below):  # F0
        yield forward(0)
    for _ in range(rank + 1):  # F0 F1
        yield forward(0)
        yield forward(1)
    for _ in range(below):  # B1 W1 F1, the weight gradients split off
        yield backward(1, split=True)
        yield deferred.popleft()
        yield forward(1)
    for _ in range(num_microbatches - 2 * num_ranks + rank + 1):  # the main part: F0 with B1, F1 with B0
        yield forward(0)
        yield backward(1)
        yield forward(1)
        yield backward(0)
    for _ in range(below):  # B1, F1 with B0
        yield backward(1)
        yield forward(1)
        yield backward(0)
    # B1 B0: the second half of these is split, from a backward of stage 1 on odd ranks, of stage 0 on even ones.
    half, odd = divmod(rank + 1, 2)
    for place in range(rank + 1):
        yield backward(1, split=place > half or (place == half and not odd))
        yield backward(0, split=place >= half)
    for _ in range(below):  # W B0
        if deferred:
            yield deferred.popleft()
        yield backward(0, split=True)
    while deferred:  # W
        yield deferred.popleft()


def in_flight(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> int:
    """2p + 1 stages' microbatches; with few, all that a rank ever has."""
    return min(2 * num_ranks + 1, 2 * num_microbatches, num_microbatches + rank + 1)


def bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float | None:
    """p - 1 forwards if forward, input and weight gradients take the same time, from 2p microbatches on."""
    if num_microbatches < 2 * num_ranks or not forward == inputs == weights:
        return None
    return (num_ranks - 1) * forward


def idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> tuple[tuple[int, int, int], ...] | None:
    """Over the whole step, as in `passes.zero_bubble`: the most of six sums; (p - 1) F where all three take the same time."""
    later = num_ranks - 1
    if num_microbatches < 2 * num_ranks:
        return None
    return (
        (2 * later, 0, -2 * later), (2 * later, -later, -later), (later, later, -later), (later, 0, 0), (-1, 2 * later, -later),
        (-1, later, 0),
    )  # fmt: skip


def bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Fraction | None:
    """The same over the step."""
    if num_microbatches < 2 * num_ranks:
        return None
    return Fraction(num_ranks - 1, 6 * num_microbatches + num_ranks - 1)

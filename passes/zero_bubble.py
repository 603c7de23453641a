"""Zero-bubble schedules: the backward is split, and the weight gradients, which no stage waits for, fill the gaps.

Design note. BackwardInput sends its result on at once; BackwardWeight comes later, where a rank would idle. The
schedules are those of Qi et al. 2023, "Zero Bubble Pipeline Parallelism". `zb_h1` and `zb_v` hold no
more than 1F1B holds at its first rank, `zb_h2` about twice that.

`zb_h1` is 1F1B with the weight gradients of rank r delayed by r microbatches: the first rank, whose results nobody
waits for, delays none. Each rank then holds p microbatches, and of the three parts of a bubble the one of the weight
gradients turns to work. `zb_h2` runs ahead twice as far and delays twice as long: rank r starts with 2 (p - 1 - r)
forwards more than the last, which fill the time until the first gradient comes, and its weight gradients are 2 r
microbatches behind, which fill the time after the last. Every rank holds 2p - 1 microbatches, and with a forward, the
input gradients and the weight gradients equally long none idles. `zb_v` has two stages a rank, down the ranks and up
again, so that the last stage is on the first rank and the first backward comes back as early as there. With all three
equally long no rank idles between its first and its last compute. Its figures are stated for that case; the paper has
no formula for others, and lets a solver look for better orders then.

The authors measure a bubble from a rank's first compute to its last. Over the whole step every rank idles p - 1
forwards more under zb-h2 and zb-v, before its first compute or after its last.

How long a rank idles over the whole step for any times of equal stages (the `_idle` functions) is in no paper. A step is as long as the
longest path through its computes, so the idle time is the greatest of some sums of forwards, input and weight gradients. They were
found by following all paths at 2 to 8 ranks, and are the same from 2p microbatches on.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from passes.instructions import BackwardInput, BackwardWeight, Compute, Forward


def zb_h1(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
    """1F1B with the weight gradients `rank` microbatches behind the input gradients."""
    return _one_stage(num_ranks - 1 - rank, rank, num_microbatches)


def zb_h2(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
    """Twice as many forwards ahead of the first backward, weight gradients twice as far behind."""
    return _one_stage(2 * (num_ranks - 1 - rank), 2 * rank, num_microbatches)


def _one_stage(ahead: int, behind: int, num_microbatches: int) -> Iterator[Compute]:
    """`ahead` forwards more than backwards, weight gradients `behind` microbatches after the input gradients."""
    ahead = min(ahead, num_microbatches)
    for microbatch in range(ahead):
        yield Forward(microbatch)
    for microbatch in range(num_microbatches):
        if microbatch + ahead < num_microbatches:
            yield Forward(microbatch + ahead)
        yield BackwardInput(microbatch)
        if microbatch >= behind:
            yield BackwardWeight(microbatch - behind)
    for microbatch in range(max(0, num_microbatches - behind), num_microbatches):
        yield BackwardWeight(microbatch)


def zb_h1_bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float | None:
    """(p - 1)(F + B - W) from p microbatches on, as published for F and B of at least W; W counts once per microbatch
    before the last, if those are fewer."""
    if weights > min(forward, inputs):
        return None
    return (num_ranks - 1) * (forward + inputs) - (min(num_ranks, num_microbatches) - 1) * weights


def zb_h1_bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Fraction:
    """The same over the step, for F = B = W = 1."""
    idle = 2 * (num_ranks - 1) - (min(num_ranks, num_microbatches) - 1)
    return Fraction(idle, idle + 3 * num_microbatches)

def zb_h1_idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> tuple[tuple[int, int, int], ...] | None:
    """The most of (p - 1)(F + B - W), (p - 1) F and (p - 1) B."""
    later = num_ranks - 1
    return ((later, later, -later), (later, 0, 0), (0, later, 0)) if num_microbatches >= 2 * num_ranks else None


def zb_h2_in_flight(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> int:
    """2p - 1 on every rank; with few, all."""
    return min(2 * num_ranks - 1, num_microbatches)


def zb_h2_bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float | None:
    """(p - 1)(F + B - 2W) from 2p - 1 microbatches on, as published for F and B of at least W; W counts once per
    microbatch before the last, if those are fewer."""
    if weights > min(forward, inputs):
        return None
    filled = min(2 * (num_ranks - 1), num_microbatches - 1)
    return (num_ranks - 1) * (forward + inputs) - filled * weights


def zb_h2_bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Fraction:
    """Over the step, for F = B = W: (p - 1) / (3 m + p - 1) from 2p - 2 microbatches on."""
    idle = 2 * (num_ranks - 1) - min(num_ranks - 1, num_microbatches // 2)
    return Fraction(idle, idle + 3 * num_microbatches)


def zb_h2_idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> tuple[tuple[int, int, int], ...] | None:
    """The most of (p - 1)(F + B - 2W), (p - 1) F and (p - 1)(B - F)."""
    later = num_ranks - 1
    return ((later, later, -2 * later), (later, 0, 0), (-later, later, 0)) if num_microbatches >= 2 * num_ranks else None


def zb_v(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Iterator[Compute]:
    """Fill the first stage, then both, then alternate between them; weight gradients right away until the end.

    Filling takes 2p - 1 microbatches. With fewer, those that are not there are left out.
    """
    count = max(num_microbatches, 2 * num_ranks - 1)
    return (one for one in _zb_v(rank, num_ranks, count) if one.microbatch < num_microbatches)


def _zb_v(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Compute]:
    down, up = (_Stage(chunk) for chunk in range(2))
    for _ in range(2 * (num_ranks - rank) - 1):
        yield down.forward()
    for _ in range(rank):
        yield up.forward()
        yield down.forward()
    for _ in range(num_ranks - rank):
        yield up.forward()
        yield up.inputs()
        yield up.weights()
    while up.forwards < num_microbatches:
        if down.forwards < num_microbatches:
            yield down.forward()
        yield down.inputs()
        yield down.weights()
        yield up.forward()
        yield up.inputs()
        yield up.weights()
    for _ in range(rank):
        yield down.inputs()
        yield up.inputs()
    for _ in range(num_ranks - rank):
        yield down.inputs()
        yield down.weights()
    for stage in (up, down):
        while stage.deferred:
            yield stage.weights()


class _Stage:
    """Counts one stage's computes."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.forwards = self.backwards = self.added = 0

    @property
    def deferred(self) -> int:
        return self.backwards - self.added

    def forward(self) -> Forward:
        self.forwards += 1
        return Forward(self.forwards - 1, self.chunk)

    def inputs(self) -> BackwardInput:
        self.backwards += 1
        return BackwardInput(self.backwards - 1, self.chunk)

    def weights(self) -> BackwardWeight:
        self.added += 1
        return BackwardWeight(self.added - 1, self.chunk)


def zb_v_in_flight(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> int:
    """2p stages' microbatches, as much as p of 1F1B's stages of twice the size; with few, all that a rank ever has."""
    return min(2 * num_ranks, 2 * num_microbatches, num_microbatches + rank + 1)


def zb_v_bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float | None:
    """0 from 2p - 1 microbatches on if all three take the same time; each one fewer is a forward and a backward less."""
    if not forward == inputs == weights:
        return None
    return 2 * max(0, 2 * num_ranks - 1 - num_microbatches) * forward


def zb_v_bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Fraction:
    """Over the step, for F = B = W: (p - 1) / (6 m + p - 1) from 2p - 1 microbatches on."""
    idle = max(num_ranks - 1, 2 * (2 * num_ranks - 1 - num_microbatches))
    return Fraction(idle, idle + 6 * num_microbatches)


def zb_v_idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> tuple[tuple[int, int, int], ...] | None:
    """The most of eight sums; (p - 1) F where all three take the same time."""
    later = num_ranks - 1
    if num_microbatches < 2 * num_ranks:
        return None
    if num_ranks == 1:
        return ((0, 0, 0),)
    return (
        (2 * later, 0, -2 * later - 1), (2 * later, -later, -1), (2 * later - 1, 1, -2 * later), (2 * later - 1, 1 - later, 0),
        (1, 0, later - 1), (0, 2 * later, -2 * later), (0, later, 0), (0, 1, later - 1),
    )  # fmt: skip

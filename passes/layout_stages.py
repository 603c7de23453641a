"""Whole blocks dealt out to stages: the most even cut, and what each stage of it costs a rank.

The model is a row of units (`passes.layout_rows`), a middle one repeated as often as it stands for. `even_cut` finds the least possible
maximum of the stages' seconds and, among cuts within SLACK of it, the one with the least squared distance from the mean: the aim of
`passes.cut`, at the places between blocks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from costmodel.errors import BadArgument, TooManyStages
from passes.layout_rows import SharedParameter, UnitCost

SLACK = 1.01


def expanded(units: Sequence[UnitCost]) -> list[int]:
    """The unit of every block of the model, in order."""
    return [index for index, unit in enumerate(units) for _ in range(unit.count)]


def even_cut(seconds: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """How many blocks each stage takes. TooManyStages if there are fewer blocks than stages."""
    return _even_cut(tuple(seconds), num_stages)


@lru_cache(maxsize=16384)
def _even_cut(seconds: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    count = len(seconds)
    if num_stages > count:
        raise TooManyStages(
            f"cannot cut the model into {num_stages} pipeline stages of whole blocks", why=f"it has {count} blocks",
            use=f"pp * virtual_stages <= {count}",
        )  # fmt: skip
    if num_stages == 1:
        return (count,)
    sums = [0.0, *accumulate(seconds)]
    limit = _least_maximum(sums, num_stages) * SLACK
    # where stage k may end: the stages up to it, and those after it, are all within the limit
    latest, earliest = [0], [count]
    for k in range(1, num_stages + 1):
        latest.append(min(_furthest(sums, latest[-1], limit), count - num_stages + k))
        earliest.append(max(_nearest(sums, earliest[-1], limit), num_stages - k))
    earliest.reverse()
    mean = sums[-1] / num_stages
    totals, choices = {0: 0.0}, []
    for k in range(1, num_stages + 1):
        choice: dict[int, int] = {}
        found: dict[int, float] = {}
        for end in range(max(earliest[k], k), latest[k] + 1):
            most, best = sums[end], float("inf")
            for start, total in totals.items():
                length = most - sums[start]
                if start < end and length <= limit and (priced := total + (length - mean) ** 2) < best:
                    best, choice[end] = priced, start
            if end in choice:
                found[end] = best
        totals = found
        choices.append(choice)
    ends = [count]
    for choice in reversed(choices):
        ends.append(choice[ends[-1]])
    ends.reverse()
    return tuple(b - a for a, b in pairwise(ends))


def _furthest(sums: Sequence[float], start: int, limit: float) -> int:
    """The last end of a stage from `start` on that takes no more than `limit`; `start` if its first block takes more."""
    end = bisect_right(sums, sums[start] + limit) - 1
    while sums[end] - sums[start] > limit:
        end -= 1
    while end + 1 < len(sums) and sums[end + 1] - sums[start] <= limit:
        end += 1
    return end


def _nearest(sums: Sequence[float], end: int, limit: float) -> int:
    """The first start of a stage up to `end` that takes no more than `limit`."""
    start = bisect_left(sums, sums[end] - limit)
    while sums[end] - sums[start] > limit:
        start += 1
    while start and sums[end] - sums[start - 1] <= limit:
        start -= 1
    return start


def _least_maximum(sums: Sequence[float], num_stages: int) -> float:
    """The least possible maximum of the stages' seconds, to 1e-9 of it.

    A limit that is too low leaves blocks over when every stage takes as many as it can. The next limit to try is the least at which one
    of those stages could take one more: with any below it they would take the same.
    """
    last = len(sums) - 1
    limit = max(max(b - a for a, b in pairwise(sums)), sums[-1] / num_stages)
    while True:
        start, raised = 0, float("inf")
        for _ in range(num_stages):
            start, begin = _furthest(sums, start, limit), start
            if start == last:
                return limit
            raised = min(raised, sums[start + 1] - sums[begin])
        limit = max(raised, limit) * (1 + 1e-12)


@dataclass(frozen=True)
class StageSums:
    """One stage on one rank, for one microbatch: sums over its blocks, and the largest of what only one block at a time has."""

    forward_seconds: float
    backward_seconds: float  # without replays
    weight_seconds: float
    replay_seconds: float
    forward_tensor_seconds: float
    backward_tensor_seconds: float
    replay_tensor_seconds: float
    forward_context_seconds: float
    backward_context_seconds: float
    replay_context_seconds: float
    kept_bytes: float
    cast_bytes: float
    working_bytes: float  # the most that exists beside what is kept, less what backward has let go by then
    making: tuple[tuple[float, int], ...]  # the same while gradients are first made: (bytes, parameters that have theirs already)
    parameters: int
    tied_parameters: int  # of them: those that other stages use too
    largest_block_parameters: int
    sent_bytes: float  # to the next stage
    sent_whole_bytes: float
    block_counts: tuple[tuple[int, int], ...]  # (unit, how many of it)


def _working(
    units: Sequence[UnitCost], shared: Sequence[SharedParameter], counts: Mapping[int, int]
) -> tuple[float, tuple[tuple[float, int], ...]]:
    """`working_bytes` and `making` of a stage, by the first and the last layer of each run, backward."""
    most = let_go = 0.0
    making: list[tuple[float, int]] = []
    done, seen = 0, set[int]()
    for unit, count in reversed(list(counts.items())):
        cost = units[unit]
        most = max(most, cost.adding_bytes - let_go)
        for earlier in {0, count - 1}:
            making.append((cost.making_bytes - let_go - earlier * cost.kept_bytes, done + earlier * cost.parameters))
        let_go += cost.kept_bytes * count
        tied = {k for k, each in enumerate(shared) if unit in each.units} - seen
        seen |= tied
        done += cost.parameters * count + sum(shared[k].numel for k in tied)
    making.append((-let_go, done))
    return most, tuple(making)


_SUMS = (
    "forward_seconds", "backward_seconds", "weight_seconds", "replay_seconds", "forward_tensor_seconds", "backward_tensor_seconds",
    "replay_tensor_seconds", "forward_context_seconds", "backward_context_seconds", "replay_context_seconds", "kept_bytes",
    "cast_bytes",
)  # fmt: skip


def stage_sums(
    units: Sequence[UnitCost], shared: Sequence[SharedParameter], blocks: Sequence[int]
) -> list[StageSums]:
    """What the stages cost that take so many blocks each, in order. BadArgument if they do not take all of them."""
    order = expanded(units)
    if sum(blocks) != len(order) or min(blocks) < 1:
        raise BadArgument(f"stages of {', '.join(map(str, blocks))} blocks", why=f"the model has {len(order)}", use="as many in sum")
    found = []
    known: dict[tuple[object, ...], StageSums] = {}
    place = 0
    for taken in blocks:
        counts: dict[int, int] = {}
        for unit in order[place : place + taken]:
            counts[unit] = counts.get(unit, 0) + 1
        place += taken
        key = (tuple(counts.items()), order[place - 1], place == len(order))
        if key in known:
            found.append(known[key])
            continue
        sums = {name: sum(getattr(units[u], name) * n for u, n in counts.items()) for name in _SUMS}
        own = sum(units[u].parameters * n for u, n in counts.items())
        mine = [each for each in shared if any(unit in counts for unit in each.units)]
        tied = sum(each.numel for each in mine)
        last = place == len(order)
        end = units[order[place - 1]]
        working, making = _working(units, shared, counts)
        found.append(
            StageSums(
                **sums,
                working_bytes=working, making=making, parameters=own + tied,
                tied_parameters=sum(each.numel for each in mine if not counts.keys() >= set(each.units)),
                largest_block_parameters=max(units[u].parameters for u in counts),
                sent_bytes=0.0 if last else end.sent_bytes, sent_whole_bytes=0.0 if last else end.sent_whole_bytes,
                block_counts=tuple(counts.items()),
            )
        )  # fmt: skip
        known[key] = found[-1]
    return found

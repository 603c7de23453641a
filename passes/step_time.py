"""The step time of a schedule for many assignments of times to stages at once: what the cut pass minimises.

Design note. `simulate` (passes/timeline.py) plays one assignment; a search over cuts asks for thousands. Times change when a schedule
does something, not what it does. So its lists are compiled once, into additions and maxima in an order that suits any times, and each
is done for all assignments together, a tensor op on a vector of them. The result is `simulate`'s to rounding (the tests hold it to that).

Lists are made for stages that send to the next one only. A value that skips stages goes straight from where it is made to where it is
used; here that is one more time to wait for. Beyond `_MOST_MICROBATCHES` a rank the steady state repeats: further microbatches take as
long as the last of those that were played, one a rank; the step time is then near to `simulate`'s and not the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from passes.flow import stages_of_ranks
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
)
from passes.order import Lists, placed
from passes.schedules import Schedule
from passes.timeline import Channel, _steps

_MOST_MICROBATCHES = 4  # played, per rank of the pipeline

_Slot = tuple[Channel, int, bool]  # of a send: which channel, and which of its sends


@dataclass(frozen=True, slots=True)
class _Post:
    """A rank has waited for its earlier sends, and begins a run of transfers, or sums gradients."""

    rank: int
    sends: tuple[_Slot, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """A rank waits for what it receives, and computes."""

    rank: int
    stage: int
    kind: type[Compute]
    microbatch: int
    receives: tuple[_Slot, ...]


class StepTimes:
    """Step times of `schedule` on `num_ranks` pipeline ranks with `virtual_stages` stages each.

    BadArgument or BadSchedule if the schedule cannot have these sizes.
    """

    def __init__(
        self, schedule: Schedule, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None
    ) -> None:
        virtual_stages = schedule.checked_virtual_stages(virtual_stages)
        self.num_ranks, self.num_microbatches = num_ranks, num_microbatches
        self.stage_ranks = schedule.stage_ranks(num_ranks, virtual_stages)
        self.num_stages = len(self.stage_ranks)
        chain = [(stage, stage + 1) for stage in range(self.num_stages - 1)]
        played = min(num_microbatches, _MOST_MICROBATCHES * num_ranks)
        counts = [played] if played == num_microbatches else [played - num_ranks, played]
        self._further = num_microbatches - played
        self._programs = [
            _compiled(placed(schedule, num_ranks, count, chain, virtual_stages=virtual_stages), self.stage_ranks)
            for count in counts
        ]

    def __call__(
        self, forward: torch.Tensor, backward: torch.Tensor, sends: torch.Tensor, used: torch.Tensor | None = None,
        weight: torch.Tensor | None = None, barrier: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Seconds of a step, [K], float64. Without `barrier` the time from one step to the next where each rank goes on with the next
        one when it has done its own part: the longest that any rank takes from its first computation to its last.

        `forward` and `backward` are [K, stages], of one microbatch. `sends` is [K, stages, stages]: seconds of a transfer from the
        first stage to the second, there; its gradient takes as long back. `used`, like it, of bools: which transfers there are
        between stages that are not neighbours; None for none. `weight`, like `backward`: how much of the backward is gradients of
        weights, which some schedules put off; None: half.
        """
        skips = {}
        if used is not None:
            for source, to in used.any(0).nonzero().tolist():
                if to > source + 1 and self.stage_ranks[source] != self.stage_ranks[to]:
                    skips[source, to] = sends[:, source, to].masked_fill(~used[:, source, to], -torch.inf)
        if len(forward) == 1 and barrier and not skips:
            times = tuple(of[0].tolist() for of in (forward, backward, backward / 2 if weight is None else weight))
            each = [_play_once(program, self.stage_ranks, times[0], times[1], times[2], sends[0].tolist()) for program in self._programs]
            return torch.tensor([each[-1] + (each[-1] - each[0]) * (self._further / self.num_ranks)], dtype=torch.float64)
        found = [_play(program, self.stage_ranks, forward, backward, sends, skips, weight, barrier) for program in self._programs]
        return found[-1] + (found[-1] - found[0]) * (self._further / self.num_ranks)


def _compiled(lists: Lists, stage_ranks: Sequence[int]) -> list[_Post | _Work]:
    """What the ranks do in an order in which whatever is waited for comes first."""
    stages = stages_of_ranks(stage_ranks)
    steps = [_steps(stages[rank], listed, rendezvous=False) for rank, listed in enumerate(lists)]
    program: list[_Post | _Work] = []
    position = [0] * len(lists)
    sent: set[_Slot] = set()
    runnable = deque(range(len(lists)))
    while runnable:
        rank = runnable.popleft()
        for step in steps[rank][position[rank] :]:
            wanted = tuple(end.other for end in step.waits)
            if not all(one in sent for one in wanted):
                break
            position[rank] += 1
            sends = tuple(end.key for end in step.run if end.sends)
            if step.compute is not None:
                one = step.compute
                program.append(_Work(rank, stages[rank][one.chunk], type(one), one.microbatch, wanted))
            else:
                program.append(_Post(rank, sends))
            sent.update(sends)
            runnable.extend({stage_ranks[end.peer] for end in step.run if end.sends})
    return program


def _play(
    program: Sequence[_Post | _Work],
    stage_ranks: Sequence[int],
    forward: torch.Tensor,
    backward: torch.Tensor,
    sends: torch.Tensor,
    skips: Mapping[tuple[int, int], torch.Tensor],
    weight: torch.Tensor | None = None,
    barrier: bool = True,
) -> torch.Tensor:
    num_ranks = max(stage_ranks) + 1
    zero = torch.zeros(len(forward), dtype=torch.float64)
    now, unfinished = [zero] * num_ranks, [zero] * num_ranks
    begun: dict[int, torch.Tensor] = {}
    arrived: dict[_Slot, torch.Tensor] = {}
    weight = backward / 2 if weight is None else weight
    by_kind = {Forward: forward, Backward: backward, BackwardInput: backward - weight, BackwardWeight: weight}
    seconds = {(kind, stage): each[:, stage] for kind, each in by_kind.items() for stage in range(len(stage_ranks))}
    moves = {(a, b): sends[:, min(a, b), max(a, b)] for a in range(len(stage_ranks)) for b in range(len(stage_ranks))}
    into: dict[tuple[int, bool], list[tuple[int, torch.Tensor]]] = {}
    for (source, to), times in skips.items():
        into.setdefault((to, False), []).append((source, times))
        into.setdefault((source, True), []).append((to, times))
    made: dict[tuple[int, bool, int], torch.Tensor] = {}
    for one in program:
        rank = one.rank
        if isinstance(one, _Work):
            start = now[rank]
            for slot in one.receives:
                start = torch.maximum(start, arrived.pop(slot))
            back = one.kind is not Forward
            if into and one.kind is not BackwardWeight:
                for other, times in into.get((one.stage, back), ()):
                    start = torch.maximum(start, made[other, back, one.microbatch] + times)
            begun.setdefault(rank, start)
            now[rank] = start + seconds[one.kind, one.stage]
            if into and one.kind is not BackwardWeight:
                made[one.stage, back, one.microbatch] = now[rank]
        else:
            now[rank] = torch.maximum(now[rank], unfinished[rank])
            for slot in one.sends:
                source, to, _ = slot[0]
                arrived[slot] = over = now[rank] + moves[source, to]
                unfinished[rank] = torch.maximum(unfinished[rank], over)
    if not barrier:
        return torch.stack([torch.maximum(now[rank], unfinished[rank]) - start for rank, start in begun.items()]).amax(0)
    return torch.stack([*now, *unfinished]).amax(0)


def _play_once(
    program: Sequence[_Post | _Work], stage_ranks: Sequence[int], forward: Sequence[float], backward: Sequence[float],
    weight: Sequence[float], sends: Sequence[Sequence[float]],
) -> float:  # fmt: skip
    """`_play` of one assignment, in numbers, without skips and with the barrier."""
    num_ranks = max(stage_ranks) + 1
    now, unfinished = [0.0] * num_ranks, [0.0] * num_ranks
    arrived: dict[_Slot, float] = {}
    inputs = [whole - part for whole, part in zip(backward, weight, strict=True)]
    seconds: dict[type[Compute], Sequence[float]] = {
        Forward: forward, Backward: backward, BackwardInput: inputs, BackwardWeight: weight
    }
    for one in program:
        rank = one.rank
        if isinstance(one, _Work):
            start = now[rank]
            for slot in one.receives:
                start = max(start, arrived.pop(slot))
            now[rank] = start + seconds[one.kind][one.stage]
        else:
            now[rank] = max(now[rank], unfinished[rank])
            for slot in one.sends:
                source, to, _ = slot[0]
                arrived[slot] = over = now[rank] + sends[min(source, to)][max(source, to)]
                unfinished[rank] = max(unfinished[rank], over)
    return max(*now, *unfinished)

"""From a schedule and the edges between stages to each stage's instruction list, proved.

Design note. A schedule orders a stage's forwards and backwards. The edges say which stages send to which: (0, 1) is a
neighbour, (0, 3) a value that skips two stages and goes there straight. What is left to decide is where the transfers
go. They are rendezvous: a sender waits until the receiver asks. And adjacent transfers are one run, posted at once
and waited for at once (passes/timeline.py).

A receive stands right before the compute that needs it. A send to a neighbour stands right after the compute that
makes it, and meets its receive there. A send over a distance cannot: under 1F1B the far stage asks as many
microbatches later as there are stages between, and may itself be waiting for a gradient from the sender, which is a
deadlock. One rule covers both: lay out the computes in unit time, as if sends did not wait, and put each send into
the last of the sender's runs that begins by the time the receiver asks, or the first after the compute that makes it,
whichever is later.

This cannot deadlock. Give each run the unit time at which the compute before it ends. By the rule, the stage's next
run is later than the run at the other end of each of its transfers: for the sender, or it would have been in the next
run itself; for the receiver, since its next compute needs what the sender's run brings. So whatever a run waits for
is earlier than what waits behind it, and times do not go round in a circle. Per pair of stages, sends come in the
order of receives.

Forward and backward take one unit each, although a backward takes about two forwards. Then the stages' runs begin at
the same ticks, so a far send has a run that begins exactly when the receiver asks; and with steps of 1F1B between
neighbours nothing changes: the run between a forward and a backward is [SendActivation(i), RecvGradient(j)], the same
exchange as [SendGradient(j), RecvActivation(i + 1)] at the next stage. What remains is that stages far apart do not
change from compute to compute at the same moment when the real ratio is not 1: a skip under 1F1B then costs, at a
ratio of 2 and 32 microbatches, 11-21% of the step (4-8 stages, by simulation) as long as the runtime waits for sends
where they stand. Under gpipe it costs nothing.

`prove` believes none of this. It looks at the lists alone, and also judges those of an edited plan: every compute and
transfer once and no others, each after what it needs, sends and receives of two stages in one order, no more in
flight than the schedule promises, no deadlock (passes/timeline.py tells why one simulation proves that).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from costmodel.errors import BadArgument, BadSchedule
from passes.instructions import (
    Backward,
    Compute,
    Forward,
    Instruction,
    Recv,
    RecvActivation,
    RecvGradient,
    Send,
    SendActivation,
    SendGradient,
    SumGradients,
)
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named
from passes.timeline import Channel, channel, simulate

Edge = tuple[int, int]
Lists = tuple[tuple[Instruction, ...], ...]


class _Move(NamedTuple):
    """One transfer, seen from outside: the tensors of a microbatch from one stage to another."""

    source: int
    to: int
    gradient: bool
    microbatch: int

    @property
    def send(self) -> Send:
        return (SendGradient if self.gradient else SendActivation)(self.microbatch, to=self.to)

    @property
    def recv(self) -> Recv:
        return (RecvGradient if self.gradient else RecvActivation)(self.microbatch, source=self.source)


class _Flow:
    """Which transfers each compute needs and makes: forwards move along the edges, backwards along them reversed."""

    def __init__(self, num_stages: int, edges: Collection[Edge], gradient_edges: Collection[Edge] | None) -> None:
        self.edges = sorted(set(edges))
        self.gradient_edges = self.edges if gradient_edges is None else sorted(set(gradient_edges))
        for source, to in self.edges:
            if not 0 <= source < to < num_stages:
                raise BadArgument(f"The edge {(source, to)} does not lead to a later one of {num_stages} stages.")
        for edge in self.gradient_edges:
            if edge not in self.edges:
                raise BadArgument(f"Gradients cannot flow back over {edge}.", why=f"the edges are {self.edges}")
        pairs = [(source, to, False) for source, to in self.edges]
        pairs += [(to, source, True) for source, to in self.gradient_edges]
        self._into: dict[tuple[int, bool], list[Channel]] = {}
        self._out_of: dict[tuple[int, bool], list[Channel]] = {}
        for source, to, gradient in pairs:
            self._into.setdefault((to, gradient), []).append((source, to, gradient))
            self._out_of.setdefault((source, gradient), []).append((source, to, gradient))

    def needs(self, stage: int, compute: Compute) -> list[_Move]:
        paths = self._into.get((stage, isinstance(compute, Backward)), ())
        return [_Move(*path, compute.microbatch) for path in paths]

    def makes(self, stage: int, compute: Compute) -> list[_Move]:
        paths = self._out_of.get((stage, isinstance(compute, Backward)), ())
        return [_Move(*path, compute.microbatch) for path in paths]


def order(
    schedule: str | Schedule,
    num_stages: int,
    num_microbatches: int,
    edges: Collection[Edge],
    *,
    gradient_edges: Collection[Edge] | None = None,
    sum_gradients: bool = True,
) -> Lists:
    """The instruction list of each stage, proved.

    `edges` are (from stage, to later stage); gradients flow back over `gradient_edges`, all of them if None.
    `sum_gradients` ends each list of a schedule that trains with SumGradients(). BadArgument for an unknown schedule,
    sizes below 1 or an edge that is none; BadSchedule if the schedule's generator is wrong.
    """
    row = schedule_named(schedule) if isinstance(schedule, str) else schedule
    for name, size in (("stages", num_stages), ("microbatches", num_microbatches)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadArgument(f"The number of {name} is an integer of at least 1; got {size!r}.")
    flow = _Flow(num_stages, edges, gradient_edges if row.trains else ())
    computes = [tuple(row.generator(stage, num_stages, num_microbatches)) for stage in range(num_stages)]
    for stage, listed in enumerate(computes):
        _prove_work(stage, listed, _work(num_microbatches, row.trains))
    times = _unit_times(computes, flow)
    if times is None:
        raise BadSchedule(
            f"The schedule {row.name!r} cannot run on {num_stages} stages with {num_microbatches} microbatches.",
            why="its stages need each other's results in a circle",
        )
    end: list[Instruction] = [SumGradients()] if row.trains and sum_gradients else []
    lists: Lists = tuple((*placed, *end) for placed in _place(computes, times, flow))
    prove(lists, edges, gradient_edges=gradient_edges, schedule=row, num_microbatches=num_microbatches)
    return lists


def _unit_times(computes: Sequence[Sequence[Compute]], flow: _Flow) -> list[list[int]] | None:
    """Per stage the unit time at which each compute ends if transfers take no time and sends do not wait.

    Every compute takes one unit. None if the computes need each other in a circle.
    """
    end: dict[_Move, int] = {}  # when a transfer can begin: its compute is over
    times: list[list[int]] = [[] for _ in computes]
    runnable = deque(range(len(computes)))
    while runnable:
        stage = runnable.popleft()
        mine = times[stage]
        while len(mine) < len(computes[stage]):
            compute = computes[stage][len(mine)]
            needs = flow.needs(stage, compute)
            if any(move not in end for move in needs):
                break
            start = max([end[move] for move in needs] + mine[-1:], default=0)
            mine.append(start + 1)
            for move in flow.makes(stage, compute):
                end[move] = mine[-1]
                runnable.append(move.to)
    complete = all(len(mine) == len(listed) for mine, listed in zip(times, computes, strict=True))
    return times if complete else None


def _place(
    computes: Sequence[Sequence[Compute]], times: Sequence[Sequence[int]], flow: _Flow
) -> list[list[Instruction]]:
    """The lists with their transfers. Run k of a stage stands before its compute k; the last one ends the list."""
    made_in = {
        move: index + 1
        for stage, listed in enumerate(computes)
        for index, compute in enumerate(listed)
        for move in flow.makes(stage, compute)
    }
    sends: list[list[list[Send]]] = [[[] for _ in range(len(listed) + 1)] for listed in computes]
    for stage, listed in enumerate(computes):
        for index, compute in enumerate(listed):
            asked = times[stage][index - 1] if index else 0
            for move in flow.needs(stage, compute):
                # The last run that begins by the time the receiver asks, but not before there is something to send.
                run = max(made_in[move], bisect_right(times[move.source], asked))
                sends[move.source][run].append(move.send)
    lists: list[list[Instruction]] = []
    for stage, listed in enumerate(computes):
        placed: list[Instruction] = []
        for run, compute in enumerate(listed):
            placed += [*sends[stage][run], *(move.recv for move in flow.needs(stage, compute)), compute]
        lists.append([*placed, *sends[stage][-1]])
    return lists


def prove(
    instructions: Sequence[Sequence[Instruction]],
    edges: Collection[Edge],
    *,
    gradient_edges: Collection[Edge] | None = None,
    schedule: str | Schedule | None = None,
    num_microbatches: int | None = None,
) -> None:
    """Raise BadSchedule unless `instructions[stage]`, every stage's list, is one right step over `edges`.

    With `schedule`, the microbatches in flight are held to its bound. `num_microbatches` None: as many as there are.
    """
    row = schedule_named(schedule) if isinstance(schedule, str) else schedule
    trains = row.trains if row else any(isinstance(one, Backward) for listed in instructions for one in listed)
    flow = _Flow(len(instructions), edges, gradient_edges if trains else ())
    if num_microbatches is None:
        forwards = [one.microbatch for listed in instructions for one in listed if isinstance(one, Forward)]
        num_microbatches = max(forwards, default=-1) + 1
    ends = [any(isinstance(one, SumGradients) for one in listed) for listed in instructions]
    if any(ends) and not all(ends):
        raise BadSchedule(f"Stage {ends.index(False)} has no SumGradients(), other stages have and would wait for it.")
    for stage, listed in enumerate(instructions):
        _prove_stage(stage, listed, flow, num_microbatches, trains)
        if row and trains:
            _prove_memory(stage, listed, row.max_in_flight(stage, len(instructions), num_microbatches), row.name)
    _prove_matching(instructions)
    nothing = [0.0] * len(instructions)
    simulate(instructions, forward_seconds=nothing, backward_seconds=nothing)


def in_flight(instructions: Iterable[Instruction]) -> int:
    """The most forwards at one time whose backward has not run."""
    count = peak = 0
    for one in instructions:
        count += isinstance(one, Forward) - isinstance(one, Backward)
        peak = max(peak, count)
    return peak


def _work(num_microbatches: int, trains: bool) -> list[Compute]:
    """What every stage computes in a step, in whatever order."""
    forwards: list[Compute] = [Forward(microbatch) for microbatch in range(num_microbatches)]
    return forwards + [Backward(microbatch) for microbatch in range(num_microbatches if trains else 0)]


def _where(stage: int, index: int, listed: Sequence[Instruction]) -> str:
    return f"stage {stage}, instruction {index}: {listed[index]!r}"


def _prove_once(stage: int, listed: Sequence[Instruction], expected: Collection[Instruction]) -> dict[Instruction, int]:
    """The position of each instruction; BadSchedule unless the list holds exactly the expected ones, each once."""
    known = set(expected)
    positions: dict[Instruction, int] = {}
    for index, one in enumerate(listed):
        if one in positions:
            raise BadSchedule(f"Stage {stage} runs {one!r} twice.", where=_where(stage, index, listed))
        if one not in known and not isinstance(one, SumGradients):
            raise BadSchedule(f"Stage {stage} runs {one!r}, which is no part of its step.")
        positions[one] = index
    for one in expected:
        if one not in positions:
            raise BadSchedule(f"Stage {stage} never runs {one!r}.")
    return positions


def _prove_work(stage: int, listed: Sequence[Compute], expected: Collection[Compute]) -> None:
    """Each microbatch once forward and once backward, in that order; the backwards in the order of the microbatches."""
    positions = _prove_once(stage, listed, expected)
    for one, index in positions.items():
        if isinstance(one, Backward):
            if positions[Forward(one.microbatch)] > index:
                _raise_before(stage, listed, index, Forward(one.microbatch))
            if one.microbatch and positions[Backward(one.microbatch - 1)] > index:
                raise BadSchedule(
                    f"Stage {stage} runs {one!r} before {Backward(one.microbatch - 1)!r}.",
                    where=_where(stage, index, listed),
                    why="gradients would add up in another order than without a pipeline, to other last bits",
                )


def _prove_stage(stage: int, listed: Sequence[Instruction], flow: _Flow, num_microbatches: int, trains: bool) -> None:
    """One stage's list alone: all of its work and transfers once, each after what it needs."""
    work = _work(num_microbatches, trains)
    needs = {one: [move.recv for move in flow.needs(stage, one)] for one in work}
    makes = {one: [move.send for move in flow.makes(stage, one)] for one in work}
    transfers = [one for table in (needs, makes) for found in table.values() for one in found]
    positions = _prove_once(stage, listed, [*work, *transfers])
    _prove_work(stage, [one for one in listed if isinstance(one, Forward | Backward)], work)
    for one in work:
        index = positions[one]
        for recv in needs[one]:
            if positions[recv] > index:
                _raise_before(stage, listed, index, recv)
        for send in makes[one]:
            if positions[send] < index:
                _raise_before(stage, listed, positions[send], one)
    end = positions.get(SumGradients())
    if end is not None and end < len(listed) - 1:
        _raise_before(stage, listed, end, listed[-1])


def _prove_memory(stage: int, listed: Sequence[Instruction], bound: int, name: str) -> None:
    count = 0
    for index, one in enumerate(listed):
        count += isinstance(one, Forward) - isinstance(one, Backward)
        if count > bound:
            raise BadSchedule(
                f"Stage {stage} has {count} microbatches in flight; the schedule {name!r} allows {bound} here.",
                where=_where(stage, index, listed),
            )


def _prove_matching(instructions: Sequence[Sequence[Instruction]]) -> None:
    """The sends of one stage to another are in the order of the receives there, activations and gradients apart."""
    sent: dict[Channel, list[int]] = {}
    received: dict[Channel, list[int]] = {}
    for stage, listed in enumerate(instructions):
        for one in listed:
            if isinstance(one, SendActivation | SendGradient):
                sent.setdefault(channel(stage, one), []).append(one.microbatch)
            elif isinstance(one, RecvActivation | RecvGradient):
                received.setdefault(channel(stage, one), []).append(one.microbatch)
    for key, microbatches in sent.items():
        # Both are the same microbatches: _prove_stage has seen each transfer once at either end.
        for left, right in zip(microbatches, received[key], strict=True):
            if left != right:
                source, to, gradient = key
                send, recv = _Move(source, to, gradient, left).send, _Move(source, to, gradient, right).recv
                raise BadSchedule(
                    f"Stage {source} runs {send!r} where stage {to} runs {recv!r}.",
                    why="transfers from one stage to another are matched by their order, so both ends need the same",
                )


def _raise_before(stage: int, listed: Sequence[Instruction], index: int, needed: Instruction) -> None:
    raise BadSchedule(
        f"Stage {stage} runs {listed[index]!r} before {needed!r}, which it needs.", where=_where(stage, index, listed)
    )

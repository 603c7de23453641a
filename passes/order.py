"""From a schedule and the edges between stages to each pipeline rank's instruction list, proved.

Design note. A schedule orders a rank's computes. The edges say which stages send to which: (0, 1) is a neighbour,
(0, 3) a value that skips two stages and goes there straight. What is left to decide is where the transfers go; between
stages of one rank there are none. They are rendezvous: a sender waits until the receiver asks. And adjacent transfers
are one run, posted at once and waited for at once (passes/timeline.py).

Right after the compute that makes it and right before the one that needs it a transfer can stand only between
neighbours under 1F1B and the like. A send over a distance would wait there: the far stage asks as many microbatches
later as there are stages between, and may itself be waiting for a gradient from the sender, which is a deadlock. The
same goes for a send to a rank's later stage, which is asked for when that stage's turn comes. One rule covers all. Lay
out the computes in time, as if sends did not wait.

- A receive stands right before the compute that needs it; but if the sender begins a later run by then than the one
  after the compute that makes the result, in the first of the receiver's runs that begins when it is made or later.
- Its send goes into the last of the sender's runs that begins when that one does or earlier, and after the compute that
  makes it at the earliest.
- Where a run has nothing but sends, it moves forward over the computes before it, to where the last of them is made or
  into the run before.

This cannot deadlock. Give each run the time at which the compute before it ends. By the rule, a rank's next run is
later than the run at the other end of each of its transfers: for the sender, or it would have been in the next run
itself (and a run of sends that moves forward passes no other); for the receiver, since its run begins when the sender's
does or later, or else the compute after it waits for what the sender's run brings. So whatever a run waits for is
earlier than what waits behind it, and times do not go round in a circle. Per pair of ranks sends come in the order of
receives, activations and gradients together, which is what NCCL matches by: of two receives in different runs the later
run begins after the first result was made, so its send is in no earlier run; within a run either end follows the other.

The proof holds for any times. Those taken are the ones that computes have relative to each other where stages are
equal: a forward 1, a backward 2, half of it for the inputs. Then runs begin at the same ticks on all ranks, and a
receive meets its send at once. Where times are others, transfers are still posted close to where the result is made,
and a runtime that waits for a receive when a compute needs it, and for a send in the next run, waits for the results
alone (the tests simulate this for other ratios of backward to forward).

`prove` believes none of this (passes/prove.py): it looks at the lists alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Sequence

from costmodel.errors import BadArgument, BadSchedule
from passes.flow import Edge, Flow, Move, Result
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    SumGradients,
)
from passes.prove import in_flight, prove, prove_work
from passes.schedules import Schedule, forward_only
from passes.schedules import schedule as schedule_named

__all__ = ["Edge", "Lists", "in_flight", "order", "prove"]

Lists = tuple[tuple[Instruction, ...], ...]

_TICKS: dict[type[Compute], int] = {Forward: 1, Backward: 2, BackwardInput: 1, BackwardWeight: 1}


def order(
    schedule: str | Schedule,
    num_ranks: int,
    num_microbatches: int,
    edges: Collection[Edge],
    *,
    gradient_edges: Collection[Edge] | None = None,
    virtual_stages: int | None = None,
    stage_ranks: Sequence[int] | None = None,
    sum_gradients: bool = True,
) -> Lists:
    """The instruction list of each pipeline rank, proved.

    `edges` are (from stage, to later stage), of `num_ranks * virtual_stages` stages; gradients flow back over
    `gradient_edges`, all of them if None. `virtual_stages` None is the schedule's default. `stage_ranks`, for
    FORWARD_ONLY: the pipeline rank of each stage, as the training schedule has placed them. `sum_gradients` ends each list
    of a schedule that trains with SumGradients(). BadArgument for an unknown schedule, sizes below 1, virtual stages that
    the schedule cannot have or an edge that is none; BadSchedule if the schedule's generator is wrong.
    """
    return _ordered(schedule, num_ranks, num_microbatches, edges, gradient_edges, virtual_stages, stage_ranks, sum_gradients, proved=True)


def placed(
    schedule: str | Schedule, num_ranks: int, num_microbatches: int, edges: Collection[Edge], *, virtual_stages: int | None = None
) -> Lists:
    """The same lists without the proof: for asking how long a schedule of SCHEDULES takes, not for running it."""
    return _ordered(schedule, num_ranks, num_microbatches, edges, None, virtual_stages, None, True, proved=False)


def _ordered(
    schedule: str | Schedule, num_ranks: int, num_microbatches: int, edges: Collection[Edge], gradient_edges: Collection[Edge] | None,
    virtual_stages: int | None, stage_ranks: Sequence[int] | None, sum_gradients: bool, proved: bool,
) -> Lists:  # fmt: skip
    row = schedule_named(schedule) if isinstance(schedule, str) else schedule
    for name, size in (("stages", num_ranks), ("microbatches", num_microbatches)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadArgument(f"The number of {name} is an integer of at least 1; got {size!r}.")
    if row.trains:
        virtual_stages = row.checked_virtual_stages(virtual_stages)
    elif virtual_stages is None:
        virtual_stages = len(stage_ranks) // num_ranks if stage_ranks else 1
    if stage_ranks is not None and tuple(stage_ranks) != row.stage_ranks(num_ranks, virtual_stages):
        if row.trains:
            raise BadArgument(f"The schedule {row.name!r} does not place its stages on the ranks {list(stage_ranks)}.")
        row = forward_only(stage_ranks)
    stage_ranks = row.stage_ranks(num_ranks, virtual_stages)
    flow = Flow(stage_ranks, edges, gradient_edges if row.trains else ())
    computes = [tuple(row.generator(rank, num_ranks, num_microbatches, virtual_stages)) for rank in range(num_ranks)]
    if proved:
        prove_work(computes, flow, num_microbatches, row.trains)
    times = _times(computes, flow)
    if times is None:
        raise BadSchedule(
            f"The schedule {row.name!r} cannot run on {len(stage_ranks)} stages with {num_microbatches} microbatches.",
            why="its stages need each other's results in a circle",
        )
    end: list[Instruction] = [SumGradients()] if row.trains and sum_gradients else []
    lists: Lists = tuple((*placed, *end) for placed in _place(computes, times, flow))
    if proved:
        prove(
            lists, edges, gradient_edges=gradient_edges, schedule=row, num_microbatches=num_microbatches, stage_ranks=stage_ranks,
        )  # fmt: skip
    return lists


def _times(computes: Sequence[Sequence[Compute]], flow: Flow) -> list[list[int]] | None:
    """Per rank the tick at which each compute ends if transfers take no time and sends do not wait.

    None if the computes need each other in a circle.
    """
    made: dict[Result, int] = {}  # when a transfer can begin: its compute is over
    times: list[list[int]] = [[] for _ in computes]
    runnable = deque(range(len(computes)))
    while runnable:
        rank = runnable.popleft()
        mine, listed = times[rank], computes[rank]
        now = mine[-1] if mine else 0
        for compute in listed[len(mine) :]:
            result = flow.result(rank, compute)
            if result is not None:
                stage, gradient, microbatch = result
                needs = [made.get((source, gradient, microbatch), -1) for source in flow.receives[gradient][stage]]
                if -1 in needs:
                    break
                now = max([now, *needs])
            now += _TICKS[type(compute)]
            mine.append(now)
            if result is not None:
                made[result] = now
                runnable.extend({flow.stage_ranks[to] for to in flow.sends[gradient][stage]})
    complete = all(len(mine) == len(listed) for mine, listed in zip(times, computes, strict=True))
    return times if complete else None


def _place(
    computes: Sequence[Sequence[Compute]], times: Sequence[Sequence[int]], flow: Flow
) -> list[list[Instruction]]:
    """The lists with their transfers. Run k of a rank stands before its compute k; the last one ends the list."""
    made_in: dict[Result, int] = {}  # the first run of its rank that can send a result
    for rank, listed in enumerate(computes):
        for index, compute in enumerate(listed):
            result = flow.result(rank, compute)
            if result is not None:
                made_in[result] = index + 1
    moves: list[tuple[int, int, Move]] = []  # with the sender's run and the receiver's
    for rank, listed in enumerate(computes):
        for index, compute in enumerate(listed):
            result = flow.result(rank, compute)
            if result is None:
                continue
            stage, gradient, microbatch = result
            for source in flow.receives[gradient][stage]:
                there = times[flow.stage_ranks[source]]
                made = made_in[source, gradient, microbatch]
                receives = index
                asked = times[rank][index - 1] if index else 0
                if made <= bisect_right(there, asked) - 1:
                    # A later run of the sender begins by then too: ask earlier, for a send right after its compute.
                    receives = bisect_left(times[rank], there[made - 1]) + 1
                    asked = times[rank][receives - 1]
                moves.append(
                    (max(made, bisect_right(there, asked)), receives, Move(source, stage, gradient, microbatch))
                )
    # By peer, and per pair of ranks in one order at both ends.
    moves.sort(key=lambda each: each[:2])
    sends: list[list[list[Move]]] = [[[] for _ in range(len(listed) + 1)] for listed in computes]
    recvs: list[list[list[Move]]] = [[[] for _ in range(len(listed) + 1)] for listed in computes]
    for sender, receiver, move in moves:
        sends[flow.stage_ranks[move.source]][sender].append(move)
        recvs[flow.stage_ranks[move.to]][receiver].append(move)
    lists: list[list[Instruction]] = []
    for rank, listed in enumerate(computes):
        _advance(sends[rank], recvs[rank], made_in)
        placed: list[Instruction] = []
        for run in range(len(listed) + 1):
            sent = sorted(sends[rank][run], key=lambda move: flow.stage_ranks[move.to])
            received = sorted(recvs[rank][run], key=lambda move: flow.stage_ranks[move.source])
            placed += [*map(flow.send, sent), *map(flow.recv, received), *listed[run : run + 1]]
        lists.append(placed)
    return lists


def _advance(sends: list[list[Move]], recvs: list[list[Move]], made_in: dict[Result, int]) -> None:
    """Move a rank's runs of sends alone forward over computes, to where they are made or into the run before them."""
    run = len(sends) - 1
    while run > 0:
        before = run - 1
        if sends[run] and not recvs[run]:
            first = max(made_in[move.source, move.gradient, move.microbatch] for move in sends[run])
            while before > first and not sends[before] and not recvs[before]:
                before -= 1
            if before >= first:
                sends[before] += sends[run]
                sends[run] = []
        run = before

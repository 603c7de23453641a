"""Which buffer each receive of a rank goes into, and how early it can be posted there: a static assignment, proved.

Design note. Receives go into rings: per channel (from stage, to stage, activations or gradients) a few slots that are
made once. A slot holds one microbatch from when its receive is posted until its last use. That is

- the stage's Backward, or its BackwardWeight where the weight gradients are deferred: both the input of a linear and
  the gradient of its output may be what was received;
- the forward alone in an evaluation;
- later still, if the stage passes on what it received without a copy: the end of its sends, for which the rank waits
  in its next run, and the uses by stages of the same rank, to which values are handed over in place.

All of this is known from the rank's list. `receive_slots` finds the fewest slots that do when every receive is posted
where it stands, adds `spare` ones, and gives each receive the slot that has been free for longest. Then a receive may
be posted right after the instruction that frees its slot, which is before it stands: the earlier, the more spare slots.
Receives from one rank are posted in the order of the list, since NCCL matches transfers by order.

`prove_slots` trusts neither the lifetimes nor the assignment: it plays the list, with posts where they are said to be,
and looks at every use whether the slot still holds the microbatch that is meant.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from costmodel.errors import BadSchedule
from passes.flow import Edge
from passes.instructions import (
    Compute,
    Forward,
    Instruction,
    Recv,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
    SumGradients,
)
from passes.timeline import Channel, channel

# What a slot holds: for which stage it was received, whether gradients, the microbatch.
_Received = tuple[int, bool, int]


@dataclass(frozen=True, slots=True)
class ReceiveSlot:
    """Where a receive goes. `index` is the place of `recv` in its rank's list.

    It may be posted when instruction `post_after` has ended; -1 from the start of the step.
    """

    index: int
    recv: Recv
    channel: Channel
    slot: int
    post_after: int


def receive_slots(
    instructions: Sequence[Instruction],
    rank: int,
    stage_ranks: Sequence[int],
    local_edges: Collection[Edge] = (),
    *,
    spare: int = 1,
) -> tuple[ReceiveSlot, ...]:
    """The slot of each receive of a rank, in the order of its list.

    `local_edges` are the (from stage, to stage) within this rank; others are ignored.
    """
    uses = _uses(instructions, rank, stage_ranks, local_edges)
    last_use = {received: index for index, used in enumerate(uses) for received in used}
    stages = [stage for stage, of in enumerate(stage_ranks) if of == rank]
    runs = _runs(instructions)
    # Per channel the receives: place in the list, start of the run, last use.
    found: dict[Channel, list[tuple[int, int, int]]] = {}
    for index, one in enumerate(instructions):
        if isinstance(one, RecvActivation | RecvGradient):
            path = channel(stages[one.chunk], one)
            end = last_use.get((path[1], path[2], one.microbatch), index)
            found.setdefault(path, []).append((index, runs[index], max(end, index)))
    chosen: dict[int, tuple[Channel, int, int]] = {}
    for path, receives in found.items():
        fewest = len({slot for slot, _ in _assign(receives, 0)})
        for (index, _, _), (slot, free) in zip(receives, _assign(receives, fewest + spare), strict=True):
            chosen[index] = (path, slot, free)
    posted: dict[int, int] = {}
    slots: list[ReceiveSlot] = []
    for index in sorted(chosen):
        path, slot, free = chosen[index]
        source = stage_ranks[path[0]]
        posted[source] = max(posted.get(source, -1), free)
        recv = instructions[index]
        assert isinstance(recv, RecvActivation | RecvGradient)
        slots.append(ReceiveSlot(index, recv, path, slot, posted[source]))
    return tuple(slots)


def _assign(receives: Sequence[tuple[int, int, int]], allowed: int) -> list[tuple[int, int]]:
    """Per receive its slot and the instruction that frees it: of `allowed` slots the one free for longest, but a new one
    where none is free."""
    ends: list[int] = [-1] * allowed
    assigned: list[tuple[int, int]] = []
    for _, start, end in receives:
        slot = min(range(len(ends)), key=lambda slot: ends[slot], default=-1)
        if slot < 0 or ends[slot] >= start:
            slot = len(ends)
            ends.append(-1)
        assigned.append((slot, ends[slot]))
        ends[slot] = end
    return assigned


def prove_slots(
    slots: Sequence[ReceiveSlot],
    instructions: Sequence[Instruction],
    rank: int,
    stage_ranks: Sequence[int],
    local_edges: Collection[Edge] = (),
) -> None:
    """Raise BadSchedule unless every use of a received microbatch finds it in its slot, and receives keep their order."""
    runs = _runs(instructions)
    listed = {index for index, one in enumerate(instructions) if isinstance(one, RecvActivation | RecvGradient)}
    if sorted(one.index for one in slots) != sorted(listed):
        raise BadSchedule(f"Rank {rank} has slots for {len(slots)} receives, and {len(listed)} receives.")
    before: dict[int, int] = {}
    posts: dict[int, list[ReceiveSlot]] = {}
    for one in sorted(slots, key=lambda one: one.index):
        source = stage_ranks[one.channel[0]]
        if not before.get(source, -1) <= one.post_after < runs[one.index]:
            raise BadSchedule(
                f"Rank {rank} posts {one.recv!r} after instruction {one.post_after}.",
                why="receives from one rank are posted in their order, and no later than where they stand",
            )
        before[source] = one.post_after
        posts.setdefault(one.post_after, []).append(one)
    places: dict[_Received, list[ReceiveSlot]] = {}
    for one in slots:
        places.setdefault((one.channel[1], one.channel[2], one.recv.microbatch), []).append(one)
    holds: dict[tuple[Channel, int], int] = {}
    uses = _uses(instructions, rank, stage_ranks, local_edges)
    for index in range(-1, len(instructions)):
        for received in uses[index] if index >= 0 else ():
            for one in places.get(received, ()):
                held = holds.get((one.channel, one.slot))
                if held != one.recv.microbatch:
                    raise BadSchedule(
                        f"Rank {rank} overwrites what {one.recv!r} received before its last use.",
                        where=f"instruction {index}: {instructions[index]!r}",
                        why=f"slot {one.slot} of {one.channel} holds "
                        + ("nothing" if held is None else f"microbatch {held}")
                        + " by then",
                    )
        for one in posts.get(index, ()):
            holds[one.channel, one.slot] = one.recv.microbatch


def _runs(instructions: Sequence[Instruction]) -> list[int]:
    """Per instruction the start of the run of transfers that it is in; itself for others."""
    starts: list[int] = []
    for index, one in enumerate(instructions):
        within = index and _is_transfer(one) and _is_transfer(instructions[index - 1])
        starts.append(starts[-1] if within else index)
    return starts


def _is_transfer(one: Instruction) -> bool:
    return not isinstance(one, Compute | SumGradients)


def _uses(
    instructions: Sequence[Instruction], rank: int, stage_ranks: Sequence[int], local_edges: Collection[Edge]
) -> list[list[_Received]]:
    """Per instruction what it may read of what was received, the end of a send included: that is in the next run."""
    stages = [stage for stage, of in enumerate(stage_ranks) if of == rank]
    # The stages whose received activations, and gradients, may reach a stage within the rank. Edges lead to later ones.
    activations = {stage: {stage} for stage in stages}
    gradients = {stage: {stage} for stage in stages}
    inside = sorted((source, to) for source, to in local_edges if source in activations and to in activations)
    for source, to in sorted(inside, key=lambda edge: edge[1]):
        activations[to] |= activations[source]
    for source, to in sorted(inside, reverse=True):
        gradients[source] |= gradients[to]
    uses: list[list[_Received]] = [[] for _ in instructions]
    sending: list[_Received] = []
    runs = _runs(instructions)
    for index, one in enumerate(instructions):
        if (_is_transfer(one) and runs[index] == index) or isinstance(one, SumGradients):
            uses[index] += sending
            sending = []
        if isinstance(one, SumGradients):
            continue
        stage = stages[one.chunk]
        used: list[_Received] = []
        if isinstance(one, Compute | SendActivation):
            used += [(other, False, one.microbatch) for other in sorted(activations[stage])]
        if isinstance(one, Compute | SendGradient) and not isinstance(one, Forward):
            used += [(other, True, one.microbatch) for other in sorted(gradients[stage])]
        uses[index] += used
        if isinstance(one, SendActivation | SendGradient):
            sending += used
    if instructions:
        uses[-1] += sending  # without a next run: the end of the list
    return uses

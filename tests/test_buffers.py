"""The static assignment of receive-ring slots: proved for every schedule, and wrong ones caught."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from costmodel.errors import BadSchedule
from passes.buffers import ReceiveSlot, prove_slots, receive_slots
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
)
from passes.order import Edge, order
from passes.schedules import FORWARD_ONLY, SCHEDULES, schedule


def chain(num_stages: int) -> list[Edge]:
    return [(stage, stage + 1) for stage in range(num_stages - 1)]


def skips(num_stages: int) -> list[Edge]:
    return sorted({*chain(num_stages), *((0, stage) for stage in range(1, num_stages))})


def slots_of(lists: list[list[Instruction]], *, spare: int = 0, stage_ranks: tuple[int, ...] = (0, 1)) -> list[int]:
    """How many slots the only channel of the last rank has."""
    rank = len(lists) - 1
    slots = receive_slots(lists[rank], rank, stage_ranks, spare=spare)
    prove_slots(slots, lists[rank], rank, stage_ranks)
    assert len({one.channel for one in slots}) == 1
    return [one.slot for one in slots]


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("name", [*SCHEDULES, "forward-only"])
def test_no_slot_is_filled_again_before_its_last_use(name: str, spare: int) -> None:
    row = FORWARD_ONLY if name == "forward-only" else schedule(name)
    for p in (1, 2, 3, 5, 8):
        for m in (1, 2, 7):
            v = 2 if row is FORWARD_ONLY else row.default_virtual_stages
            ranks = row.stage_ranks(p, v)
            for edges in (chain(p * v), skips(p * v)):
                for rank, listed in enumerate(order(row, p, m, edges, virtual_stages=v)):
                    slots = receive_slots(listed, rank, ranks, edges, spare=spare)
                    prove_slots(slots, listed, rank, ranks, edges)
                    counts = Counter(one.channel for one in slots)
                    assert all(one.slot < counts[one.channel] + spare for one in slots)


def test_as_many_slots_as_microbatches_in_flight() -> None:
    listed = order("1f1b", 4, 8, chain(4))[1]
    for spare in (0, 1, 2):
        slots = receive_slots(listed, 1, range(4), spare=spare)
        assert 1 + max(one.slot for one in slots if not one.channel[2]) == 3 + spare


def test_a_spare_slot_lets_a_receive_be_posted_a_microbatch_earlier() -> None:
    listed = order("1f1b", 2, 4, chain(2))[1]
    ends = [-1, *(listed.index(Backward(microbatch)) for microbatch in range(4))]
    alone = receive_slots(listed, 1, (0, 1), spare=0)
    assert [one.post_after for one in alone] == ends[:4]
    one_more = receive_slots(listed, 1, (0, 1), spare=1)
    assert [one.post_after for one in one_more] == [-1, -1, *ends[1:3]]


def test_a_slot_lives_as_long_as_the_weight_gradients_need_it() -> None:
    receives = [RecvActivation(0, source=0), RecvActivation(1, source=0), RecvActivation(2, source=0)]
    whole = [receives[0], Forward(0), Backward(0), receives[1], Forward(1), Backward(1)]
    assert slots_of([[], whole]) == [0, 0]
    split = [receives[0], Forward(0), BackwardInput(0), receives[1], Forward(1), BackwardInput(1)]
    split += [BackwardWeight(0), receives[2], Forward(2), BackwardInput(2), BackwardWeight(1), BackwardWeight(2)]
    assert slots_of([[], split]) == [0, 1, 0]
    gradients: list[Instruction] = [*map(Forward, range(2)), RecvGradient(0, source=1), BackwardInput(0)]
    gradients += [RecvGradient(1, source=1), BackwardInput(1), BackwardWeight(0), BackwardWeight(1)]
    assert [one.slot for one in receive_slots(gradients, 0, (0, 1), spare=0)] == [0, 1]


def test_a_slot_lives_until_its_values_are_sent_on_and_the_stages_of_the_rank_are_done() -> None:
    """Forwards only. A stage may send on what it received: until the next run has begun, that is not sent."""
    passing: list[Instruction] = []
    for microbatch in range(4):
        passing += [RecvActivation(microbatch, source=0), Forward(microbatch), SendActivation(microbatch, to=2)]
    assert [one.slot for one in receive_slots(passing, 1, (0, 1, 2), spare=0)] == [0, 1, 2, 0]
    # Stages 1 and 2 are on this rank; the second may hold what the first received.
    both: list[Instruction] = [RecvActivation(0, source=0), Forward(0), RecvActivation(1, source=0), Forward(1)]
    both += [Forward(0, chunk=1), Forward(1, chunk=1)]
    assert [one.slot for one in receive_slots(both, 1, (0, 1, 1), [(1, 2)], spare=0)] == [0, 1]
    assert [one.slot for one in receive_slots(both, 1, (0, 1, 1), spare=0)] == [0, 0]


def wrong_slots() -> dict[str, tuple[tuple[ReceiveSlot, ...], tuple[Instruction, ...], str]]:
    listed = order("zb-h1", 3, 6, chain(3))[1]
    right = receive_slots(listed, 1, range(3))
    activations = [one for one in right if isinstance(one.recv, RecvActivation)]
    fewer = {one: replace(one, slot=0) for one in activations}
    early = {one: replace(one, post_after=-1) for one in right if one.post_after >= 0}
    late = {activations[-1]: replace(activations[-1], post_after=activations[-1].index)}
    overtaking = {activations[-2]: replace(activations[-2], post_after=activations[-1].post_after + 1)}
    weights = listed.index(BackwardWeight(0))
    freed = next(one for one in activations if one.post_after == weights)
    cut_short = {freed: replace(freed, post_after=listed.index(BackwardInput(0)))}
    return {
        "one slot for all": (tuple(fewer.get(one, one) for one in right), listed, "overwrites"),
        "all at the start": (tuple(early.get(one, one) for one in right), listed, "overwrites"),
        "before the weight gradients": (
            tuple(cut_short.get(one, one) for one in right), listed, r"overwrites what RecvActivation\(0(.|\n)*BackwardWeight\(0\)",
        ),
        "after it stands": (tuple(late.get(one, one) for one in right), listed, "no later than where they stand"),
        "out of order": (tuple(overtaking.get(one, one) for one in right), listed, "in their order"),
        "left out": (right[1:], listed, "slots for 11 receives, and 12"),
    }  # fmt: skip


@pytest.mark.parametrize("which", wrong_slots())
def test_a_wrong_assignment_is_caught(which: str) -> None:
    slots, listed, message = wrong_slots()[which]
    prove_slots(receive_slots(listed, 1, range(3)), listed, 1, range(3))
    with pytest.raises(BadSchedule, match=message):
        prove_slots(slots, listed, 1, range(3))


def test_receives_of_two_ranks_need_not_keep_an_order() -> None:
    """Only those of one peer do; and gradients sent on hold their slot like activations."""
    listed = [Forward(0), Forward(1), RecvGradient(0, source=2), Backward(0), SendGradient(0, to=0)]
    listed += [RecvGradient(1, source=2), Backward(1), SendGradient(1, to=0)]
    slots = receive_slots(listed, 1, range(3), spare=0)
    assert [one.slot for one in slots] == [0, 1]
    prove_slots(slots, listed, 1, range(3))

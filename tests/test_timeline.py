"""The simulated times of instruction lists, by hand where the sums are small, and the printed TIMELINE."""

from __future__ import annotations

from itertools import pairwise

import pytest

from costmodel.errors import BadSchedule
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
)
from passes.order import order
from passes.timeline import Span, Timeline, simulate


def chain(num_stages: int) -> list[tuple[int, int]]:
    return [(stage, stage + 1) for stage in range(num_stages - 1)]


def test_the_text_of_1f1b() -> None:
    lists = order("1f1b", 4, 6, chain(4))
    times = simulate(lists, forward_seconds=[0.001] * 4, backward_seconds=[0.002] * 4)
    assert times.text().splitlines() == [
        "stage 0  0123......aa4bb5cc.dd.ee.ff",
        "stage 1  .012....aa3bb4cc5dd.ee.ff..",
        "stage 2  ..01..aa2bb3cc4dd5ee.ff....",
        "stage 3  ...0aa1bb2cc3dd4ee5ff......",
    ]
    assert times.step_seconds == pytest.approx(0.027)


def test_marks_repeat_after_ten_forwards_and_26_backwards() -> None:
    times = simulate(order("gpipe", 1, 27, []), forward_seconds=[1.0], backward_seconds=[1.0])
    assert times.text() == "stage 0  012345678901234567890123456abcdefghijklmnopqrstuvwxyza"
    assert times.bubble_fraction == 0


def test_a_wider_text_shows_the_same_step_in_finer_slices() -> None:
    times = simulate(order("gpipe", 2, 1, [(0, 1)]), forward_seconds=[1.0, 1.0], backward_seconds=[2.0, 2.0])
    assert times.text(width=12).splitlines() == ["stage 0  00......aaaa", "stage 1  ..00aaaa...."]
    assert times.text(width=6).splitlines() == ["stage 0  0...aa", "stage 1  .0aa.."]


def test_spans_with_transfers_that_take_time() -> None:
    """Stage 1 starts when the activation is there, at 1 + 0.25; the gradient takes 0.5 back."""
    lists = order("naive", 2, 1, [(0, 1)])
    times = simulate(
        lists,
        forward_seconds=[1.0, 2.0],
        backward_seconds=[3.0, 4.0],
        send_seconds=lambda source, to: 0.25 if source < to else 0.5,
    )
    assert times.spans == (
        Span(0, 0.0, 1.0, "forward", 0),
        Span(0, 1.0, 1.25, "send", 0),
        Span(0, 7.25, 7.75, "receive", 0),
        Span(0, 7.75, 10.75, "backward", 0),
        Span(1, 1.0, 1.25, "receive", 0),
        Span(1, 1.25, 3.25, "forward", 0),
        Span(1, 3.25, 7.25, "backward", 0),
        Span(1, 7.25, 7.75, "send", 0),
    )
    assert times.step_seconds == 10.75
    assert times.busy_seconds == (4.0, 6.0)
    assert times.bubble_fraction == pytest.approx(1 - 10 / 21.5)


def test_with_rendezvous_a_send_waits_until_its_receive_is_posted() -> None:
    """The quick stage's second send ends when the slow one has done its first forward; posted ahead, it is over at once."""
    quick = [Forward(0), SendActivation(0, to=1), Forward(1), SendActivation(1, to=1), Forward(2)]
    slow = [RecvActivation(0, source=0), Forward(0), RecvActivation(1, source=0), Forward(1)]
    for rendezvous, third in ((True, 6.0), (False, 2.0)):
        times = simulate([quick, slow], forward_seconds=[1.0, 5.0], backward_seconds=[0.0, 0.0], rendezvous=rendezvous)
        assert [span.start_seconds for span in times.compute] == [0.0, 1.0, third, 1.0, 6.0]


def test_transfers_go_on_beside_the_compute_until_the_next_run_and_the_end() -> None:
    """The first send takes 3 from 1 on, beside the second forward; the run after that waits for it."""
    first = [Forward(0), SendActivation(0, to=1), Forward(1), SendActivation(1, to=1), Forward(2)]
    second = [RecvActivation(0, source=0), Forward(0), RecvActivation(1, source=0), Forward(1)]
    times = simulate([first, second], forward_seconds=[1.0, 1.0], backward_seconds=[0.0, 0.0], send_seconds=3.0)
    assert [span.start_seconds for span in times.compute] == [0.0, 1.0, 4.0, 4.0, 7.0]
    sends = [span for span in times.spans if span.kind == "send"]
    assert [(span.start_seconds, span.end_seconds) for span in sends] == [(1.0, 4.0), (4.0, 7.0)]
    assert times.step_seconds == 8.0
    alone = simulate([first[:2], second[:1]], forward_seconds=[1.0, 1.0], backward_seconds=[0.0, 0.0], send_seconds=3.0)
    assert alone.step_seconds == 4.0, "the end of the list waits for its sends"


def test_a_receive_is_waited_for_by_the_compute_that_needs_it() -> None:
    early = [RecvActivation(0, source=0), RecvActivation(1, source=0), Forward(0), Forward(1)]
    sender = [Forward(0), SendActivation(0, to=1), Forward(1), SendActivation(1, to=1)]
    times = simulate([sender, early], forward_seconds=[5.0, 1.0], backward_seconds=[0.0, 0.0])
    assert [span.start_seconds for span in times.compute if span.rank == 1] == [5.0, 10.0]
    strict = simulate([sender, early], forward_seconds=[5.0, 1.0], backward_seconds=[0.0, 0.0], rendezvous=True)
    assert [span.start_seconds for span in strict.compute if span.rank == 1] == [10.0, 11.0]


def test_several_stages_a_rank_and_split_backwards() -> None:
    """Two ranks, the stages 0 and 3 on the first; every time is its own."""
    lists = order("zb-v", 2, 1, chain(4))
    times = simulate(
        lists,
        stage_ranks=(0, 1, 1, 0),
        forward_seconds=[1.0, 2.0, 3.0, 4.0],
        backward_seconds=[0.0] * 4,
        backward_input_seconds=[1.0, 2.0, 3.0, 4.0],
        backward_weight_seconds=[0.5, 0.25, 0.125, 2.0],
        send_seconds=0.5,
    )
    assert [span for span in times.compute if span.rank == 0] == [
        Span(0, 0.0, 1.0, "forward", 0),
        Span(0, 7.0, 11.0, "forward", 0, 1),
        Span(0, 11.0, 15.0, "backward input", 0, 1),
        Span(0, 15.0, 17.0, "backward weight", 0, 1),
        Span(0, 21.125, 22.125, "backward input", 0),
        Span(0, 22.125, 22.625, "backward weight", 0),
    ]
    assert [span for span in times.compute if span.rank == 1] == [
        Span(1, 1.5, 3.5, "forward", 0),
        Span(1, 3.5, 6.5, "forward", 0, 1),
        Span(1, 15.5, 18.5, "backward input", 0, 1),
        Span(1, 18.5, 18.625, "backward weight", 0, 1),
        Span(1, 18.625, 20.625, "backward input", 0),
        Span(1, 20.625, 20.875, "backward weight", 0),
    ]
    assert (times.num_ranks, times.num_stages, times.stage_ranks) == (2, 4, (0, 1, 1, 0))
    assert times.busy_seconds == (12.5, 10.375)
    assert times.bubble_seconds == pytest.approx(22.625 - 12.5)


def test_halves_of_the_backward_stand_in_for_unknown_times() -> None:
    times = simulate([[Forward(0), BackwardInput(0), BackwardWeight(0)]], forward_seconds=[1.0], backward_seconds=[3.0])
    assert [span.end_seconds for span in times.spans] == [1.0, 2.5, 4.0]


def test_the_text_of_zb_v_shows_weight_gradients_and_stages() -> None:
    times = simulate(
        order("zb-v", 2, 4, chain(4)), stage_ranks=(0, 1, 1, 0), forward_seconds=[1.0] * 4, backward_seconds=[2.0] * 4
    )
    assert times.text().splitlines() == [
        "rank 0  0120aA1bB3aA2cCbB3dDcCdD.",
        "stage   000333333000333003330000",
        "rank 1  .0011aA2aA2bB3bB3cCcddCDD",
        "stage    121222111222111222121121",
    ]
    legend = "0-9 forward of that microbatch, a-z backward (a is 0), A-Z its weight gradients, . idle; below it the stage"
    assert times.legend == legend


def test_no_two_computes_of_a_stage_overlap_and_receivers_follow_senders() -> None:
    edges = [*chain(4), (0, 3), (0, 2)]
    for name in ("naive", "gpipe", "1f1b", "zb-h1"):
        lists = order(name, 4, 7, edges)
        times = simulate(
            lists, forward_seconds=[1.0, 0.5, 2.0, 0.7], backward_seconds=[2.0, 1.5, 3.0, 1.0], send_seconds=0.1
        )
        at = {(span.rank, span.kind.removesuffix(" input"), span.microbatch): span for span in times.compute}
        for stage in range(4):
            mine = [span for span in times.compute if span.rank == stage]
            assert all(left.end_seconds <= right.start_seconds for left, right in pairwise(mine))
        for source, to in edges:
            for microbatch in range(7):
                forward = at[source, "forward", microbatch], at[to, "forward", microbatch]
                assert forward[1].start_seconds >= forward[0].end_seconds + 0.1 - 1e-9
                backward = at[to, "backward", microbatch], at[source, "backward", microbatch]
                assert backward[1].start_seconds >= backward[0].end_seconds + 0.1 - 1e-9


def test_a_deadlock_names_the_circle() -> None:
    """Each transfer stands alone, so each stage sends while the other wants to send."""
    first = [SendActivation(0, to=1), Forward(1), RecvGradient(0, source=1)]
    second = [SendGradient(0, to=0), Forward(1), RecvActivation(0, source=0)]
    with pytest.raises(BadSchedule) as error:
        simulate([first, second], forward_seconds=[1.0, 1.0], backward_seconds=[1.0, 1.0], rendezvous=True)
    assert "stage 0 waits in SendActivation(0, to=1) for stage 1" in str(error.value)
    assert "stage 1 waits in SendGradient(0, to=0) for stage 0" in str(error.value)


def test_a_transfer_without_its_other_end_is_a_deadlock() -> None:
    lists = [[Forward(0), SendActivation(0, to=1)], [Forward(0)]]
    with pytest.raises(BadSchedule, match="which has come to its end"):
        simulate(lists, forward_seconds=[1.0, 1.0], backward_seconds=[1.0, 1.0], rendezvous=True)
    lists = [[Forward(0)], [RecvActivation(0, source=0), Forward(0)]]
    with pytest.raises(
        BadSchedule, match=r"stage 1 waits in RecvActivation\(.*\) for stage 0, which has come to its end"
    ):
        simulate(lists, forward_seconds=[1.0, 1.0], backward_seconds=[1.0, 1.0])


def test_a_circle_of_ranks_with_several_stages_is_named_by_ranks() -> None:
    lists = [
        [RecvActivation(0, source=2, chunk=1), Forward(0, 1), Forward(0), SendActivation(0, to=1)],
        [RecvActivation(0, source=0), Forward(0), Forward(0, 1), SendActivation(0, to=3, chunk=1)],
    ]
    with pytest.raises(
        BadSchedule, match=r"rank 0 waits in RecvActivation\(.*\) for rank 1, rank 1 waits in .* for rank 0"
    ):
        simulate(lists, stage_ranks=(0, 1, 1, 0), forward_seconds=[1.0] * 4, backward_seconds=[1.0] * 4)


def test_empty_and_timeless_steps() -> None:
    assert Timeline((), 0, 0.0).bubble_fraction == 0
    times = simulate([[Forward(0), Backward(0)]], forward_seconds=[0.0], backward_seconds=[0.0])
    assert (times.step_seconds, times.bubble_fraction, times.text()) == (0.0, 0.0, "stage 0  ")

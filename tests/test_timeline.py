"""The simulated times of instruction lists, by hand where the sums are small, and the printed TIMELINE."""

from __future__ import annotations

from itertools import pairwise

import pytest

from costmodel.errors import BadSchedule
from passes.instructions import Backward, Forward, RecvActivation, RecvGradient, SendActivation, SendGradient
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


def test_a_send_waits_until_its_receive_is_posted() -> None:
    """Transfers are not buffered: the quick stage's second send ends when the slow one has done its first forward."""
    quick = [Forward(0), SendActivation(0, to=1), Forward(1), SendActivation(1, to=1), Forward(2)]
    slow = [RecvActivation(0, source=0), Forward(0), RecvActivation(1, source=0), Forward(1)]
    times = simulate([quick, slow], forward_seconds=[1.0, 5.0], backward_seconds=[0.0, 0.0])
    assert [span.start_seconds for span in times.compute] == [0.0, 1.0, 6.0, 1.0, 6.0]


def test_no_two_computes_of_a_stage_overlap_and_receivers_follow_senders() -> None:
    edges = [*chain(4), (0, 3), (0, 2)]
    for name in ("naive", "gpipe", "1f1b"):
        lists = order(name, 4, 7, edges)
        times = simulate(
            lists, forward_seconds=[1.0, 0.5, 2.0, 0.7], backward_seconds=[2.0, 1.5, 3.0, 1.0], send_seconds=0.1
        )
        at = {(span.rank, span.kind, span.microbatch): span for span in times.compute}
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
        simulate([first, second], forward_seconds=[1.0, 1.0], backward_seconds=[1.0, 1.0])
    assert "stage 0 waits in SendActivation(0, to=1) for stage 1" in str(error.value)
    assert "stage 1 waits in SendGradient(0, to=0) for stage 0" in str(error.value)


def test_a_transfer_without_its_other_end_is_a_deadlock() -> None:
    lists = [[Forward(0), SendActivation(0, to=1)], [Forward(0)]]
    with pytest.raises(BadSchedule, match="which has come to its end"):
        simulate(lists, forward_seconds=[1.0, 1.0], backward_seconds=[1.0, 1.0])


def test_empty_and_timeless_steps() -> None:
    assert Timeline((), 0, 0.0).bubble_fraction == 0
    times = simulate([[Forward(0), Backward(0)]], forward_seconds=[0.0], backward_seconds=[0.0])
    assert (times.step_seconds, times.bubble_fraction, times.text()) == (0.0, 0.0, "stage 0  ")

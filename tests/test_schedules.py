"""Every row of SCHEDULES over a grid of sizes, ordered with transfers, run in random interleavings, and proved; and
deliberately wrong lists, each of which the proof must catch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import BadArgument, BadSchedule
from passes.instructions import (
    Backward,
    Compute,
    Forward,
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
    SumGradients,
    instruction,
)
from passes.order import Edge, Lists, in_flight, order, prove
from passes.schedules import FORWARD_ONLY, SCHEDULES, register, schedule
from passes.timeline import simulate

EXAMPLES = [
    Forward(0),
    Forward(3, chunk=1),
    Backward(12),
    SendActivation(0, to=1),
    RecvActivation(0, source=1),
    SendGradient(4, to=0, chunk=2),
    RecvGradient(0, source=7),
    SumGradients(),
]
GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 17)]


def chain(num_stages: int) -> list[Edge]:
    return [(stage, stage + 1) for stage in range(num_stages - 1)]


def skips(num_stages: int) -> list[Edge]:
    """A U-Net's: the first stage to the last, the second to the last but one; and the first to all."""
    mirrored = [(stage, num_stages - 1 - stage) for stage in range(num_stages // 2)]
    return sorted({*chain(num_stages), *mirrored, *((0, stage) for stage in range(1, num_stages))})


@cache
def ordered(name: str, num_stages: int, num_microbatches: int, edges_of: Callable[[int], list[Edge]]) -> Lists:
    """What several tests look at from different sides."""
    return order(name, num_stages, num_microbatches, edges_of(num_stages))


def run_in_random_order(lists: Sequence[Sequence[Instruction]], seed: int) -> None:
    """Run the lists as ranks would, a random able stage at a time, with nothing taken from order or timeline: a run of
    transfers is over when all other ends are posted, and what arrives must be what was sent."""
    chooser = random.Random(seed)
    # Per stage and run, the transfers' ends: (from, to, what, number) and whether it sends, with the microbatch.
    runs: list[list[dict[tuple[tuple, bool], int]]] = []
    for stage, listed in enumerate(lists):
        runs.append([])
        counts: Counter[tuple] = Counter()
        for transfers, group in groupby(listed, lambda one: not isinstance(one, Forward | Backward | SumGradients)):
            runs[-1].append({})
            for one in group if transfers else ():
                sends = isinstance(one, SendActivation | SendGradient)
                key = (stage, one.to, type(one).__name__[4:]) if sends else (one.source, stage, type(one).__name__[4:])
                runs[-1][-1][(*key, counts[key]), sends] = one.microbatch
                counts[key] += 1
    posted: dict[tuple[tuple, bool], int] = {}
    waits = [False] * len(lists)
    while any(runs):
        able = [
            stage
            for stage, left in enumerate(runs)
            if left and not (waits[stage] and any((key, not sends) not in posted for key, sends in left[0]))
        ]
        assert able, f"deadlock at {[left[0] for left in runs if left]}"
        stage = chooser.choice(able)
        if not waits[stage]:
            posted.update(runs[stage][0])
        else:
            for (key, sends), microbatch in runs[stage].pop(0).items():
                assert posted[key, not sends] == microbatch
        waits[stage] = not waits[stage]


def one_by_one(lists: Lists) -> list[list[Instruction]]:
    """The same lists, with each transfer waited for by itself: an idle compute between each two."""
    return [[part for one in listed for part in (one, Forward(0))] for listed in lists]


def without(lists: Lists, stage: int, index: int) -> list[list[Instruction]]:
    return [[one for at, one in enumerate(row) if (s, at) != (stage, index)] for s, row in enumerate(lists)]


def replaced(lists: Lists, stage: int, change: Callable[[list[Instruction]], None]) -> list[list[Instruction]]:
    changed = [list(row) for row in lists]
    change(changed[stage])
    return changed


# Instructions as values


@pytest.mark.parametrize("one", EXAMPLES, ids=repr)
def test_an_instruction_is_what_its_repr_and_its_json_say(one: Instruction) -> None:
    assert eval(repr(one)) == one
    assert instruction(one.to_list()) == one
    assert one in {one}


def test_repr_is_short_and_leaves_out_chunk_0() -> None:
    assert repr([Forward(0), SendActivation(0, to=1), RecvGradient(2, source=3, chunk=1), SumGradients()]) == (
        "[Forward(0), SendActivation(0, to=1), RecvGradient(2, source=3, chunk=1), SumGradients()]"
    )
    assert SendActivation(0, to=1).to_list() == ["SendActivation", 0, 1]


@pytest.mark.parametrize(
    "values",
    [
        *([], "Forward", ["Jump", 0], ["Forward"], ["Forward", -1], ["Forward", "0"], ["Forward", True]),
        *(["Forward", 0, 1, 2], ["SendActivation", 0], ["SumGradients", 1], [0, 1], {}),
    ],
    ids=repr,
)
def test_json_that_is_no_instruction_is_refused(values: list[str | int]) -> None:
    with pytest.raises(BadArgument, match="instruction"):
        instruction(values)


# The rows of the table


@pytest.mark.parametrize("edges_of", [chain, skips])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_proved_and_runs_in_any_interleaving(name: str, edges_of: Callable[[int], list[Edge]]) -> None:
    for num_stages, num_microbatches in GRID:
        lists = ordered(name, num_stages, num_microbatches, edges_of)
        if num_microbatches in (1, 2, 5, num_stages):
            run_in_random_order(lists, seed=num_stages)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_on_microbatches_in_flight_is_reached(name: str) -> None:
    for num_stages, num_microbatches in GRID:
        lists = ordered(name, num_stages, num_microbatches, chain)
        for stage, listed in enumerate(lists):
            assert in_flight(listed) == schedule(name).max_in_flight(stage, num_stages, num_microbatches)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_of_equal_stages_is_the_published_one(name: str) -> None:
    bubble = schedule(name).bubble
    assert bubble is not None
    for num_stages, num_microbatches in GRID:
        lists = ordered(name, num_stages, num_microbatches, chain)
        for backward in (1.0, 2.0, 2.5):
            times = simulate(lists, forward_seconds=[1.0] * num_stages, backward_seconds=[backward] * num_stages)
            assert times.bubble_fraction == pytest.approx(float(bubble(num_stages, num_microbatches)), abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_skips_cost_no_time_where_forward_and_backward_take_the_same(name: str) -> None:
    for num_stages, num_microbatches in GRID:
        ones = [1.0] * num_stages
        times = [
            simulate(ordered(name, num_stages, num_microbatches, edges_of), forward_seconds=ones, backward_seconds=ones)
            for edges_of in (chain, skips)
        ]
        assert times[0].step_seconds == times[1].step_seconds


def test_1f1b_exchanges_with_its_neighbour_in_one_run() -> None:
    first, second = order("1f1b", 2, 3, [(0, 1)])
    assert first == (
        *(Forward(0), SendActivation(0, to=1)),
        *(Forward(1), SendActivation(1, to=1), RecvGradient(0, source=1), Backward(0)),
        *(Forward(2), SendActivation(2, to=1), RecvGradient(1, source=1), Backward(1)),
        *(RecvGradient(2, source=1), Backward(2), SumGradients()),
    )
    assert second == (
        *(RecvActivation(0, source=0), Forward(0), Backward(0)),
        *(SendGradient(0, to=0), RecvActivation(1, source=0), Forward(1), Backward(1)),
        *(SendGradient(1, to=0), RecvActivation(2, source=0), Forward(2), Backward(2)),
        *(SendGradient(2, to=0), SumGradients()),
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_between_neighbours_sends_stand_right_after_and_receives_right_before(name: str) -> None:
    for num_stages, num_microbatches in GRID:
        for listed in ordered(name, num_stages, num_microbatches, chain):
            compute: Instruction | None = None
            for one, following in zip(listed, (*listed[1:], SumGradients()), strict=True):
                if isinstance(one, Forward | Backward):
                    compute = one
                elif isinstance(one, SendActivation):
                    assert compute == Forward(one.microbatch)
                elif isinstance(one, SendGradient):
                    assert compute == Backward(one.microbatch)
                elif isinstance(one, RecvActivation):
                    assert following == Forward(one.microbatch)
                elif isinstance(one, RecvGradient):
                    assert following == Backward(one.microbatch)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_flow_back_only_where_they_are_asked_for(name: str) -> None:
    edges = skips(5)
    lists = order(name, 5, 4, edges, gradient_edges=[(2, 3), (0, 4)], sum_gradients=False)
    sent = {(stage, one.to) for stage, row in enumerate(lists) for one in row if isinstance(one, SendGradient)}
    assert sent == {(3, 2), (4, 0)}
    assert not any(isinstance(one, SumGradients) for row in lists for one in row)
    run_in_random_order(lists, seed=0)


def test_evaluation_has_forwards_only() -> None:
    for num_stages, num_microbatches in GRID:
        lists = order(FORWARD_ONLY, num_stages, num_microbatches, skips(num_stages))
        kinds = {type(one) for listed in lists for one in listed}
        assert kinds <= {Forward, SendActivation, RecvActivation}
        run_in_random_order(lists, seed=1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_edges_can_be_ordered_and_take_no_less_than_the_busiest_stage(data: st.DataObject) -> None:
    num_stages, num_microbatches = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    pairs = [(source, to) for source in range(num_stages) for to in range(source + 1, num_stages)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    back = data.draw(st.lists(st.sampled_from(edges), unique=True)) if edges else []
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    lists = order(name, num_stages, num_microbatches, edges, gradient_edges=back)
    run_in_random_order(lists, seed=data.draw(st.integers(0, 99)))
    seconds = st.lists(st.floats(0.0, 4.0), min_size=num_stages, max_size=num_stages)
    times = simulate(lists, forward_seconds=data.draw(seconds), backward_seconds=data.draw(seconds), send_seconds=0.5)
    assert times.step_seconds >= max(times.busy_seconds) - 1e-9


# Wrong lists


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_list_with_any_instruction_left_out_or_doubled_is_caught(name: str) -> None:
    edges = [(0, 1), (1, 2), (0, 2)]
    lists = order(name, 3, 4, edges)
    for stage, listed in enumerate(lists):
        for index, one in enumerate(listed):
            with pytest.raises(BadSchedule, match=f"[Ss]tage {stage} "):
                prove(without(lists, stage, index), edges, schedule=name, num_microbatches=4)
            with pytest.raises(BadSchedule, match="twice"):
                prove(replaced(lists, stage, lambda row, one=one: row.append(one)), edges)  # type: ignore[misc]


def test_a_missing_backward_is_named() -> None:
    lists = order("1f1b", 2, 3, [(0, 1)])
    with pytest.raises(BadSchedule, match=r"Stage 1 never runs Backward\(2\)"):
        prove(without(lists, 1, lists[1].index(Backward(2))), [(0, 1)])


@pytest.mark.parametrize(
    ("stage", "first", "second", "message"),
    [
        (0, Forward(1), Backward(1), r"Stage 0 runs Backward\(1\) before Forward\(1\)"),
        (0, Forward(0), SendActivation(0, to=1), r"Stage 0 runs SendActivation\(0, to=1\) before Forward\(0\)"),
        (1, RecvActivation(0, source=0), Forward(0), r"Stage 1 runs Forward\(0\) before RecvActivation\(0, source=0\)"),
        (0, RecvGradient(2, source=1), Backward(2), r"Stage 0 runs Backward\(2\) before RecvGradient\(2, source=1\)"),
        (1, Backward(1), SendGradient(1, to=0), r"Stage 1 runs SendGradient\(1, to=0\) before Backward\(1\)"),
        (1, SendGradient(2, to=0), SumGradients(), r"Stage 1 runs SumGradients\(\) before SendGradient\(2, to=0\)"),
        (0, SendActivation(0, to=1), SendActivation(1, to=1), r"Stage 0 runs SendActivation\(1, to=1\) before Forward"),
    ],
    ids=str,
)
def test_swapped_instructions_are_named(stage: int, first: Instruction, second: Instruction, message: str) -> None:
    def swap(row: list[Instruction]) -> None:
        left, right = row.index(first), row.index(second)
        row[left], row[right] = row[right], row[left]

    lists = order("gpipe", 2, 3, [(0, 1)])
    with pytest.raises(BadSchedule, match=message):
        prove(replaced(lists, stage, swap), [(0, 1)])


def test_backwards_out_of_order_are_caught_since_they_change_the_last_bits() -> None:
    def generator(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
        yield from (Forward(microbatch) for microbatch in range(num_microbatches))
        yield from (Backward(microbatch) for microbatch in reversed(range(num_microbatches)))

    with pytest.raises(BadSchedule, match=r"1 stages and 2 microbatches: Stage 0 runs Backward\(1\) before"):
        register("last-first", generator)
    assert "last-first" not in SCHEDULES


def test_sends_that_meet_other_receives_are_caught() -> None:
    """Both stages are right by themselves; the second takes the microbatches in another order than the first sends."""
    first = [Forward(0), SendActivation(0, to=1), Forward(1), SendActivation(1, to=1)]
    second = [RecvActivation(1, source=0), Forward(1), RecvActivation(0, source=0), Forward(0)]
    with pytest.raises(BadSchedule, match=r"SendActivation\(0, to=1\) where stage 1 runs RecvActivation\(1"):
        prove([first, second], [(0, 1)])


def test_more_in_flight_than_the_schedule_allows_is_caught() -> None:
    edges = chain(3)
    lists = order("gpipe", 3, 4, edges)
    with pytest.raises(BadSchedule, match=r"Stage 0 has 4 microbatches .* '1f1b' allows 3") as error:
        prove(lists, edges, schedule="1f1b")
    assert "Forward(3)" in str(error.value)


def test_a_far_send_right_behind_its_compute_deadlocks_1f1b_and_the_circle_is_named() -> None:
    """Why far sends are placed where the receiver asks: with (0, 3) beside the chain, as the other sends are placed."""
    edges = [*chain(4), (0, 3)]
    changed = [list(row) for row in order("1f1b", 4, 6, edges)]
    for row in changed:
        for one in [one for one in row if isinstance(one, SendActivation | SendGradient)]:
            row.remove(one)
            made = Forward(one.microbatch) if isinstance(one, SendActivation) else Backward(one.microbatch)
            row.insert(row.index(made) + 1, one)
    with pytest.raises(BadSchedule, match=r"deadlocks(.|\n)*stage 0 waits in \w+\(\d, to=\d\) for stage \d, stage"):
        prove(changed, edges)
    with pytest.raises(AssertionError, match="deadlock"):
        run_in_random_order(changed, seed=0)


def test_1f1b_deadlocks_with_transfers_one_by_one_and_never_in_runs() -> None:
    deadlocks = 0
    for num_stages, num_microbatches in GRID:
        lists = ordered("1f1b", num_stages, num_microbatches, chain)
        zeros = [0.0] * num_stages
        simulate(lists, forward_seconds=zeros, backward_seconds=zeros)
        try:
            simulate(one_by_one(lists), forward_seconds=zeros, backward_seconds=zeros)
        except BadSchedule:
            deadlocks += 1
    assert deadlocks == 105


def test_instructions_of_no_edge_are_caught() -> None:
    lists = order("gpipe", 3, 2, skips(3))
    with pytest.raises(BadSchedule, match=r"Stage 0 runs SendActivation\(0, to=2\), which is no part"):
        prove(lists, chain(3))
    with pytest.raises(BadSchedule, match="never runs"):
        prove(order("gpipe", 3, 2, chain(3)), skips(3))


# The table


def test_a_schedule_of_the_users_is_proved_and_then_usable() -> None:
    def two_at_a_time(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
        if num_microbatches % 2:
            raise BadArgument("two-at-a-time needs an even number of microbatches")
        for first in range(0, num_microbatches, 2):
            yield from (Forward(first), Forward(first + 1), Backward(first), Backward(first + 1))

    try:
        row = register("two-at-a-time", two_at_a_time, max_in_flight=lambda stage, num_stages, num_microbatches: 2)
        assert schedule("two-at-a-time") is row
        assert in_flight(order("two-at-a-time", 3, 8, skips(3))[0]) == 2
        with pytest.raises(BadArgument, match="already"):
            register("two-at-a-time", two_at_a_time)
        with pytest.raises(BadSchedule, match="allows 1"):
            register("other", two_at_a_time, max_in_flight=lambda stage, num_stages, num_microbatches: 1)
    finally:
        SCHEDULES.pop("two-at-a-time", None)
    assert "other" not in SCHEDULES


def test_stages_that_need_each_other_in_a_circle_are_caught() -> None:
    def crossed(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
        if num_stages != 2 or num_microbatches != 2:
            raise BadArgument("two by two")
        if stage == 0:
            yield from (Forward(0), Backward(0), Forward(1), Backward(1))
        else:
            yield from (Forward(1), Forward(0), Backward(0), Backward(1))

    with pytest.raises(BadSchedule, match="in a circle"):
        register("crossed", crossed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2, [(0, 1)]), '"1f1b"'),
        (("1f1b", 0, 2, []), "number of stages"),
        (("1f1b", 2, 0, [(0, 1)]), "number of microbatches"),
        (("1f1b", 2, 2.0, [(0, 1)]), "number of microbatches"),
        (("1f1b", 2, 2, [(1, 0)]), "edge"),
        (("1f1b", 2, 2, [(0, 2)]), "edge"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        order(*arguments)
    with pytest.raises(BadArgument, match="back over"):
        order("1f1b", 3, 2, [(0, 1)], gradient_edges=[(1, 2)])

"""Every row of SCHEDULES over a grid of sizes, ordered with transfers, run in random interleavings, and proved; and
deliberately wrong lists, each of which the proof must catch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import BadArgument, BadSchedule
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
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
from passes.schedules import FORWARD_ONLY, SCHEDULES, loop, register, schedule, v_shape
from passes.timeline import Timeline, simulate

EXAMPLES = [
    Forward(0),
    Forward(3, chunk=1),
    Backward(12),
    BackwardInput(2),
    BackwardWeight(2, chunk=1),
    SendActivation(0, to=1),
    RecvActivation(0, source=1),
    SendGradient(4, to=0, chunk=2),
    RecvGradient(0, source=7),
    SumGradients(),
]
# The published formulas by themselves: the idle time between a rank's first and last compute, for p ranks with v stages
# each, m microbatches, and a stage's forward F, input gradients B and weight gradients W; and from which m on they hold.
PUBLISHED: dict[str, Callable[..., float]] = {
    "naive": lambda p, m, v, F, B, W: m * (p - 1) * (F + B + W),
    "gpipe": lambda p, m, v, F, B, W: (p - 1) * (F + B + W),
    "1f1b": lambda p, m, v, F, B, W: (p - 1) * (F + B + W),
    "interleaved-1f1b": lambda p, m, v, F, B, W: (p - 1) * (v * F + v * B + v * W) / v,
    "zb-h1": lambda p, m, v, F, B, W: (p - 1) * (F + B - W),
    "zb-h2": lambda p, m, v, F, B, W: (p - 1) * (F + B - 2 * W),
    "zb-v": lambda p, m, v, F, B, W: 0,
}
FROM_MICROBATCHES: dict[str, Callable[[int], int]] = {
    "interleaved-1f1b": lambda p: p,
    "zb-h1": lambda p: p,
    "zb-h2": lambda p: 2 * p - 1,
    "zb-v": lambda p: 2 * p - 1,
    "dualpipe-v": lambda p: 2 * p,
}

# (pipeline ranks, stages a rank, microbatches)
Size = tuple[int, int, int]
QUICK = (1, 2, 3, 5, 8, 16)
ALL = range(1, 33)


def sizes(name: str, microbatches: Sequence[int] = QUICK) -> list[Size]:
    virtual_stages = schedule(name).virtual_stages or (2, 3, 4)
    return [(p, v, m) for p in range(1, 9) for v in virtual_stages for m in microbatches]


# Every row, quickly and over the whole grid; interleaved has three numbers of stages a rank, and three minutes of it.
every_row = pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        *(pytest.param(name, QUICK, id=name) for name in SCHEDULES),
        *(
            pytest.param(name, ALL, id=f"{name}-all", marks=pytest.mark.wide if schedule(name).virtual_stages is None else pytest.mark.slow)
            for name in SCHEDULES
        ),
    ],
)


def chain(num_stages: int) -> list[Edge]:
    return [(stage, stage + 1) for stage in range(num_stages - 1)]


def skips(num_stages: int) -> list[Edge]:
    """A U-Net's: the first stage to the last, the second to the last but one; and the first to all."""
    mirrored = [(stage, num_stages - 1 - stage) for stage in range(num_stages // 2)]
    return sorted({*chain(num_stages), *mirrored, *((0, stage) for stage in range(1, num_stages))})


@cache
def ordered(name: str, size: Size, edges_of: Callable[[int], list[Edge]] = chain) -> Lists:
    """What several tests look at from different sides."""
    num_ranks, virtual_stages, num_microbatches = size
    return order(name, num_ranks, num_microbatches, edges_of(num_ranks * virtual_stages), virtual_stages=virtual_stages)


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Millions of instructions would slow down the garbage collector for every test that follows."""
    yield
    ordered.cache_clear()


def ranks_of(name: str, size: Size) -> tuple[int, ...]:
    return schedule(name).stage_ranks(size[0], size[1])


def played(
    name: str, size: Size, edges_of: Callable[[int], list[Edge]] = chain, times: Sequence[float] = (1.0, 1.0, 1.0)
) -> Timeline:
    """The simulation with equal stages of these times for forward, input gradients and weight gradients."""
    forward, inputs, weights = ([seconds] * (size[0] * size[1]) for seconds in times)
    return simulate(
        ordered(name, size, edges_of),
        stage_ranks=ranks_of(name, size),
        forward_seconds=forward,
        backward_seconds=[left + right for left, right in zip(inputs, weights, strict=True)],
        backward_input_seconds=inputs,
        backward_weight_seconds=weights,
    )


def run_in_random_order(
    lists: Sequence[Sequence[Instruction]],
    seed: int,
    *,
    stage_ranks: Sequence[int] = (),
    edges: Sequence[Edge] = (),
    gradient_edges: Sequence[Edge] = (),
) -> None:
    """Run the lists as ranks would, a random able rank at a time, with nothing taken from order, prove or timeline.

    A run of transfers is over when all other ends are posted, and what arrives must be what was sent, per pair of ranks
    in one order. Every compute must find what it needs.
    """
    chooser = random.Random(seed)
    ranks = list(stage_ranks) or list(range(len(lists)))
    stages = [[stage for stage, of in enumerate(ranks) if of == rank] for rank in range(len(lists))]
    # Per rank and run: the transfers' ends ((from rank, to rank), number, sends?) with what they move, or a compute.
    runs: list[list[Instruction | dict[tuple[tuple[int, int], int, bool], tuple]]] = []
    for rank, listed in enumerate(lists):
        runs.append([])
        counts: Counter[tuple] = Counter()
        for transfers, group in groupby(listed, lambda one: hasattr(one, "to") or hasattr(one, "source")):
            ends: dict[tuple[tuple[int, int], int, bool], tuple] = {}
            for one in group:
                if not transfers:
                    runs[-1].append(one)
                    continue
                sends, mine = hasattr(one, "to"), stages[rank][one.chunk]  # type: ignore[union-attr]
                source, to = (mine, one.to) if sends else (one.source, mine)  # type: ignore[union-attr]
                pair = ranks[source], ranks[to]
                assert pair[0] != pair[1], "nothing is transferred within a rank"
                moved = source, to, type(one).__name__[4:], one.microbatch  # type: ignore[union-attr]
                ends[pair, counts[pair, sends], sends] = moved
                counts[pair, sends] += 1
            if ends:
                runs[-1].append(ends)
    done: list[set[tuple]] = [set() for _ in lists]
    posted: dict[tuple[tuple[int, int], int, bool], tuple] = {}
    waits = [False] * len(lists)

    def compute(rank: int, one: Instruction) -> None:
        if isinstance(one, SumGradients):
            return
        assert isinstance(one, Compute)
        stage, have = stages[rank][one.chunk], done[rank]
        needs: list[tuple] = []
        if isinstance(one, Forward):
            needs += [(source, to, "Activation", one.microbatch) for source, to in edges if to == stage]
            makes = [(to, "Activation") for source, to in edges if source == stage]
        elif isinstance(one, BackwardWeight):
            needs, makes = [(stage, "input gradients", one.microbatch)], []
        else:
            needs += [(to, source, "Gradient", one.microbatch) for source, to in gradient_edges if source == stage]
            needs += [(stage, "forward", one.microbatch)]
            makes = [(source, "Gradient") for source, to in gradient_edges if to == stage]
        assert have >= set(needs), f"{one!r} of stage {stage} lacks {set(needs) - have}"
        have |= {(stage, other, what, one.microbatch) for other, what in makes}
        have.add((stage, "forward" if isinstance(one, Forward) else "input gradients", one.microbatch))

    while any(runs):
        able = [
            rank
            for rank, left in enumerate(runs)
            if left
            and not (
                waits[rank]
                and isinstance(left[0], dict)
                and any((pair, number, not sends) not in posted for pair, number, sends in left[0])
            )
        ]
        assert able, f"deadlock at {[left[0] for left in runs if left]}"
        rank = chooser.choice(able)
        step = runs[rank][0]
        if not isinstance(step, dict):
            compute(rank, step)
            runs[rank].pop(0)
            continue
        if not waits[rank]:
            for (_, _, sends), moved in step.items():
                assert not (sends and edges) or moved in done[rank], f"rank {rank} sends {moved} before it is made"
            posted.update(step)
        else:
            runs[rank].pop(0)
            for (pair, number, sends), moved in step.items():
                assert posted[pair, number, not sends] == moved
                if not sends:
                    done[rank].add(moved)
        waits[rank] = not waits[rank]


def one_by_one(lists: Lists) -> list[list[Instruction]]:
    """The same lists, with each transfer waited for by itself: an idle compute between each two."""
    return [[part for one in listed for part in (one, Forward(0))] for listed in lists]


def without(lists: Lists, stage: int, index: int) -> list[list[Instruction]]:
    return [[one for at, one in enumerate(row) if (s, at) != (stage, index)] for s, row in enumerate(lists)]


def replaced(lists: Lists, stage: int, change: Callable[[list[Instruction]], object]) -> list[list[Instruction]]:
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
@every_row
def test_every_size_is_proved_and_runs_in_any_interleaving(
    name: str, microbatches: Sequence[int], edges_of: Callable[[int], list[Edge]]
) -> None:
    for size in sizes(name, microbatches):
        lists = ordered(name, size, edges_of)
        if size[2] in (1, 2, 5, size[0]) and size[0] * size[1] <= 16:
            edges = edges_of(size[0] * size[1])
            run_in_random_order(
                lists, seed=size[0], stage_ranks=ranks_of(name, size), edges=edges, gradient_edges=edges
            )


@every_row
def test_the_bound_on_microbatches_in_flight_is_reached(name: str, microbatches: Sequence[int]) -> None:
    for size in sizes(name, microbatches):
        for rank, listed in enumerate(ordered(name, size)):
            assert in_flight(listed) == schedule(name).max_in_flight(rank, size[0], size[2], size[1])


def test_the_published_bounds_on_microbatches_in_flight() -> None:
    """What each source says a rank holds at most, in stages' microbatches, at the rank that holds most."""
    for name, most in {
        "naive": lambda p, v, m: 1,
        "gpipe": lambda p, v, m: m,
        "1f1b": lambda p, v, m: p,
        "interleaved-1f1b": lambda p, v, m: v * p + p - 1,  # of m, a multiple of p: p + (p - 1) / v whole ones
        "zb-h1": lambda p, v, m: p,
        "zb-h2": lambda p, v, m: 2 * p - 1,
        "zb-v": lambda p, v, m: 2 * p,
        "dualpipe-v": lambda p, v, m: 2 * p + 1,
    }.items():
        for size in sizes(name, [16]):
            if 16 % size[0] == 0 and 2 * size[0] <= 16 and size[0] > 1:
                assert max(map(in_flight, ordered(name, size))) == most(*size)


def test_in_flight_counts_a_split_backward_until_its_weight_gradients() -> None:
    listed = [Forward(0), Forward(0, 1), BackwardInput(0, 1), Forward(1, 1), BackwardWeight(0, 1), Backward(1, 1)]
    assert (in_flight(listed), in_flight(listed, chunk=0), in_flight(listed, chunk=1)) == (3, 1, 2)


@every_row
def test_the_bubble_of_equal_stages_is_the_stated_one(name: str, microbatches: Sequence[int]) -> None:
    row = schedule(name)
    assert row.bubble is not None
    for size in sizes(name, microbatches):
        p, v, m = size
        stated = row.bubble(p, m, v)
        if m >= FROM_MICROBATCHES.get(name, lambda p: 1)(p):
            assert stated is not None
        for backward in (1.0,) if row.splits_backward else (0.5, 1.0, 1.25):
            times = played(name, size, times=(1.0, backward, backward))
            if stated is not None:
                assert times.bubble_fraction == pytest.approx(float(stated), abs=1e-9)


@every_row
def test_ranks_idle_as_long_as_the_published_formula_says(name: str, microbatches: Sequence[int]) -> None:
    """The rows' formulas by the simulation, and where the sources' conditions hold the sources' by themselves."""
    row = schedule(name)
    assert row.bubble_seconds is not None
    for size in sizes(name, microbatches):
        p, v, m = size
        for times in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (1.5, 1.25, 1.0), (1.0, 3.0, 0.5)):
            stated = row.bubble_seconds(p, m, v, *times)
            enough = m >= FROM_MICROBATCHES.get(name, lambda p: 1)(p)
            if stated is None:
                assert not enough or len(set(times)) > 1
                continue
            assert played(name, size, times=times).bubble_seconds == pytest.approx(stated, abs=1e-9)
            if enough and name in PUBLISHED:
                assert stated == pytest.approx(PUBLISHED[name](p, m, v, *times))


@every_row
def test_a_step_takes_a_ranks_computes_and_the_idle_time_more(name: str, microbatches: Sequence[int]) -> None:
    """The rows' sums by the simulation, for any times of equal stages: orders of magnitude apart, too, but for interleaved-1f1b."""
    row, draw = schedule(name), random.Random(name)
    for size in sizes(name, microbatches):
        p, v, m = size
        for _ in range(4):
            forward, inputs, weights = (10 ** draw.uniform(-1, 1) for _ in range(3))
            if name == "interleaved-1f1b":
                inputs, weights = (forward * draw.uniform(0.25, 2) for _ in range(2))
            stated = row.idle_seconds(p, m, v, forward, inputs, weights)
            if stated is None:
                assert m < 2 * p if row.splits_backward else m % p
                continue
            step = played(name, size, times=(forward, inputs, weights)).step_seconds
            assert step == pytest.approx(m * v * (forward + inputs + weights) + stated, rel=1e-9)


def test_times_that_the_sources_say_nothing_of_have_no_stated_bubble() -> None:
    for name, times in (("zb-h1", (1, 1, 1.1)), ("zb-h2", (1, 1, 1.1)), ("zb-v", (1, 1.1, 1)), ("dualpipe-v", (1, 1, 0.9))):
        stated = schedule(name).bubble_seconds
        assert stated is not None and stated(4, 16, 2, *times) is None


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_dualpipe_v_with_its_pairs_run_as_one_has_the_published_bubble(num_ranks: int) -> None:
    """(p - 1)(F&B + B - 3W) with F = W = 1, B = 2 and a pair as long as its parts: it begins when both parts can, and its
    results are there at its end. The last rank's first is no pair, as in the original."""
    lengths = {Forward: 1, Backward: 2, BackwardInput: 1, BackwardWeight: 1}
    for size in ((num_ranks, 2, 2 * num_ranks), (num_ranks, 2, 2 * num_ranks + 3)):
        blocks: list[list[list[tuple[Compute, int]]]] = []  # per rank, with the stages
        for rank, listed in enumerate(ordered("dualpipe-v", size)):
            blocks.append([])
            stages = rank, 2 * num_ranks - 1 - rank
            alone = rank == num_ranks - 1
            for one in (one for one in listed if isinstance(one, Compute)):
                last = blocks[-1][-1] if blocks[-1] else []
                pairs = isinstance(one, Backward) and len(last) == 1 and isinstance(last[0][0], Forward)
                if pairs and not alone:
                    last.append((one, stages[one.chunk]))
                else:
                    alone = alone and not pairs
                    blocks[-1].append([(one, stages[one.chunk])])
        idle, now, begun = [0] * num_ranks, [0] * num_ranks, [False] * num_ranks
        end: dict[tuple[int, bool, int], int] = {}
        while any(blocks):
            for rank, left in enumerate(blocks):
                while left:
                    computes = [(one, stage) for one, stage in left[0] if not isinstance(one, BackwardWeight)]
                    needs = [(stage - 1, False, one.microbatch) for one, stage in computes if isinstance(one, Forward)]
                    needs += [
                        (stage + 1, True, one.microbatch) for one, stage in computes if not isinstance(one, Forward)
                    ]
                    needs = [need for need in needs if 0 <= need[0] < 2 * num_ranks]
                    if any(need not in end for need in needs):
                        break
                    start = max([now[rank], *(end[need] for need in needs)])
                    idle[rank] += start - now[rank] if begun[rank] else 0
                    now[rank], begun[rank] = start + sum(lengths[type(one)] for one, _ in left[0]), True
                    for one, stage in computes:
                        end[stage, not isinstance(one, Forward), one.microbatch] = now[rank]
                    left.pop(0)
        pair, backward, weights = 3, 2, 1
        assert max(idle) == (num_ranks - 1) * (pair + backward - 3 * weights)


@every_row
def test_skips_cost_no_time_where_a_backward_takes_as_long_as_two_forwards(
    name: str, microbatches: Sequence[int]
) -> None:
    for size in sizes(name, microbatches):
        assert played(name, size, chain).step_seconds == played(name, size, skips).step_seconds


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


def test_zb_v_hands_over_within_a_rank_and_sends_before_its_weight_gradients() -> None:
    first, second = order("zb-v", 2, 1, chain(4))
    assert first == (
        *(Forward(0), SendActivation(0, to=1)),
        *(RecvActivation(0, source=2, chunk=1), Forward(0, chunk=1)),
        *(BackwardInput(0, chunk=1), SendGradient(0, to=2, chunk=1), BackwardWeight(0, chunk=1)),
        *(RecvGradient(0, source=1), BackwardInput(0), BackwardWeight(0), SumGradients()),
    )
    assert second == (
        *(RecvActivation(0, source=0), Forward(0), Forward(0, chunk=1), SendActivation(0, to=3, chunk=1)),
        *(RecvGradient(0, source=3, chunk=1), BackwardInput(0, chunk=1), BackwardWeight(0, chunk=1)),
        *(BackwardInput(0), SendGradient(0, to=0), BackwardWeight(0), SumGradients()),
    )


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b"])
def test_between_neighbours_sends_stand_right_after_and_receives_right_before(name: str) -> None:
    for size in sizes(name):
        for listed in ordered(name, size):
            compute: Instruction | None = None
            for one, following in zip(listed, (*listed[1:], SumGradients()), strict=True):
                if isinstance(one, Compute):
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
def test_one_rank_with_several_stages_transfers_nothing(name: str) -> None:
    for _, v, m in [size for size in sizes(name) if size[0] == 1]:
        (listed,) = ordered(name, (1, v, m), skips)
        assert all(isinstance(one, Compute | SumGradients) for one in listed)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_flow_back_only_where_they_are_asked_for(name: str) -> None:
    num_stages = 5 * schedule(name).default_virtual_stages
    back = [(2, 3), (0, 4)]
    lists = order(name, 5, 4, skips(num_stages), gradient_edges=back, sum_gradients=False)
    ranks = schedule(name).stage_ranks(5, num_stages // 5)
    stages = [[stage for stage, of in enumerate(ranks) if of == rank] for rank in range(5)]
    sent = {
        (stages[rank][one.chunk], one.to)
        for rank, row in enumerate(lists)
        for one in row
        if isinstance(one, SendGradient)
    }
    assert sent == {(3, 2), (4, 0)}
    assert not any(isinstance(one, SumGradients) for row in lists for one in row)
    run_in_random_order(lists, seed=0, stage_ranks=ranks, edges=skips(num_stages), gradient_edges=back)


@pytest.mark.parametrize("placement", [loop, v_shape])
def test_evaluation_has_forwards_only(placement: Callable[[int, int, int], int]) -> None:
    for p, v, m in [(p, v, m) for p in range(1, 9) for v in range(1, 5) for m in QUICK]:
        ranks = [placement(stage, p, v) for stage in range(p * v)]
        lists = order(FORWARD_ONLY, p, m, skips(p * v), virtual_stages=v, stage_ranks=ranks)
        kinds = {type(one) for listed in lists for one in listed}
        assert kinds <= {Forward, SendActivation, RecvActivation}
        if p * v <= 12:
            run_in_random_order(lists, seed=1, stage_ranks=ranks, edges=skips(p * v))
        nothing = [0.0] * (p * v)
        times = simulate(lists, stage_ranks=ranks, forward_seconds=[1.0] * (p * v), backward_seconds=nothing)
        if placement is loop:
            assert FORWARD_ONLY.bubble is not None
            assert times.bubble_fraction == pytest.approx(float(FORWARD_ONLY.bubble(p, m, v) or 0), abs=1e-9)
        elif v == 2:
            # The last rank works all the time, from the first microbatch on its way down to the last on its way up.
            assert times.step_seconds == 2 * m + 2 * (p - 1)


def test_evaluation_holds_back_microbatches_that_could_not_go_on() -> None:
    """On the first rank of a V, a microbatch enters as one comes back, not all at once."""
    ranks = [v_shape(stage, 4, 2) for stage in range(8)]
    first = order(FORWARD_ONLY, 4, 12, chain(8), stage_ranks=ranks)[0]
    way = most = 0
    for one in first:
        if isinstance(one, Forward):
            way += 1 if one.chunk == 0 else -1
            most = max(most, way)
    assert most == 4


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_edges_can_be_ordered_and_take_no_less_than_the_busiest_rank(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    v = data.draw(st.sampled_from(schedule(name).virtual_stages or (2, 3)))
    p, m = data.draw(st.integers(1, 6 if v == 1 else 4)), data.draw(st.integers(1, 9))
    num_stages = p * v
    pairs = [(source, to) for source in range(num_stages) for to in range(source + 1, num_stages)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    back = data.draw(st.lists(st.sampled_from(edges), unique=True)) if edges else []
    ranks = schedule(name).stage_ranks(p, v)
    lists = order(name, p, m, edges, gradient_edges=back, virtual_stages=v)
    seed = data.draw(st.integers(0, 99))
    run_in_random_order(lists, seed=seed, stage_ranks=ranks, edges=edges, gradient_edges=back)
    forwards = order(FORWARD_ONLY, p, m, edges, stage_ranks=ranks)
    run_in_random_order(forwards, seed=seed, stage_ranks=ranks, edges=edges)
    seconds = st.lists(st.floats(0.0, 4.0), min_size=num_stages, max_size=num_stages)
    forward, backward = data.draw(seconds), data.draw(seconds)
    for rendezvous in (False, True):
        times = simulate(
            lists, stage_ranks=ranks, forward_seconds=forward, backward_seconds=backward, send_seconds=0.5,
            rendezvous=rendezvous,
        )  # fmt: skip
        assert times.step_seconds >= max(times.busy_seconds) - 1e-9


# Wrong lists


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_list_with_any_instruction_left_out_or_doubled_is_caught(name: str) -> None:
    virtual_stages = schedule(name).default_virtual_stages
    edges = [(0, 1), (1, 2), (0, 2), *chain(3 * virtual_stages)[2:]]
    lists = order(name, 3, 4, edges)
    ranks = schedule(name).stage_ranks(3, virtual_stages)
    for rank, listed in enumerate(lists):
        for index, one in enumerate(listed):
            with pytest.raises(BadSchedule, match=rf"([Ss]tage|[Rr]ank) {rank} "):
                prove(without(lists, rank, index), edges, schedule=name, num_microbatches=4, stage_ranks=ranks)
            with pytest.raises(BadSchedule, match="twice"):
                prove(replaced(lists, rank, lambda row, one=one: row.append(one)), edges, stage_ranks=ranks)  # type: ignore[misc]


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


def test_weight_gradients_out_of_order_are_caught_too() -> None:
    listed = [*map(Forward, range(2)), *map(BackwardInput, range(2)), BackwardWeight(1), BackwardWeight(0)]
    with pytest.raises(BadSchedule, match=r"runs BackwardWeight\(1\) before BackwardWeight\(0\)(.|\n)*last bits"):
        prove([listed], [])


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([Forward(0), BackwardInput(0)], r"Stage 0 never runs BackwardWeight\(0\)"),
        ([Forward(0), BackwardWeight(0)], r"Stage 0 never runs Backward\(0\)"),
        ([Forward(0), BackwardWeight(0), BackwardInput(0)], r"BackwardWeight\(0\) before BackwardInput\(0\)"),
        ([BackwardInput(0), Forward(0), BackwardWeight(0)], r"BackwardInput\(0\) before Forward\(0\)"),
        ([Forward(0), BackwardInput(0), BackwardWeight(0), Backward(0)], r"Backward\(0\), which is no part"),
        ([Forward(0), Forward(0, chunk=1), Backward(0)], r"Forward\(0, chunk=1\), which is no part"),
    ],
    ids=str,
)
def test_wrongly_split_backwards_are_named(listed: list[Instruction], message: str) -> None:
    with pytest.raises(BadSchedule, match=message):
        prove([listed], [])


def test_stages_of_one_rank_out_of_order_are_caught() -> None:
    right = [Forward(0), Forward(0, chunk=1), Backward(0, chunk=1), Backward(0)]
    prove([right], [(0, 1)], stage_ranks=[0, 0])
    for first, second, message in (
        (0, 1, r"Rank 0 runs Forward\(0, chunk=1\) before Forward\(0\)"),
        (2, 3, r"Rank 0 runs Backward\(0\) before Backward\(0, chunk=1\)"),
    ):
        wrong = list(right)
        wrong[first], wrong[second] = wrong[second], wrong[first]
        with pytest.raises(BadSchedule, match=message):
            prove([wrong], [(0, 1)], stage_ranks=[0, 0])
        prove([wrong], [], stage_ranks=[0, 0])


def test_activations_and_gradients_between_two_ranks_keep_one_order() -> None:
    """In a V both go from the first rank to the second; NCCL would take the one for the other."""
    edges, ranks = chain(4), (0, 1, 1, 0)
    lists = order("zb-v", 2, 4, edges)

    def swap(row: list[Instruction]) -> None:
        sends = [index for index, one in enumerate(row) if isinstance(one, SendActivation | SendGradient)]
        left, right = next(
            (left, right)
            for left, right in pairwise(sends)
            if type(row[left]) is not type(row[right]) and right - left > 1
        )
        row.insert(right + 1, row.pop(left))

    with pytest.raises(BadSchedule, match=r"Rank 0 runs Send\w+\(.*\) where rank 1 runs Recv"):
        prove(replaced(lists, 0, swap), edges, stage_ranks=ranks)


def test_stages_of_ranks_that_have_no_list_are_caught() -> None:
    with pytest.raises(BadSchedule, match="lists for 1 ranks"):
        prove([[Forward(0)]], [], stage_ranks=[0, 1])


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


def test_far_transfers_at_their_computes_deadlock_1f1b_and_the_circle_is_named() -> None:
    """Why far transfers have another place: with (0, 3) beside the chain, and all right behind or before a compute."""
    edges = [*chain(4), (0, 3)]
    changed = [list(row) for row in order("1f1b", 4, 6, edges)]
    for row in changed:
        for one in [one for one in row if not isinstance(one, Compute | SumGradients)]:
            row.remove(one)
            forward = isinstance(one, SendActivation | RecvActivation)
            at = row.index(Forward(one.microbatch) if forward else Backward(one.microbatch))
            row.insert(at + isinstance(one, SendActivation | SendGradient), one)
    with pytest.raises(BadSchedule, match=r"deadlocks(.|\n)*stage 0 waits in \w+\(\d, to=\d\) for stage \d, stage"):
        prove(changed, edges)
    with pytest.raises(AssertionError, match="deadlock"):
        run_in_random_order(changed, seed=0)


def test_1f1b_deadlocks_with_transfers_one_by_one_and_never_in_runs() -> None:
    deadlocks = 0
    for size in sizes("1f1b", range(1, 17)):
        lists = ordered("1f1b", size)
        zeros = [0.0] * size[0]
        simulate(lists, forward_seconds=zeros, backward_seconds=zeros, rendezvous=True)
        try:
            simulate(one_by_one(lists), forward_seconds=zeros, backward_seconds=zeros, rendezvous=True)
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
        with pytest.raises(BadSchedule, match=r"1 stages and 2 microbatches: It idles 0.0000 .* stated as 0.5000"):
            register("other", two_at_a_time, bubble=lambda num_stages, num_microbatches: Fraction(1, 2))
    finally:
        SCHEDULES.pop("two-at-a-time", None)
    assert "other" not in SCHEDULES


def test_a_schedule_of_the_users_with_several_stages_a_rank_is_proved_and_then_usable() -> None:
    def turns(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterator[Compute]:
        for microbatch in range(num_microbatches):
            yield from (Forward(microbatch, chunk) for chunk in range(virtual_stages))
            yield from (BackwardInput(microbatch, chunk) for chunk in reversed(range(virtual_stages)))
        for microbatch in range(num_microbatches):
            yield from (BackwardWeight(microbatch, chunk) for chunk in range(virtual_stages))

    try:
        row = register("turns", turns, virtual_stages=(2, 3), placement="v")
        assert (row.splits_backward, row.default_virtual_stages, row.stage_ranks(2, 3)) == (True, 2, (0, 1, 1, 0, 0, 1))
        assert in_flight(order("turns", 2, 8, skips(6), virtual_stages=3)[0]) == 24
        with pytest.raises(BadArgument, match=r"4 virtual stages(.|\n)*use 2 or 3"):
            order("turns", 2, 8, chain(8), virtual_stages=4)
        with pytest.raises(BadSchedule, match=r"2 stages and 1 microbatches: Rank 0 has 2 .* allows 1"):
            register("other", turns, virtual_stages=2, max_in_flight=lambda *size: 1)
        with pytest.raises(BadArgument, match='"loop" or "v"'):
            register("other", turns, virtual_stages=2, placement="w")
    finally:
        SCHEDULES.pop("turns", None)
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
        (("interleaved-1f1b", 2, 2, [(0, 4)]), "edge"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        order(*arguments)
    with pytest.raises(BadArgument, match="back over"):
        order("1f1b", 3, 2, [(0, 1)], gradient_edges=[(1, 2)])


@pytest.mark.parametrize(
    ("name", "virtual_stages", "message"),
    [
        ("1f1b", 2, "use 1"),
        ("zb-v", 1, "use 2"),
        ("dualpipe-v", 3, "use 2"),
        ("interleaved-1f1b", 1, "use 2 or more"),
        ("interleaved-1f1b", 0, "at least 1; got 0"),
        ("interleaved-1f1b", True, "at least 1; got True"),
    ],
)
def test_virtual_stages_that_a_schedule_cannot_have_are_refused(name: str, virtual_stages: int, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        order(name, 2, 2, [], virtual_stages=virtual_stages)


def test_a_schedule_that_trains_places_its_stages_itself() -> None:
    with pytest.raises(BadArgument, match="does not place its stages"):
        order("zb-v", 2, 2, chain(4), stage_ranks=(0, 1, 0, 1))
    assert order("zb-v", 2, 2, chain(4), stage_ranks=(0, 1, 1, 0)) == order("zb-v", 2, 2, chain(4))

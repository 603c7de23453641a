"""The proof that instruction lists are one right training or evaluation step.

Design note. It knows nothing of how lists are made, so that those of the order pass, of a user's schedule and of an
edited plan are judged alike: every compute and transfer once and no others, each after what it needs, the backwards and
the weight gradients of a stage in the order of the microbatches, sends and receives of two ranks in one order, no more
in flight than the schedule promises, no deadlock. For the last it plays the lists once, with every transfer waited for
where it stands; passes/timeline.py tells why that is a proof. A runtime that posts receives earlier or waits for sends
later only waits less.

Each check walks the lists once: a proof takes time in proportion to the instructions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

from costmodel.errors import BadSchedule
from passes.flow import Edge, Flow, Move
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
)
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named
from passes.timeline import simulate

_COMPUTES = (Forward, Backward, BackwardInput, BackwardWeight)
_BACKWARDS = (Backward, BackwardInput, BackwardWeight)

# Per rank: where in its list each instruction stands.
_Positions = dict[Instruction, int]


def prove(
    instructions: Sequence[Sequence[Instruction]],
    edges: Collection[Edge],
    *,
    gradient_edges: Collection[Edge] | None = None,
    schedule: str | Schedule | None = None,
    num_microbatches: int | None = None,
    stage_ranks: Sequence[int] | None = None,
) -> None:
    """Raise BadSchedule unless `instructions[rank]`, every pipeline rank's list, is one right step over `edges`.

    `stage_ranks` is the pipeline rank of each stage, None for one stage a rank. With `schedule`, the microbatches in
    flight are held to its bound. `num_microbatches` None: as many as there are.
    """
    row = schedule_named(schedule) if isinstance(schedule, str) else schedule
    if stage_ranks is None:
        stage_ranks = range(len(instructions))
    trains = row.trains if row else any(isinstance(one, _BACKWARDS) for listed in instructions for one in listed)
    flow = Flow(stage_ranks, edges, gradient_edges if trains else ())
    if len(flow.stages) != len(instructions) or not all(flow.stages):
        raise BadSchedule(f"There are lists for {len(instructions)} ranks, and stages on {sorted(set(stage_ranks))}.")
    if num_microbatches is None:
        forwards = [one.microbatch for listed in instructions for one in listed if isinstance(one, Forward)]
        num_microbatches = max(forwards, default=-1) + 1
    noun = _noun(flow)
    ends = [any(isinstance(one, SumGradients) for one in listed) for listed in instructions]
    if any(ends) and not all(ends):
        raise BadSchedule(
            f"{noun} {ends.index(False)} has no SumGradients(), other {noun.lower()}s have and would wait for it."
        )
    for rank, listed in enumerate(instructions):
        _prove_rank(rank, listed, flow, num_microbatches, trains)
        if row and trains:
            virtual_stages = len(flow.stages[rank])
            bound = row.max_in_flight(rank, len(instructions), num_microbatches, virtual_stages)
            _prove_memory(rank, listed, bound, row.name, noun)
    _prove_matching(instructions, flow)
    nothing = [0.0] * len(flow.stage_ranks)
    simulate(instructions, stage_ranks=stage_ranks, forward_seconds=nothing, backward_seconds=nothing, rendezvous=True)


def prove_work(computes: Sequence[Sequence[Compute]], flow: Flow, num_microbatches: int, trains: bool) -> None:
    """Raise BadSchedule unless `computes[rank]` are each rank's work, without transfers, in an order it can be done in."""
    for rank, listed in enumerate(computes):
        positions = _once(rank, listed, flow)
        _prove_work(rank, listed, positions, flow, num_microbatches, trains)


def in_flight(instructions: Iterable[Instruction], chunk: int | None = None) -> int:
    """The most forwards at one time, of one of the rank's stages or of all, whose backward or weight gradients are due."""
    count = peak = 0
    for one in instructions:
        if chunk is None or (isinstance(one, _COMPUTES) and one.chunk == chunk):
            count += isinstance(one, Forward) - isinstance(one, Backward | BackwardWeight)
            peak = max(peak, count)
    return peak


def _noun(flow: Flow) -> str:
    return "Stage" if flow.one_stage_a_rank else "Rank"


def _where(rank: int, index: int, listed: Sequence[Instruction], noun: str) -> str:
    return f"{noun.lower()} {rank}, instruction {index}: {listed[index]!r}"


def _once(rank: int, listed: Sequence[Instruction], flow: Flow) -> _Positions:
    """The position of each instruction; BadSchedule if one is there twice."""
    positions: _Positions = {}
    for index, one in enumerate(listed):
        if one in positions:
            noun = _noun(flow)
            raise BadSchedule(f"{noun} {rank} runs {one!r} twice.", where=_where(rank, index, listed, noun))
        positions[one] = index
    return positions


def _position(rank: int, one: Instruction, positions: _Positions, flow: Flow) -> int:
    """Where an instruction that has to be there is. BadSchedule if it is not."""
    if one not in positions:
        raise BadSchedule(f"{_noun(flow)} {rank} never runs {one!r}.")
    return positions[one]


def _prove_work(
    rank: int, listed: Sequence[Instruction], positions: _Positions, flow: Flow, num_microbatches: int, trains: bool
) -> int:
    """Each microbatch once forward and once backward, in that order; backwards and weight gradients in the order of the
    microbatches; after the stages of the same rank that it needs. The number of computes there have to be."""
    noun = _noun(flow)

    def after(one: Instruction, needed: Instruction) -> None:
        if _position(rank, needed, positions, flow) > positions[one]:
            _raise_before(rank, listed, positions[one], needed, noun)

    def in_order(one: Instruction, before: int, of_last: Instruction) -> int:
        if positions[one] < before:
            raise BadSchedule(
                f"{noun} {rank} runs {one!r} before {of_last!r}.",
                where=_where(rank, positions[one], listed, noun),
                why="gradients would add up in another order than without a pipeline, to other last bits",
            )
        return positions[one]

    count = 0
    for chunk, stage in enumerate(flow.stages[rank]):
        last_input = last_weight = -1
        input_before: Compute
        weight_before: Compute
        input_before = weight_before = Forward(0, chunk)
        earlier = [flow.chunks[source] for source in flow.local[False][stage]]
        later = [flow.chunks[source] for source in flow.local[True][stage]]
        for microbatch in range(num_microbatches):
            forward = Forward(microbatch, chunk)
            _position(rank, forward, positions, flow)
            for source in earlier:
                after(forward, Forward(microbatch, source))
            count += 1
            if not trains:
                continue
            inputs: Compute = BackwardInput(microbatch, chunk)
            weights: Compute = BackwardWeight(microbatch, chunk)
            if inputs in positions:
                _position(rank, weights, positions, flow)
                after(weights, inputs)
                count += 2
            else:
                inputs = weights = Backward(microbatch, chunk)
                _position(rank, weights, positions, flow)
                count += 1
            after(inputs, forward)
            for source in later:
                split = BackwardInput(microbatch, source)
                after(inputs, split if split in positions else Backward(microbatch, source))
            last_input, input_before = in_order(inputs, last_input, input_before), inputs
            last_weight, weight_before = in_order(weights, last_weight, weight_before), weights
    if sum(isinstance(one, _COMPUTES) for one in listed) != count:
        _raise_other(rank, listed, positions, flow, num_microbatches, trains)
    return count


def _raise_other(
    rank: int, listed: Sequence[Instruction], positions: _Positions, flow: Flow, num_microbatches: int, trains: bool
) -> NoReturn:
    """Name the compute that is no part of the step."""
    for index, one in enumerate(listed):
        if not isinstance(one, _COMPUTES):
            continue
        known = one.microbatch < num_microbatches and one.chunk < len(flow.stages[rank])
        split = BackwardInput(one.microbatch, one.chunk) in positions
        if known and (isinstance(one, Forward) or (trains and isinstance(one, Backward) != split)):
            continue
        noun = _noun(flow)
        raise BadSchedule(
            f"{noun} {rank} runs {one!r}, which is no part of its step.", where=_where(rank, index, listed, noun)
        )
    raise AssertionError("each compute is part of the step")


def _prove_rank(rank: int, listed: Sequence[Instruction], flow: Flow, num_microbatches: int, trains: bool) -> None:
    """One rank's list alone: all of its work and transfers once, each after what it needs."""
    noun = _noun(flow)
    positions = _once(rank, listed, flow)
    expected = _prove_work(rank, listed, positions, flow, num_microbatches, trains)
    transfers: set[Instruction] = set()
    for stage in flow.stages[rank]:
        chunk = flow.chunks[stage]
        for gradient in (False, True) if trains else (False,):
            sources, targets = flow.receives[gradient][stage], flow.sends[gradient][stage]
            for microbatch in range(num_microbatches if sources or targets else 0):
                compute: Instruction = Forward(microbatch, chunk)
                if gradient:
                    compute = BackwardInput(microbatch, chunk)
                    compute = compute if compute in positions else Backward(microbatch, chunk)
                index = positions[compute]
                for source in sources:
                    recv = flow.recv(Move(source, stage, gradient, microbatch))
                    transfers.add(recv)
                    if _position(rank, recv, positions, flow) > index:
                        _raise_before(rank, listed, index, recv, noun)
                for to in targets:
                    send = flow.send(Move(stage, to, gradient, microbatch))
                    transfers.add(send)
                    if _position(rank, send, positions, flow) < index:
                        _raise_before(rank, listed, positions[send], compute, noun)
    end = positions.get(SumGradients())
    expected += len(transfers) + (end is not None)
    if len(listed) != expected:
        other = next(
            index
            for index, one in enumerate(listed)
            if not isinstance(one, (*_COMPUTES, SumGradients)) and one not in transfers
        )
        raise BadSchedule(
            f"{noun} {rank} runs {listed[other]!r}, which is no part of its step.",
            where=_where(rank, other, listed, noun),
        )
    if end is not None and end < len(listed) - 1:
        _raise_before(rank, listed, end, listed[-1], noun)


def _prove_memory(rank: int, listed: Sequence[Instruction], bound: int, name: str, noun: str) -> None:
    count = 0
    for index, one in enumerate(listed):
        count += isinstance(one, Forward) - isinstance(one, Backward | BackwardWeight)
        if count > bound:
            raise BadSchedule(
                f"{noun} {rank} has {count} microbatches in flight; the schedule {name!r} allows {bound} here.",
                where=_where(rank, index, listed, noun),
            )


def _prove_matching(instructions: Sequence[Sequence[Instruction]], flow: Flow) -> None:
    """The sends of one rank to another are in the order of the receives there, activations and gradients together."""
    sent: dict[tuple[int, int], list[Move]] = {}
    received: dict[tuple[int, int], list[Move]] = {}
    for rank, listed in enumerate(instructions):
        stages = flow.stages[rank]
        for one in listed:
            if isinstance(one, SendActivation | SendGradient):
                move = Move(stages[one.chunk], one.to, isinstance(one, SendGradient), one.microbatch)
                sent.setdefault((rank, flow.stage_ranks[one.to]), []).append(move)
            elif isinstance(one, RecvActivation | RecvGradient):
                move = Move(one.source, stages[one.chunk], isinstance(one, RecvGradient), one.microbatch)
                received.setdefault((flow.stage_ranks[one.source], rank), []).append(move)
    noun = _noun(flow)
    for (source, to), moves in sent.items():
        # Both are the same transfers: _prove_rank has seen each once at either end.
        for left, right in zip(moves, received[source, to], strict=True):
            if left != right:
                raise BadSchedule(
                    f"{noun} {source} runs {flow.send(left)!r} where {noun.lower()} {to} runs {flow.recv(right)!r}.",
                    why="transfers from one rank to another are matched by their order, so both ends need the same",
                )


def _raise_before(rank: int, listed: Sequence[Instruction], index: int, needed: Instruction, noun: str) -> NoReturn:
    raise BadSchedule(
        f"{noun} {rank} runs {listed[index]!r} before {needed!r}, which it needs.",
        where=_where(rank, index, listed, noun),
    )

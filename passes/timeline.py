"""When each rank does what: an event simulation over the real instruction lists, and the TIMELINE of a printed plan.

Design note. The simulation runs the same lists as the ranks do. A run of adjacent transfers is posted at once, when the
compute before it is done. The k-th send of one stage to another meets the k-th receive there, activations and
gradients apart, and takes `send_seconds`. What waits for what comes in two kinds:

- as the runtime does it: receives are posted by where they stand, and mostly long before, so a transfer starts when its
  send is posted; the receiver waits for it in the compute that needs it, the sender when its next run begins and at the
  end of its list;
- `rendezvous`, the least that a transport promises: a transfer starts when both ends have posted it, and both wait for
  it where it stands.

Such a system has one outcome: if any order of events comes to the end, all do. And whatever waits less gets as far. So
a simulation with rendezvous that ends is a proof that no execution deadlocks, and passes/prove.py uses it as that.
Where it does not end, some ranks wait in a circle; the error shows the circle.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from costmodel.errors import BadSchedule
from passes.flow import stages_of_ranks
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
    Transfer,
)

# From stage, to stage, and whether gradients: what one order of matching holds for.
Channel = tuple[int, int, bool]

KINDS: dict[type[Compute], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward input",
    BackwardWeight: "backward weight",
}
_COMPUTE_KINDS = frozenset(KINDS.values())


@dataclass(frozen=True, slots=True)
class Span:
    """What one rank does from `start_seconds` to `end_seconds` of the step.

    `kind` is "forward", "backward", "backward input", "backward weight", "send" or "receive". `rank` counts pipeline
    ranks, and `chunk` the stages of the rank.
    """

    rank: int
    start_seconds: float
    end_seconds: float
    kind: str
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step, by pipeline rank and then by time; transfers that take no time are left out.

    `stage_ranks` is the pipeline rank of each stage; empty for one stage a rank.
    """

    spans: tuple[Span, ...]
    num_ranks: int
    step_seconds: float
    stage_ranks: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks) or self.num_ranks

    @property
    def compute(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.kind in _COMPUTE_KINDS)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Per rank: the seconds of the step in which it computes."""
        busy = [0.0] * self.num_ranks
        for span in self.compute:
            busy[span.rank] += span.end_seconds - span.start_seconds
        return tuple(busy)

    @property
    def bubble_fraction(self) -> float:
        """The part of the ranks' time in which they do not compute. 0 for an empty step."""
        available = self.num_ranks * self.step_seconds
        return 1 - sum(self.busy_seconds) / available if available else 0.0

    @property
    def bubble_seconds(self) -> float:
        """The most that a rank idles between the start of its first compute and the end of its last.

        The measure of the zero-bubble papers, for which a rank's step begins when it has something to do.
        """
        first, last = [self.step_seconds] * self.num_ranks, [0.0] * self.num_ranks
        for span in self.compute:
            first[span.rank] = min(first[span.rank], span.start_seconds)
            last[span.rank] = max(last[span.rank], span.end_seconds)
        idle = (end - start - busy for start, end, busy in zip(first, last, self.busy_seconds, strict=True))
        return max(idle, default=0.0)

    def text(self, width: int | None = None) -> str:
        """One row per rank, one character per time slice, as `legend` says.

        Microbatch 10 is 0 again, 26 is `a` again. A slice shows what runs in its middle. Without `width` a slice is the
        shortest span long, but there are no more than 100. With several stages a rank, a second row tells which of them
        runs: stage 10 is 0 again.
        """
        if width is None:
            lengths = [span.end_seconds - span.start_seconds for span in self.compute]
            shortest = min((seconds for seconds in lengths if seconds > 0), default=self.step_seconds)
            width = min(100, round(self.step_seconds / shortest)) if shortest else 0
        several = self.num_stages > self.num_ranks
        stages = stages_of_ranks(self.stage_ranks)
        rows = [["."] * width for _ in range(self.num_ranks)]
        running = [[" "] * width for _ in range(self.num_ranks)]
        for span in self.compute if self.step_seconds else ():
            # The slices whose middle lies in the span.
            first = round(span.start_seconds / self.step_seconds * width)
            last = round(span.end_seconds / self.step_seconds * width)
            rows[span.rank][first:last] = _mark(span) * (last - first)
            if several:
                running[span.rank][first:last] = str(stages[span.rank][span.chunk] % 10) * (last - first)
        digits = len(str(self.num_ranks - 1))
        lines: list[str] = []
        for rank, row in enumerate(rows):
            if several:
                lines.append(f"rank {rank:<{digits}}  {''.join(row)}")
                lines.append(f"{'stage':<{digits + 5}}  {''.join(running[rank])}".rstrip())
            else:
                lines.append(f"stage {rank:<{digits}}  {''.join(row)}")
        return "\n".join(lines)

    @property
    def legend(self) -> str:
        """What the characters of `text` mean."""
        weights = any(span.kind == "backward weight" for span in self.spans)
        split = ", A-Z its weight gradients" if weights else ""
        stages = "; below it the stage" if self.num_stages > self.num_ranks else ""
        return f"0-9 forward of that microbatch, a-z backward (a is 0){split}, . idle{stages}"


def _mark(span: Span) -> str:
    if span.kind == "forward":
        return str(span.microbatch % 10)
    return chr(ord("A" if span.kind == "backward weight" else "a") + span.microbatch % 26)


def channel(stage: int, transfer: Transfer) -> Channel:
    """From stage, to stage, gradients or not, of a transfer of `stage`."""
    match transfer:
        case SendActivation(to=to):
            return stage, to, False
        case RecvActivation(source=source):
            return source, stage, False
        case SendGradient(to=to):
            return stage, to, True
        case RecvGradient(source=source):
            return source, stage, True


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a transfer: the `number`-th of its channel in this rank's list. `key` names it, `other` the other."""

    transfer: Transfer
    sends: bool
    peer: int  # stage
    key: tuple[Channel, int, bool]
    other: tuple[Channel, int, bool]


@dataclass(frozen=True, slots=True)
class _Step:
    """A run of adjacent transfers or one other instruction, and the ends that it waits for."""

    compute: Compute | None
    run: list[_End]
    waits: list[_End]


def _steps(stages: Sequence[int], instructions: Sequence[Instruction], rendezvous: bool) -> list[_Step]:
    steps: list[_Step] = []
    counts: defaultdict[Channel, int] = defaultdict(int)
    # What computes wait for, by chunk, whether gradients, and microbatch.
    received: defaultdict[tuple[int, bool, int], list[_End]] = defaultdict(list)
    run: list[_End] | None = None
    for one in instructions:
        if isinstance(one, Transfer):
            if run is None:
                run = []
                steps.append(_Step(None, run, run if rendezvous else []))
            path = channel(stages[one.chunk], one)
            number = counts[path]
            counts[path] += 1
            sends = isinstance(one, SendActivation | SendGradient)
            end = _End(one, sends, path[1] if sends else path[0], (path, number, sends), (path, number, not sends))
            run.append(end)
            if not sends:
                received[one.chunk, path[2], one.microbatch].append(end)
            continue
        run = None
        if isinstance(one, SumGradients):
            steps.append(_Step(None, [], []))
        else:
            waits = received.pop((one.chunk, not isinstance(one, Forward), one.microbatch), [])
            steps.append(_Step(one, [], [] if rendezvous else waits))
    return steps


def simulate(
    instructions: Sequence[Sequence[Instruction]],
    *,
    stage_ranks: Sequence[int] | None = None,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    backward_input_seconds: Sequence[float] | None = None,
    backward_weight_seconds: Sequence[float] | None = None,
    send_seconds: Callable[[int, int], float] | float = 0.0,
    rendezvous: bool = False,
) -> Timeline:
    """The timeline of one step of `instructions[rank]`, every pipeline rank's list.

    `stage_ranks` is the pipeline rank of each stage, None for one stage a rank. Stage i takes `forward_seconds[i]` and
    `backward_seconds[i]` for each microbatch; where the backward is split, `backward_input_seconds[i]` and
    `backward_weight_seconds[i]`, each half of the backward if None. A transfer takes `send_seconds`, or
    `send_seconds(from_stage, to_stage)`. `rendezvous`: see the module. BadSchedule if ranks wait for each other in a
    circle, or for a transfer that the other end does not have.
    """
    stages = stages_of_ranks(tuple(range(len(instructions)) if stage_ranks is None else stage_ranks))
    half = [seconds / 2 for seconds in backward_seconds]
    seconds: dict[type[Compute], Sequence[float]] = {
        Forward: forward_seconds,
        Backward: backward_seconds,
        BackwardInput: half if backward_input_seconds is None else backward_input_seconds,
        BackwardWeight: half if backward_weight_seconds is None else backward_weight_seconds,
    }
    return replay(
        instructions,
        lambda rank, compute: seconds[type(compute)][stages[rank][compute.chunk]],
        stage_ranks=stage_ranks,
        send_seconds=send_seconds,
        rendezvous=rendezvous,
    )


def replay(
    instructions: Sequence[Sequence[Instruction]],
    compute_seconds: Callable[[int, Compute], float],
    *,
    stage_ranks: Sequence[int] | None = None,
    send_seconds: Callable[[int, int], float] | float = 0.0,
    rendezvous: bool = False,
) -> Timeline:
    """`simulate` with a time for each compute of each rank: `compute_seconds(rank, compute)`."""
    num_ranks = len(instructions)
    ranks = tuple(range(num_ranks) if stage_ranks is None else stage_ranks)
    stages = stages_of_ranks(ranks)
    steps = [_steps(stages[rank], listed, rendezvous) for rank, listed in enumerate(instructions)]
    position = [0] * num_ranks
    now = [0.0] * num_ranks
    unfinished = [0.0] * num_ranks  # when the sends that nobody has waited for are over
    posted: dict[tuple[Channel, int, bool], float] = {}
    spans: list[list[Span]] = [[] for _ in range(num_ranks)]
    # Ranks that may be able to go on: all at first, then those whose peer has posted something.
    runnable = deque(range(num_ranks))

    def post(rank: int, run: list[_End]) -> None:
        now[rank] = max(now[rank], unfinished[rank])
        for end in run:
            posted[end.key] = now[rank]
        runnable.extend({ranks[end.peer] for end in run if 0 <= end.peer < len(ranks)})

    def finished(rank: int, end: _End) -> float:
        """When a transfer is over whose ends, as far as they count, are posted; its span is noted."""
        sent = posted[end.key if end.sends else end.other]
        start = max(sent, posted[end.other if end.sends else end.key]) if rendezvous else sent
        source, to, _ = end.key[0]
        finish = start + (send_seconds(source, to) if callable(send_seconds) else send_seconds)
        if finish > start:
            kind = "send" if end.sends else "receive"
            spans[rank].append(Span(rank, start, finish, kind, end.transfer.microbatch, end.transfer.chunk))
        return finish

    while runnable:
        rank = runnable.popleft()
        mine, at = steps[rank], position[rank]
        while at < len(mine):
            step = mine[at]
            if step.run and step.run[0].key not in posted:
                post(rank, step.run)
                if not rendezvous:
                    ends = [finished(rank, end) for end in step.run if end.sends]
                    unfinished[rank] = max([unfinished[rank], *ends])
            if any(end.other not in posted for end in step.waits):
                break
            now[rank] = max([now[rank], *(finished(rank, end) for end in step.waits)])
            if step.compute is not None:
                start, one = now[rank], step.compute
                now[rank] = start + compute_seconds(rank, one)
                spans[rank].append(Span(rank, start, now[rank], KINDS[type(one)], one.microbatch, one.chunk))
            elif not step.run:
                now[rank] = max(now[rank], unfinished[rank])
            at += 1
        position[rank] = at

    stuck = [rank for rank in range(num_ranks) if position[rank] < len(steps[rank])]
    if stuck:
        waits = {
            rank: next(end for end in steps[rank][position[rank]].waits if end.other not in posted) for rank in stuck
        }
        raise BadSchedule("The schedule deadlocks: no stage can go on.", why=_circle(waits, ranks))
    for row in spans:
        row.sort(key=lambda span: span.start_seconds)
    step_seconds = max((*now, *unfinished), default=0.0)
    several = ranks if len(ranks) > num_ranks else ()
    return Timeline(tuple(span for row in spans for span in row), num_ranks, step_seconds, several)


def _circle(waits: dict[int, _End], ranks: Sequence[int]) -> str:
    """Who waits for whom, by the first transfers that lack their other end: a circle, or a path to a finished rank."""
    path: list[int] = []
    rank = next(iter(waits))
    while rank in waits and rank not in path:
        path.append(rank)
        rank = ranks[waits[rank].peer]
    circle = path[path.index(rank) :] if rank in path else path
    noun = "stage" if len(set(ranks)) == len(ranks) else "rank"
    said = [f"{noun} {at} waits in {waits[at].transfer!r} for {noun} {ranks[waits[at].peer]}" for at in circle]
    return ", ".join(said) + ("" if rank in waits else ", which has come to its end")

"""When each stage does what: an event simulation over the real instruction lists, and the TIMELINE of a printed plan.

Design note. The simulation runs the same lists as the ranks do, with the least that a transport promises: a transfer
is a rendezvous (a send is over when its receive is), and a run of adjacent transfers is posted at once and waited for
at once. A stage posts a run when the compute before it is done; a transfer starts when both ends have posted it and
takes `send_seconds`; the stage goes on when the last transfer of the run is over. The k-th send of one stage to
another meets the k-th receive there, activations and gradients apart: NCCL ignores tags and matches by order.

Such a system has one outcome: if any order of events comes to the end, all do. So a simulation that ends is a proof
that no execution deadlocks, and passes/order.py uses it as that. Where it does not end, some stages wait in a circle;
the error shows the circle.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from costmodel.errors import BadSchedule
from passes.instructions import (
    Backward,
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


@dataclass(frozen=True, slots=True)
class Span:
    """What one rank does from `start_seconds` to `end_seconds` of the step.

    `kind` is "forward", "backward", "send" or "receive". `rank` counts pipeline stages where there is one rank a stage.
    """

    rank: int
    start_seconds: float
    end_seconds: float
    kind: str
    microbatch: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step, by stage and then by time; transfers that take no time are left out."""

    spans: tuple[Span, ...]
    num_stages: int
    step_seconds: float

    @property
    def compute(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.kind in ("forward", "backward"))

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Per stage: the seconds of the step in which it computes."""
        busy = [0.0] * self.num_stages
        for span in self.compute:
            busy[span.rank] += span.end_seconds - span.start_seconds
        return tuple(busy)

    @property
    def bubble_fraction(self) -> float:
        """The part of the stages' time in which they do not compute. 0 for an empty step."""
        available = self.num_stages * self.step_seconds
        return 1 - sum(self.busy_seconds) / available if available else 0.0

    def text(self, width: int | None = None) -> str:
        """One row per stage, one character per time slice: 0-9 forward of that microbatch, a-z backward, `.` idle.

        Microbatch 10 is 0 again, 26 is `a` again. A slice shows what runs in its middle. Without `width` a slice is the
        shortest span long, but there are no more than 100.
        """
        if width is None:
            lengths = [span.end_seconds - span.start_seconds for span in self.compute]
            shortest = min((seconds for seconds in lengths if seconds > 0), default=self.step_seconds)
            width = min(100, round(self.step_seconds / shortest)) if shortest else 0
        rows = [["."] * width for _ in range(self.num_stages)]
        for span in self.compute if self.step_seconds else ():
            # The slices whose middle lies in the span.
            first = round(span.start_seconds / self.step_seconds * width)
            last = round(span.end_seconds / self.step_seconds * width)
            forward = span.kind == "forward"
            mark = str(span.microbatch % 10) if forward else chr(ord("a") + span.microbatch % 26)
            rows[span.rank][first:last] = mark * (last - first)
        digits = len(str(self.num_stages - 1))
        return "\n".join(f"stage {stage:<{digits}}  {''.join(row)}" for stage, row in enumerate(rows))


def channel(stage: int, transfer: Transfer) -> Channel:
    """From stage, to stage, gradients or not, of a transfer in `stage`'s list."""
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
    """One end of a transfer: the `number`-th of its channel in this stage's list."""

    transfer: Transfer
    channel: Channel
    number: int
    sends: bool

    def peer(self) -> int:
        return self.channel[1] if self.sends else self.channel[0]

    def key(self) -> tuple[Channel, int, bool]:
        return self.channel, self.number, self.sends

    def other(self) -> tuple[Channel, int, bool]:
        return self.channel, self.number, not self.sends


# A run of adjacent transfers is one step of a stage, each other instruction is one.
_Step = Forward | Backward | SumGradients | list[_End]


def _steps(stage: int, instructions: Sequence[Instruction]) -> list[_Step]:
    steps: list[_Step] = []
    counts: defaultdict[Channel, int] = defaultdict(int)
    run: list[_End] | None = None
    for instruction in instructions:
        if isinstance(instruction, Forward | Backward | SumGradients):
            steps.append(instruction)
            run = None
            continue
        if run is None:
            run = []
            steps.append(run)
        key = channel(stage, instruction)
        run.append(_End(instruction, key, counts[key], isinstance(instruction, SendActivation | SendGradient)))
        counts[key] += 1
    return steps


def simulate(
    instructions: Sequence[Sequence[Instruction]],
    *,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Callable[[int, int], float] | float = 0.0,
) -> Timeline:
    """The timeline of one step of `instructions[stage]`, every stage's list.

    Stage i takes `forward_seconds[i]` and `backward_seconds[i]` for each microbatch. A transfer takes `send_seconds`,
    or `send_seconds(from_stage, to_stage)`. BadSchedule if stages wait for each other in a circle, or for a transfer
    that the other end does not have.
    """
    num_stages = len(instructions)
    steps = [_steps(stage, listed) for stage, listed in enumerate(instructions)]
    position = [0] * num_stages
    now = [0.0] * num_stages
    posted: dict[tuple[Channel, int, bool], float] = {}
    spans: list[list[Span]] = [[] for _ in range(num_stages)]
    # Stages that may be able to go on: all at first, then those whose peer has posted something.
    runnable = deque(range(num_stages))

    def compute(stage: int, step: Forward | Backward) -> None:
        forward = isinstance(step, Forward)
        end = now[stage] + (forward_seconds if forward else backward_seconds)[stage]
        spans[stage].append(Span(stage, now[stage], end, "forward" if forward else "backward", step.microbatch))
        now[stage] = end

    def transfer(stage: int, run: list[_End]) -> bool:
        """Post the run, unless it is; move `now` to its end if all other ends are posted too, else return False."""
        if run[0].key() not in posted:
            for end in run:
                posted[end.key()] = now[stage]
            runnable.extend({end.peer() for end in run if 0 <= end.peer() < num_stages})
        if any(end.other() not in posted for end in run):
            return False
        over = now[stage]
        for end in run:
            start = max(posted[end.key()], posted[end.other()])
            source, to, _ = end.channel
            finish = start + (send_seconds(source, to) if callable(send_seconds) else send_seconds)
            if finish > start:
                kind = "send" if end.sends else "receive"
                spans[stage].append(Span(stage, start, finish, kind, end.transfer.microbatch))
            over = max(over, finish)
        now[stage] = over
        return True

    while runnable:
        stage = runnable.popleft()
        while position[stage] < len(steps[stage]):
            step = steps[stage][position[stage]]
            if isinstance(step, list):
                if not transfer(stage, step):
                    break
            elif not isinstance(step, SumGradients):
                compute(stage, step)
            position[stage] += 1

    if any(position[stage] < len(steps[stage]) for stage in range(num_stages)):
        waits = {}
        for stage in range(num_stages):
            if position[stage] < len(steps[stage]):
                run = steps[stage][position[stage]]
                assert isinstance(run, list), "only a transfer can wait"
                waits[stage] = next(end for end in run if end.other() not in posted)
        raise BadSchedule("The schedule deadlocks: no stage can go on.", why=_circle(waits))
    return Timeline(tuple(span for row in spans for span in row), num_stages, max(now, default=0.0))


def _circle(waits: dict[int, _End]) -> str:
    """Who waits for whom, by the first transfers that lack their other end: a circle, or a path to a finished stage."""
    path: list[int] = []
    stage = next(iter(waits))
    while stage in waits and stage not in path:
        path.append(stage)
        stage = waits[stage].peer()
    circle = path[path.index(stage) :] if stage in path else path
    said = [f"stage {at} waits in {waits[at].transfer!r} for stage {waits[at].peer()}" for at in circle]
    return ", ".join(said) + ("" if stage in waits else ", which has come to its end")

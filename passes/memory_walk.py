"""What a pipeline rank holds at each instruction of a step, and the most it ever holds.

A rank does one thing at a time, so its memory is a sum that each instruction changes: what its stages allocate for a microbatch
(`MicrobatchBytes`, measured on their programs), buffers that transfers fill, values on their way. The lists are the ones the ranks run.

Receive buffers are rings that grow to what is needed and stay: from the second step on they are all there (`ring_bytes`). Of each
peer one receive is posted ahead. A received activation is held until its microbatch's backward is over, a received gradient too.
What is sent is held until `sends_held` more transfers have been sent, or the end of the step. Between stages of one rank nothing is
copied: an activation stays until the later stage's backward, its gradient until the earlier stage's.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from costmodel.memory import MicrobatchBytes, PeakMemory, Phase, Reducing
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
    SumGradients,
)

_TRANSFERS = (RecvActivation, RecvGradient, SendActivation, SendGradient)
_Key = tuple[int, int, bool, int]  # stage, the stage it comes from, whether a gradient, bytes


@dataclass(frozen=True)
class StageUse:
    """One stage of a rank, in bytes. `received[m]` and `gradients[m]`: by the stage they come from, what microbatch m receives.

    `sum_bytes`: the most that the sums at the end of the step take besides the gradients. `tied_inside`: how many of this rank's stages
    hold the tied parameters whose gradients are kept apart, where no other rank does (0: others do, or none are tied). `cast_bytes`: of
    the parameters' casts that are held until the last microbatch's backward is over.
    """

    stage: int
    parameter_bytes: int
    optimizer_bytes: int
    microbatches: Sequence[MicrobatchBytes]
    received: Sequence[Mapping[int, int]] = ()
    gradients: Sequence[Mapping[int, int]] = ()
    sum_bytes: int = 0
    tied_inside: int = 0
    cast_bytes: int = 0


@dataclass
class _Rings:
    """How many buffers of each kind are in use, and the most that were."""

    stages: Sequence[StageUse]
    stage_ranks: Sequence[int]
    in_use: defaultdict[_Key, int] = field(default_factory=lambda: defaultdict(int))
    most: defaultdict[_Key, int] = field(default_factory=lambda: defaultdict(int))

    def key(self, receive: RecvActivation | RecvGradient) -> _Key:
        use, gradient = self.stages[receive.chunk], isinstance(receive, RecvGradient)
        arrived = (use.gradients if gradient else use.received)[receive.microbatch]
        return use.stage, receive.source, gradient, arrived.get(receive.source, 0)

    def take(self, receive: RecvActivation | RecvGradient) -> None:
        key = self.key(receive)
        self.in_use[key] += 1
        self.most[key] = max(self.most[key], self.in_use[key])

    def give(self, use: StageUse, microbatch: int, gradient: bool) -> None:
        own, arrived = self.stage_ranks[use.stage], use.gradients if gradient else use.received
        for source, num_bytes in arrived[microbatch].items():
            if self.stage_ranks[source] != own:
                self.in_use[use.stage, source, gradient, num_bytes] -= 1


def ring_bytes(instructions: Sequence[Instruction], stages: Sequence[StageUse], stage_ranks: Sequence[int]) -> int:
    """Bytes of all receive buffers of a rank, grown to what this list needs."""
    rings = _Rings(stages, stage_ranks)
    queues: defaultdict[int, list[RecvActivation | RecvGradient]] = defaultdict(list)
    for instruction in instructions:
        if isinstance(instruction, (RecvActivation, RecvGradient)):
            queues[stage_ranks[instruction.source]].append(instruction)
    posted = dict.fromkeys(queues, 0)
    done = dict.fromkeys(queues, 0)

    def post(peer: int) -> None:
        if posted[peer] < len(queues[peer]):
            rings.take(queues[peer][posted[peer]])
            posted[peer] += 1

    for peer in queues:
        post(peer)
    for instruction in instructions:
        if isinstance(instruction, (RecvActivation, RecvGradient)):
            peer = stage_ranks[instruction.source]
            done[peer] += 1
            if posted[peer] == done[peer]:
                post(peer)
        elif isinstance(instruction, (Backward, BackwardInput, BackwardWeight)):
            use = stages[instruction.chunk]
            taken = use.microbatches[instruction.microbatch]
            for gradient, late in ((False, taken.keeps_received), (True, taken.keeps_gradients)):
                if isinstance(instruction, Backward) or isinstance(instruction, BackwardWeight) == late:
                    rings.give(use, instruction.microbatch, gradient)
    return sum(count * key[3] for key, count in rings.most.items())


class _Rank:
    """What a rank holds while it goes through its list."""

    def __init__(self, stages: Sequence[StageUse], stage_ranks: Sequence[int], buffer_bytes: int) -> None:
        self.stages, self.stage_ranks, self.ring_bytes = stages, stage_ranks, buffer_bytes
        self.own = stage_ranks[stages[0].stage] if stages else 0
        self.parameters = sum(use.parameter_bytes for use in stages)
        self.optimizer = sum(use.optimizer_bytes for use in stages)
        self.casts = sum(use.cast_bytes for use in stages)
        self.backwards = [0] * len(stages)  # that are over
        self.activations = self.gradients = 0
        self.made: set[tuple[int, str]] = (
            set()
        )  # (chunk, which half of the backward): its gradients of parameters exist
        self.tied: dict[int, int] = {}  # by microbatch: gradients kept until this rank's other stages have theirs
        self.tied_sum = False
        self.waiting: dict[tuple[int, int, bool], int] = {}  # made, and not yet sent
        self.sent: deque[tuple[int, int, bool]] = deque()  # (chunk, microbatch, whether a gradient)
        self.sent_bytes: dict[tuple[int, int, bool], int] = {}
        self.handed: defaultdict[tuple[int, int, bool], int] = defaultdict(
            int
        )  # to a stage of this rank, by that stage
        self.reduced: list[Reducing] = []  # what the sums over replicas have still to do
        self.peak = PeakMemory()
        self.look(0)

    def look(self, more: int, *, gradients: int = 0) -> None:
        """Compare with the peak: now there are `more` bytes of temporaries besides, `gradients` of them gradients of parameters."""
        sent = sum(self.sent_bytes[key] for key in set(self.sent))
        buffers = self.ring_bytes + self.casts + sent + sum(self.waiting.values()) + sum(self.handed.values())
        now = PeakMemory(
            self.parameters,
            self.gradients + gradients,
            self.optimizer,
            self.activations + max(more - gradients, 0),
            buffers,
        )
        if now.peak_bytes > self.peak.peak_bytes:
            self.peak = now

    def run(self, phase: Phase, chunk: int, *halves: str, there: int = 0) -> None:
        """One forward, or the halves of a backward. `there`: bytes of its parameters' gradients that exist already."""
        if all((chunk, half) in self.made for half in halves):
            self.look(phase.peak_bytes)
        else:
            new = phase.gradient_bytes - there
            self.look(phase.first_peak_bytes, gradients=max(0, min(new, phase.first_peak_bytes)))
            self.made.update((chunk, half) for half in halves)
            self.gradients += new
        self.activations += phase.change_bytes

    def is_last(self, use: StageUse, microbatch: int) -> bool:
        """True if this backward is one beside which gradients are summed over replicas."""
        return use.microbatches[microbatch].reducing is not None and microbatch == len(use.microbatches) - 1

    def reduce(self, taken: MicrobatchBytes, phase: Phase, chunk: int) -> None:
        """The last backward of a step, with the sums over replicas beside it."""
        assert taken.reducing is not None
        self.look(taken.reducing.peak_bytes)
        self.made.update((chunk, half) for half in ("input", "weight"))
        self.gradients += taken.reducing.gradient_change_bytes
        self.activations += phase.change_bytes
        self.reduced.append(taken.reducing)

    def keep_apart(self, use: StageUse, microbatch: int, phase: Phase) -> None:
        """The gradients of tied parameters: until the end of the step, or until this rank's stages all have theirs."""
        self.gradients += phase.apart_bytes
        if use.tied_inside and phase.apart_bytes:
            held = self.tied.get(microbatch, 0) + phase.apart_bytes
            if held == use.tied_inside * phase.apart_bytes:
                self.look(phase.apart_bytes)
                self.gradients -= held - (0 if self.tied_sum else phase.apart_bytes)
                self.tied_sum, held = True, 0
            self.tied[microbatch] = held

    def step(self, instruction: Instruction) -> None:
        if isinstance(instruction, SumGradients):
            self.sent.clear()
            self.look(sum(use.sum_bytes for use in self.stages))
            for reducing in self.reduced:
                self.look(reducing.finish_peak_bytes, gradients=reducing.finish_peak_bytes)
                self.gradients += reducing.finish_change_bytes
            return
        chunk, microbatch = instruction.chunk, instruction.microbatch
        use = self.stages[chunk]
        taken = use.microbatches[microbatch]
        if isinstance(instruction, Forward):
            self.run(taken.forward, chunk)
            self.pass_on(taken.sent_bytes, chunk, microbatch, use.gradients[microbatch], False)
        elif isinstance(instruction, (Backward, BackwardInput)):
            if isinstance(instruction, Backward) or taken.input is None:
                phase = taken.backward
                halves = {"input": taken.input, "weight": taken.weight}
                there = sum(
                    half.gradient_bytes
                    for name, half in halves.items()
                    if half is not None and (chunk, name) in self.made
                )
                if self.is_last(use, microbatch):
                    self.reduce(taken, phase, chunk)
                else:
                    self.run(phase, chunk, "input", "weight", there=there)
            else:
                phase = taken.input
                self.run(phase, chunk, "input")
            self.backwards[chunk] += 1
            if self.backwards[chunk] == len(use.microbatches):
                self.casts -= use.cast_bytes
            self.keep_apart(use, microbatch, phase)
            for held in (self.waiting, self.sent_bytes):
                if (chunk, microbatch, False) in held:
                    held[chunk, microbatch, False] += taken.sent_saved_bytes
            self.handed.pop((use.stage, microbatch, False), None)
            self.handed.pop((use.stage, microbatch, True), None)
            self.pass_on(taken.returned_bytes, chunk, microbatch, use.received[microbatch], True)
        elif isinstance(instruction, BackwardWeight):
            if taken.weight is not None:
                self.run(taken.weight, chunk, "weight")
                self.keep_apart(use, microbatch, taken.weight)
                if self.is_last(use, microbatch) and taken.reducing is not None and microbatch > 0:
                    self.gradients += taken.reducing.gradient_change_bytes
                    self.reduced.append(taken.reducing)
        elif isinstance(instruction, (SendActivation, SendGradient)):
            key = (chunk, microbatch, isinstance(instruction, SendGradient))
            if key in self.waiting:
                self.sent_bytes[key] = self.waiting.pop(key)
            self.sent_bytes.setdefault(key, 0)
            self.sent.append(key)
        self.look(0)

    def pass_on(self, num_bytes: int, chunk: int, microbatch: int, peers: Mapping[int, int], gradient: bool) -> None:
        """What a forward or backward made goes to other stages: of this rank, or away."""
        inside = [peer for peer in peers if self.stage_ranks[peer] == self.own]
        away = len(peers) > len(inside)
        if inside and not (away and gradient):
            self.handed[inside[-1], microbatch, gradient] += num_bytes
        elif away:
            self.waiting[chunk, microbatch, gradient] = num_bytes


def walk(
    instructions: Sequence[Instruction], stages: Sequence[StageUse], stage_ranks: Sequence[int], *, sends_held: int
) -> PeakMemory:
    """The most that a rank with these `stages` (in order of chunks) holds in a step, from the second one on."""
    gathered = sum(max((each.gathered_bytes for each in use.microbatches), default=0) for use in stages)
    rank = _Rank(stages, stage_ranks, ring_bytes(instructions, stages, stage_ranks) + gathered)
    for transfer, group in groupby(instructions, key=lambda each: isinstance(each, _TRANSFERS)):
        for instruction in group:
            rank.step(instruction)
        while transfer and len(rank.sent) > sends_held:
            rank.sent.popleft()
    return rank.peak

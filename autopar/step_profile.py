"""A measured step, in the same spans as a predicted one: what `par.profile_step()` returns.

Design note. Each rank knows when its instructions began and ended (`autopar.runtime.record`), and nothing of the others. Put together, they
tell waiting from moving: a transfer goes on from when its send is started and its receiver waits for it to when the receiver has it. What
comes beside a computation, and so is there when it is asked for, takes no more than it takes to ask. What a rank waits before the send
is bubble. What it spends in neither computation, transfers nor waiting is overhead, and is a span: Python between instructions, the
step's preparation, the loss. `replayed_seconds` is the step without any of that: the same computations, as long as they took, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autopar.runtime.record import RankRecord, on_one_clock
from autopar.timeline_drawing import Drawing, plan_drawing
from autopar.timeline_view import Lane, interval_difference, interval_union, plan_lane
from passes.instructions import (
    Compute,
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
    SumGradients,
    Transfer,
)
from passes.timeline import KINDS, Span, replay

if TYPE_CHECKING:
    from autopar.plan import Plan

_RECVS = (RecvActivation, RecvGradient)
_SENDS = (SendActivation, SendGradient)
_KINDS = {**{kind.__name__: name for kind, name in KINDS.items()}, "SumGradients": "sum gradients"}
_LEAST_OVERHEAD_SECONDS = 1e-6  # a shorter gap is the clock's own

Interval = tuple[float, float]
_Key = tuple[int, int, bool, int]  # of a transfer: from stage, to stage, gradients or not, microbatch


@dataclass(frozen=True)
class StepProfile:
    """One real step. `spans` are those of the first tensor-parallel rank of each stage, as in `plan.timeline()`; seconds from the
    first rank's start.
    """

    plan: Plan = field(repr=False)
    loss: torch.Tensor
    lane: Lane = field(repr=False)

    @property
    def spans(self) -> list[Span]:
        """By rank, then by start."""
        return list(self.lane.spans)

    @property
    def step_seconds(self) -> float:
        """From the first rank's start to the last one's end; without the optimizer's step."""
        return self.lane.step_seconds

    @property
    def replayed_seconds(self) -> float:
        """What the step would have taken if its computations, each as long as it was, waited for nothing but each other: they are
        played through the simulator, with transfers that take no time.
        """
        measured = {
            (span.rank, span.kind, span.microbatch, span.chunk): span.end_seconds - span.start_seconds
            for span in self.lane.spans
        }

        def seconds(rank: int, compute: Compute) -> float:
            return measured[rank, KINDS[type(compute)], compute.microbatch, compute.chunk]

        return replay(self.plan.instructions, seconds, stage_ranks=self.plan.stage_ranks).step_seconds

    def drawing(self) -> Drawing:
        """The measured step alone."""
        return Drawing((self.lane,), *_title(self.plan))

    def compare(self, plan: Plan | None = None) -> Drawing:
        """What a plan (None: the one that ran) predicts, and under it the measured step."""
        return plan_drawing(plan or self.plan, (self.lane,))

    def text(self) -> str:
        """Where the step went in one line, the rows, and a table of each rank's time."""
        return self.drawing().text()

    def save_svg(self, path: str | Path) -> None:
        """The measured step as SVG; `compare().save_svg(path)` for both."""
        self.drawing().save_svg(path)

    def save_html(self, path: str | Path) -> None:
        """The prediction and the measured step, as a self-contained page."""
        self.compare().save_html(path)

    def save_trace(self, path: str | Path) -> None:
        """The prediction and the measured step, as Chrome trace JSON."""
        self.compare().save_trace(path)

    def __str__(self) -> str:
        return self.text()


def _title(plan: Plan) -> tuple[str, str]:
    from autopar.plan_text import title

    first, second = title(plan)
    return first, second


def step_profile(plan: Plan, loss: torch.Tensor, records: Sequence[RankRecord]) -> StepProfile:
    """From the records of all ranks."""
    return StepProfile(plan, loss.detach(), measured_lane(plan, records))


@dataclass
class _Row:
    """What one pipeline rank did, sorted out."""

    record: RankRecord
    computes: list[tuple[Instruction, float, float]] = field(default_factory=list)
    runs: list[tuple[list[Transfer], float, float]] = field(default_factory=list)


def measured_lane(plan: Plan, records: Sequence[RankRecord]) -> Lane:
    """The spans of the first tensor-parallel rank of each stage."""
    predicted = plan_lane(plan)
    aligned = on_one_clock(sorted(records, key=lambda record: record.rank))
    rows = [
        _sorted_out(next(one for one in aligned if plan.coords(one.rank)["pp"] == place), listed)
        for place, listed in enumerate(plan.instructions)
    ]
    first, last = min(row.record.begin for row in rows), max(row.record.end for row in rows)
    sent: dict[_Key, float] = {}  # when it was offered
    received: dict[_Key, Interval] = {}  # when it was waited for, and when it was there
    for place, row in enumerate(rows):
        for transfers, start, end in row.runs:
            for one in transfers:
                key = _key(one, predicted.stages_of(place))
                if isinstance(one, _RECVS):
                    received[key] = start, end
                else:
                    sent[key] = start
    spans: list[Span] = []
    for place, row in enumerate(rows):
        mine = list(_spans(place, row, sent, received, predicted.stages_of(place), last))
        shifted = (
            Span(s.rank, s.start_seconds - first, s.end_seconds - first, s.kind, s.microbatch, s.chunk) for s in mine
        )
        spans += sorted(shifted, key=lambda span: (span.start_seconds, span.end_seconds, span.kind))
    return Lane("measured", tuple(spans), last - first, predicted.stage_ranks, predicted.row_notes)


def _sorted_out(record: RankRecord, listed: Sequence[Instruction]) -> _Row:
    """A record's actions as instructions. The sends of a run go by the name of the first; a receive is named where it is posted, if
    its run has no sends, and where it is waited for: that is later, and what counts.
    """
    named: dict[str, list[Instruction]] = {}
    run: list[Instruction] = []
    for one in listed:
        if isinstance(one, _SENDS):
            run.append(one)
        elif not isinstance(one, _RECVS):
            run = []
        named[repr(one)] = run if isinstance(one, _SENDS) else [one]
    row = _Row(record)
    awaited: dict[Transfer, Interval] = {}
    for text, start, end in record.actions:
        found = named.get(text)
        if found is None:
            continue
        if isinstance(found[0], _RECVS):
            awaited[found[0]] = start, end
        elif isinstance(found[0], _SENDS):
            row.runs.append(([one for one in found if isinstance(one, _SENDS)], start, end))
        else:
            row.computes.append((found[0], start, end))
    row.runs += [([one], start, end) for one, (start, end) in awaited.items()]
    return row


def _key(one: Transfer, stages: Sequence[int]) -> _Key:
    gradient, own = isinstance(one, (SendGradient, RecvGradient)), stages[one.chunk]
    if isinstance(one, _RECVS):
        return one.source, own, gradient, one.microbatch
    return own, one.to, gradient, one.microbatch


def _spans(
    rank: int, row: _Row, sent: dict[_Key, float], received: dict[_Key, Interval], stages: Sequence[int], last: float
) -> Iterator[Span]:
    computes = [(start, end) for _, start, end in row.computes]
    busy: list[Interval] = list(computes)
    waits: list[Interval] = [(row.record.end, last)]  # for the others to end
    for one, start, end in row.computes:
        yield Span(rank, start, end, _KINDS[type(one).__name__], _microbatch(one), getattr(one, "chunk", 0))
    for begin, over in row.record.collectives:
        around = next((one for one, start, end in row.computes if start <= begin and over <= end), None)
        busy.append((begin, over))
        if not isinstance(around, SumGradients):
            yield Span(rank, begin, over, "collective", _microbatch(around), getattr(around, "chunk", 0))
    for transfers, start, end in row.runs:
        for one in transfers:
            key = _key(one, stages)
            offered, (asked, done) = sent.get(key, start), received.get(key, (start, end))
            begin = max(offered, asked)
            waits.append((max(start, min(offered, asked)), min(end, begin)))
            if done > begin:
                kind = "receive" if isinstance(one, _RECVS) else "send"
                yield Span(rank, begin, done, kind, one.microbatch, one.chunk)
                busy.append((begin, done))
    gaps = interval_difference([(row.record.begin, last)], interval_union([*busy, *_proper(waits)]))
    for start, end in gaps:
        if end - start >= _LEAST_OVERHEAD_SECONDS:
            yield Span(rank, start, end, "overhead", -1, 0)


def _microbatch(one: Instruction | None) -> int:
    return -1 if one is None or isinstance(one, SumGradients) else one.microbatch


def _proper(intervals: Iterable[Interval]) -> list[Interval]:
    return [(start, end) for start, end in intervals if end > start]

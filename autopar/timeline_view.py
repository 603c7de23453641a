"""What the drawings of a timeline share: lanes, the table of kinds with their colours, and where a step's time goes.

Design note. A `Lane` is one timeline to show: a plan's prediction, a measured step, or both under each other on one time
scale. What a rank does not spend in a span is bubble: it waits for others. So a measured lane has explicit spans of kind
"overhead" for what is neither work nor waiting.

KINDS has one row per kind of span. The colours are Okabe and Ito's (2008, Color Universal Design), which readers with any
colour vision tell apart, made darker or lighter where two would look alike or text would be hard to read; forward and backward differ in
lightness too. A rank's further chunks are lighter shades of the same colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tabulate import tabulate

from autopar.plan_text import seconds_text
from passes.timeline import Span, Timeline

if TYPE_CHECKING:
    from autopar.plan import Plan

GROUPS = ("compute", "collectives", "transfers", "overhead", "bubble")


@dataclass(frozen=True)
class Kind:
    """A row of KINDS: a kind of span, its colour, and the part of the step it counts to.

    `group` is one of GROUPS. `thin` spans are drawn as a strip under the row, because they run beside computation.
    """

    name: str
    colour: str
    group: str
    thin: bool = False


KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("forward", "#0072b2", "compute"),
        Kind("recompute", "#56b4e9", "compute"),
        Kind("backward", "#e69f00", "compute"),
        Kind("backward input", "#c04f00", "compute"),
        Kind("backward weight", "#3dbf8f", "compute"),
        Kind("optimizer", "#5d5fa8", "compute"),
        Kind("sum gradients", "#8a2f62", "collectives"),
        Kind("collective", "#8a2f62", "collectives", thin=True),
        Kind("send", "#cc79a7", "transfers", thin=True),
        Kind("receive", "#8f5d86", "transfers", thin=True),
        Kind("overhead", "#8a9099", "overhead"),
    )
}
_OTHER = "#777777"  # a kind without a row
_TINTS = (0.0, 0.34, 0.58, 0.74)  # towards white, by chunk
GROUP_COLOURS = {
    "compute": KINDS["forward"].colour, "collectives": KINDS["sum gradients"].colour, "transfers": KINDS["send"].colour,
    "overhead": KINDS["overhead"].colour, "bubble": "none",
}  # fmt: skip


def kind_of(name: str) -> Kind:
    """The row of a kind; a grey one for a kind that has none."""
    return KINDS.get(name) or Kind(name, _OTHER, "overhead")


def shade(kind: str, chunk: int) -> tuple[str, str]:
    """The colour of a box and of the text in it, `#rrggbb` both."""
    colour, tint = kind_of(kind).colour, _TINTS[chunk % len(_TINTS)]
    parts = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    mixed = [round(part + (255 - part) * tint) for part in parts]
    # relative luminance and contrast: Web Content Accessibility Guidelines 2.1, section 1.4.3
    linear = [((part / 255 + 0.055) / 1.055) ** 2.4 if part > 10 else part / 255 / 12.92 for part in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    text = "#ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"
    return "#" + "".join(f"{part:02x}" for part in mixed), text


@dataclass(frozen=True)
class Lane:
    """One timeline to show. `stage_ranks[s]` is the pipeline rank of stage s; `row_notes` say what each rank holds.

    `collective_seconds`: per rank, what the spans of computation hold of collectives without showing them.
    """

    name: str
    spans: tuple[Span, ...]
    step_seconds: float
    stage_ranks: tuple[int, ...]
    row_notes: tuple[str, ...] = ()
    collective_seconds: tuple[float, ...] = field(default=())

    @property
    def num_ranks(self) -> int:
        return max(self.stage_ranks) + 1

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, by chunk."""
        return tuple(stage for stage, held_by in enumerate(self.stage_ranks) if held_by == rank)

    def stage_of(self, span: Span) -> int:
        """The stage that a span belongs to."""
        stages = self.stages_of(span.rank)
        chunk = span.chunk
        return stages[chunk] if chunk < len(stages) else stages[0]

    def of_rank(self, rank: int) -> list[Span]:
        """A rank's spans by start, the longer first of those that start together."""
        mine = [span for span in self.spans if span.rank == rank]
        return sorted(mine, key=lambda span: (span.start_seconds, -span.end_seconds, span.kind, span.microbatch))


@dataclass(frozen=True)
class RankTime:
    """Where one rank's step goes, in seconds; they add up to the step. `bubble`: it waits for other ranks."""

    rank: int
    compute: float
    collectives: float
    transfers: float
    overhead: float
    bubble: float

    @property
    def step(self) -> float:
        return self.compute + self.collectives + self.transfers + self.overhead + self.bubble


def where_time_goes(lane: Lane) -> tuple[RankTime, ...]:
    """Per rank. Time that two spans share counts once: collectives, then compute, transfers, overhead."""
    found = []
    for rank in range(lane.num_ranks):
        spans = lane.of_rank(rank)
        covered: list[tuple[float, float]] = []
        seconds = dict.fromkeys(GROUPS, 0.0)
        for group in ("collectives", "compute", "transfers", "overhead"):
            mine = [(s.start_seconds, s.end_seconds) for s in spans if kind_of(s.kind).group == group]
            before = _length(covered)
            covered = interval_union([*covered, *mine])
            seconds[group] = _length(covered) - before
        hidden = min(lane.collective_seconds[rank], seconds["compute"]) if lane.collective_seconds else 0.0
        seconds["compute"] -= hidden
        seconds["collectives"] += hidden
        seconds["bubble"] = max(0.0, lane.step_seconds - _length(covered))
        found.append(RankTime(rank, **seconds))
    return tuple(found)


def interval_union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def interval_difference(
    intervals: Iterable[tuple[float, float]], taken: Iterable[tuple[float, float]]
) -> list[tuple[float, float]]:
    """What is in `intervals` and not in `taken`; both disjoint and in order."""
    left: list[tuple[float, float]] = []
    covers = list(taken)
    for start, end in intervals:
        for begin, over in covers:
            if over <= start or begin >= end:
                continue
            if begin > start:
                left.append((start, begin))
            start = max(start, over)
        if start < end:
            left.append((start, end))
    return left


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def shares(times: Sequence[RankTime]) -> dict[str, float]:
    """The part of all ranks' time that each of GROUPS takes."""
    total = sum(time.step for time in times)
    return {group: sum(getattr(time, group) for time in times) / total if total else 0.0 for group in GROUPS}


def time_line(lane: Lane) -> str:
    """One line: where the lane's time goes, over all ranks."""
    parts = [
        f"{share * 100:.0f}% {group}"
        for group, share in shares(where_time_goes(lane)).items()
        if share >= 0.005 or group in ("compute", "bubble")
    ]
    return f"{lane.name} {seconds_text(lane.step_seconds)} a step: {', '.join(parts)}"


def time_table(lane: Lane) -> str:
    """A row per rank: where its step goes. Columns that are zero everywhere are left out."""
    times = where_time_goes(lane)
    groups = [group for group in GROUPS if group in ("compute", "bubble") or any(getattr(t, group) > 0 for t in times)]
    rows = [
        (
            f"rank {time.rank}",
            *(f"{seconds_text(getattr(time, group))} {getattr(time, group) / time.step:4.0%}" for group in groups),
        )
        for time in times
        if time.step
    ]
    align = ["left", *["right"] * len(groups)]
    return tabulate(rows, headers=("", *groups), colalign=align if rows else None, disable_numparse=True)


def lane_text(lane: Lane) -> str:
    """The rows in characters, as in a printed plan."""
    return Timeline(lane.spans, lane.num_ranks, lane.step_seconds, lane.stage_ranks).text()


def lane_of(timeline: Timeline, name: str, stage_ranks: Sequence[int] | None = None, **more: object) -> Lane:
    """A lane of a simulated timeline; without `stage_ranks` every stage has a rank of its own."""
    ranks = tuple(stage_ranks) if stage_ranks is not None else tuple(range(timeline.num_stages))
    return Lane(name, timeline.spans, timeline.step_seconds, ranks, **more)  # type: ignore[arg-type]


def stage_ranks_of(plan: Plan) -> tuple[int, ...]:
    """The pipeline rank of each stage."""
    return tuple(getattr(plan, "stage_ranks", None) or range(len(plan.stages)))


def plan_lane(plan: Plan) -> Lane:
    """What a plan predicts of its step, without the optimizer's."""
    from autopar.plan_text import stage_layers

    ranks = stage_ranks_of(plan)
    held = [[stage for stage, rank in zip(plan.stages, ranks, strict=True) if rank == row] for row in range(max(ranks) + 1)]
    return lane_of(
        plan.simulated(), "predicted", ranks,
        row_notes=tuple("; ".join(stage_layers(stage) for stage in stages) for stages in held),
        collective_seconds=tuple(sum(s.cost.collective_seconds for s in stages) * plan.microbatches for stages in held),
    )  # fmt: skip

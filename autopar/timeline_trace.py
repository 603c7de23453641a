"""A timeline as Chrome trace JSON, which ui.perfetto.dev and chrome://tracing open.

A process per lane, a thread per rank and, under it, one for its transfers (more where several run at once: a viewer takes spans
of one thread that overlap for nested ones). An arrow leads from each stage's forward to the next one's, and back for gradients.
Times are microseconds. Format: "Trace Event Format", Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from autopar.timeline_view import Lane, kind_of
from passes.timeline import Span

_THREADS = 100  # room for one rank's threads
_BACKWARD = ("backward", "backward input")


def trace_json(lanes: Sequence[Lane]) -> str:
    """The lanes as the text of a trace file."""
    events = [event for index, lane in enumerate(lanes) for event in _lane_events(index, lane)]
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _lane_events(process: int, lane: Lane) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, 0, lane.name)
    yield {"name": "process_sort_index", "ph": "M", "pid": process, "tid": 0, "args": {"sort_index": process}}
    threads: dict[int, int] = {}
    for rank in range(lane.num_ranks):
        spans = lane.of_rank(rank)
        main = [span for span in spans if not kind_of(span.kind).thin]
        beside = _rows([span for span in spans if kind_of(span.kind).thin])
        for row, listed in enumerate([main, *beside]):
            thread = threads[rank] = rank * _THREADS + row
            stages = ", ".join(map(str, lane.stages_of(rank)))
            name = f"rank {rank} transfers" if row else f"rank {rank}: stage{'s' if ',' in stages else ''} {stages}"
            yield _named("thread_name", process, thread, name)
            yield {"name": "thread_sort_index", "ph": "M", "pid": process, "tid": thread, "args": {"sort_index": thread}}
            for span in listed:
                about: dict[str, int] = {"stage": lane.stage_of(span)}
                if span.microbatch >= 0:
                    about["microbatch"] = span.microbatch
                yield {
                    "name": f"{span.kind} {span.microbatch}" if span.microbatch >= 0 else span.kind,
                    "cat": kind_of(span.kind).group, "ph": "X", "pid": process, "tid": thread, "ts": _microseconds(span.start_seconds),
                    "dur": _microseconds(span.end_seconds - span.start_seconds), "args": about,
                }  # fmt: skip
    yield from _arrows(process, lane)


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _rows(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans in as few rows as it takes for none to overlap another of its row."""
    rows: list[list[Span]] = []
    for span in spans:
        row = next((row for row in rows if row[-1].end_seconds <= span.start_seconds), None)
        if row is None:
            row = []
            rows.append(row)
        row.append(span)
    return rows


def _arrows(process: int, lane: Lane) -> Iterator[dict[str, Any]]:
    """Pairs of flow events between a microbatch's computations on neighbouring stages."""
    forward: dict[tuple[int, int], Span] = {}
    backward: dict[tuple[int, int], Span] = {}
    for span in lane.spans:
        key = lane.stage_of(span), span.microbatch
        if span.kind == "forward":
            forward[key] = span
        elif span.kind in _BACKWARD:
            backward[key] = span
    flow = process << 24  # ids are the file's
    for found, step in ((forward, 1), (backward, -1)):
        for (stage, microbatch), span in sorted(found.items(), key=lambda item: item[0]):
            following = found.get((stage + step, microbatch))
            if following is None or following.rank == span.rank:
                continue
            flow += 1
            common = {"name": "activation" if step > 0 else "gradient", "cat": "flow", "id": flow, "pid": process}
            # inside of the boxes: at its very end a point would belong to none
            start = (span.start_seconds + span.end_seconds) / 2
            yield {**common, "ph": "s", "tid": span.rank * _THREADS, "ts": _microseconds(start)}
            yield {
                **common, "ph": "f", "bp": "e", "tid": following.rank * _THREADS, "ts": _microseconds(following.start_seconds),
            }  # fmt: skip

"""A search as one self-contained HTML page: the table, the time-memory front, why others lost, and timelines of the best plans.

Everything is in the page: no scripts, fonts or pictures from elsewhere. Timelines are those of `autopar.timeline_svg`, with the stage
times that the predictions rest on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from autopar.plan_text import bytes_text, seconds_text
from autopar.predict import LayoutPrediction
from autopar.search import Plans
from autopar.search_text import HEADERS, cells, heading, layout_text, reasons, why_slower
from autopar.timeline_svg import svg
from autopar.timeline_view import Lane
from passes.order import order
from passes.schedules import schedule as schedule_named
from passes.timeline import simulate

_TIMELINES = 3
_MOST_SPANS = 3000  # a picture of more is slow to look at: fewer microbatches are drawn
_MOST_RANKS = 32

_STYLE = """
body { font: 14px/1.45 ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; margin: 24px; color: #24292f; background: #fff; }
h1 { font-size: 20px; } h2 { font-size: 16px; margin-top: 32px; } p, li { max-width: 110ch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #d0d7de; } tr:nth-child(even) td { background: #f6f8fa; } .small { color: #57606a; }
.scroll { overflow-x: auto; } svg text { font: 11px ui-sans-serif, system-ui, sans-serif; fill: #57606a; }
.front { fill: none; stroke: #0072b2; stroke-width: 1.5; } .point { fill: #0072b2; } .best { fill: #e69f00; } .axis { stroke: #d0d7de; }
@media (prefers-color-scheme: dark) {
body { color: #e6edf3; background: #0d1117; } tr:nth-child(even) td { background: #161b22; } th { border-color: #30363d; }
.small, svg text { color: #9da7b3; fill: #9da7b3; } .axis { stroke: #30363d; }
}
"""


def search_html(plans: Plans) -> str:
    """The text of the page; the same search gives the same bytes, but for the seconds it took."""
    title, *rest = heading(plans)
    best = plans.predictions[0]
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells(plans))
    runners = [f"{index + 2}: {why_slower(best, other, plans)}" for index, other in enumerate(plans.predictions[1:])]
    others = [f"{what}: {why} [{layout_text(other.layout)}]" for what, why, other in reasons(plans)]
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="small">{escape(line)}</p>' for line in rest),
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
            "<h2>Time and memory</h2>",
            "<p>No layout that was priced beats one of these in both. Hover for the layout.</p>",
            pareto_svg(plans.front, best),
            _list("Why the runners-up lost", runners),
            _list("Other decisions: the best layout with each", others),
            *_timelines(plans),
            "</body></html>\n",
        )
    )


def _list(title: str, items: Sequence[str]) -> str:
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def pareto_svg(front: Sequence[LayoutPrediction], best: LayoutPrediction, width: int = 860, height: int = 360) -> str:
    """Memory of a device across, seconds of a step up, both from below the least to above the most."""
    left, right, top, bottom = 74, 20, 14, 44
    memory, seconds = [p.peak_bytes for p in front], [p.step_seconds for p in front]
    low_x, high_x = 0.0, max(*memory, best.memory_bytes) * 1.02
    low_y, high_y = min(seconds) * 0.95, max(seconds) * 1.05

    def x(value: float) -> float:
        return round(left + (value - low_x) / (high_x - low_x) * (width - left - right), 1)

    def y(value: float) -> float:
        return round(height - bottom - (value - low_y) / (high_y - low_y) * (height - top - bottom), 1)

    parts = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"><title>time and memory</title>']
    for tick in _ticks(low_x / 2**30, high_x / 2**30):
        at = x(tick * 2**30)
        parts.append(f'<line class="axis" x1="{at}" y1="{top}" x2="{at}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{at}" y="{height - bottom + 16}" text-anchor="middle">{tick:g} GiB</text>')
    for tick in _ticks(low_y, high_y):
        parts.append(f'<line class="axis" x1="{left}" y1="{y(tick)}" x2="{width - right}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{escape(seconds_text(tick))}</text>')
    points = " ".join(f"{x(p.peak_bytes)},{y(p.step_seconds)}" for p in front)
    parts.append(f'<polyline class="front" points="{points}"/>')
    for each in front:
        kind = "best" if each.layout == best.layout else "point"
        what = f"{seconds_text(each.step_seconds)}, {bytes_text(each.peak_bytes)}: {layout_text(each.layout)}"
        place = f'cx="{x(each.peak_bytes)}" cy="{y(each.step_seconds)}"'
        parts.append(f'<circle class="{kind}" {place} r="4.5"><title>{escape(what)}</title></circle>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">memory of a device</text></svg>')
    return "\n".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _timelines(plans: Plans) -> list[str]:
    parts = []
    for index, found in enumerate(plans.predictions[:_TIMELINES]):
        drawn = timeline_lane(plans, found)
        if drawn is not None:
            lane, note = drawn
            parts.append(f"<h2>Timeline of plan {index + 1}</h2><p>{escape(layout_text(found.layout) + note)}</p>")
            parts.append(f'<div class="scroll">{svg([lane])}</div>')
    return parts


def timeline_lane(plans: Plans, found: LayoutPrediction) -> tuple[Lane, str] | None:
    """The schedule with the stages' predicted times, and what is left out of it; None without a pipeline, or for one too large to draw."""
    layout = found.layout
    if not 1 < layout.pp <= _MOST_RANKS:
        return None
    row, stages = schedule_named(layout.schedule), plans.evaluator.stages(layout)
    count = layout.microbatches
    most = max(2 * layout.pp, _MOST_SPANS // (layout.num_stages * 4) // layout.pp * layout.pp)
    note = ""
    if count > most:
        count, note = most, f"; {most} of its {layout.microbatches} microbatches"
    edges = [(stage, stage + 1) for stage in range(layout.num_stages - 1)]
    instructions = order(row, layout.pp, count, edges, virtual_stages=layout.virtual_stages)
    weights = stages.weight
    timeline = simulate(
        instructions, stage_ranks=stages.stage_ranks, forward_seconds=stages.forward, backward_seconds=stages.backward,
        backward_input_seconds=[b - w for b, w in zip(stages.backward, weights, strict=True)], backward_weight_seconds=weights,
    )  # fmt: skip
    return Lane("predicted", tuple(timeline.spans), timeline.step_seconds, stages.stage_ranks), note

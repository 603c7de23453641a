"""A timeline as one self-contained HTML page: no scripts, fonts or pictures from elsewhere.

The spans are in the page as numbers (microseconds); the script in `timeline_page.html` beside this file draws them on a canvas per
lane, all with one scale. Zooming, the boxes under the pointer and the dark or light setting are the script's; the tables and, for
readers without scripts, the timeline as text are plain HTML. The same lanes give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from autopar.plan_text import seconds_text
from autopar.timeline_view import (
    GROUP_COLOURS,
    GROUPS,
    KINDS,
    Lane,
    RankTime,
    kind_of,
    shade,
    shares,
    time_line,
    where_time_goes,
)


def html(lanes: Sequence[Lane], *, title: str = "", subtitle: str = "", notes: Sequence[str] = (), texts: Sequence[str] = ()) -> str:
    """The page. `texts`: each lane as text, for readers without scripts. `notes` are listed under the tables."""
    page = files("autopar").joinpath("timeline_page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": escape(title or "timeline"),
        "SUBTITLE": escape(subtitle),
        "LEGEND": _legend(lanes),
        "LANES": "\n".join(_lane(index, lane, texts[index] if index < len(texts) else "") for index, lane in enumerate(lanes)),
        "STAGES": _stage_table(lanes),
        "NOTES": "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else "",
        "DATA": json.dumps(_data(lanes), separators=(",", ":"), sort_keys=True).replace("</", "<\\/"),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _data(lanes: Sequence[Lane]) -> dict[str, Any]:
    """What the script draws. A span is [start, length, kind, microbatch, stage, shade]; times are microseconds."""
    kinds = [*KINDS, *sorted({span.kind for lane in lanes for span in lane.spans} - set(KINDS))]
    shades: dict[tuple[str, str], int] = {}
    rows: list[list[dict[str, Any]]] = []
    for lane in lanes:
        rows.append([])
        for rank in range(lane.num_ranks):
            listed = []
            for span in lane.of_rank(rank):
                chunk = 0 if kind_of(span.kind).thin else span.chunk
                colours = shade(span.kind, chunk)
                start, length = (round(s * 1e6, 3) for s in (span.start_seconds, span.end_seconds - span.start_seconds))
                about = (kinds.index(span.kind), span.microbatch, lane.stage_of(span))
                listed.append([start, length, *about, shades.setdefault(colours, len(shades))])
            stages = lane.stages_of(rank)
            note = lane.row_notes[rank] if rank < len(lane.row_notes) else ""
            named = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
            rows[-1].append({"name": f"rank {rank}", "note": note if note and len(stages) == 1 else named, "spans": listed})
    return {
        "kinds": [[name, kind_of(name).thin, kind_of(name).group == "compute"] for name in kinds],
        "lanes": [
            {"name": lane.name, "step": round(lane.step_seconds * 1e6, 3), "rows": row}
            for lane, row in zip(lanes, rows, strict=True)
        ],
        "shades": [list(colours) for colours in shades],
    }


def _legend(lanes: Sequence[Lane]) -> str:
    found: dict[str, int] = {}
    for lane in lanes:
        for span in lane.spans:
            found[span.kind] = max(found.get(span.kind, 0), span.chunk)
    known = [kind for kind in KINDS if kind in found] + sorted(set(found) - set(KINDS))
    items = []
    for kind in known:
        thin, count = kind_of(kind).thin, 1 if kind_of(kind).thin else found[kind] + 1
        swatches = "".join(
            f'<i class="swatch{" thin" if thin else ""}" style="background:{shade(kind, chunk)[0]}"></i>' for chunk in range(count)
        )
        items.append(f"<span>{swatches}{escape(kind)}{f', chunks 0 to {count - 1}' if count > 1 else ''}</span>")
    return "".join(items) + '<span><i class="swatch idle"></i>waiting (bubble)</span>'


def _lane(index: int, lane: Lane, text: str) -> str:
    head, _, tail = time_line(lane).partition(": ")
    fallback = f"<noscript><pre>{escape(text)}</pre></noscript>" if text else ""
    return (
        f'<section class="lane"><h2>{escape(head)} <small>{escape(tail)}</small></h2>'
        f'<canvas id="lane{index}" tabindex="0" role="img" aria-label="{escape(time_line(lane))}"></canvas>{fallback}\n'
        f"{_time_table(lane)}</section>"
    )


def _time_table(lane: Lane) -> str:
    times = where_time_goes(lane)
    groups = [group for group in GROUPS if group in ("compute", "bubble") or any(getattr(t, group) > 0 for t in times)]
    head = "".join(f'<th colspan="2">{group}</th>' for group in groups)
    rows = [_time_row(f"rank {time.rank}", time, groups) for time in times]
    mean = shares(times)
    total = "".join(f"<td></td><td>{mean[group]:.0%}</td>" for group in groups)
    return (
        f'<div class="scroll"><table><thead><tr><th></th><th class="bar">where the step goes</th>{head}</tr></thead><tbody>'
        + "".join(rows)
        + f"<tr class=total><th>all</th><td>{_bar(mean)}</td>{total}</tr></tbody></table></div>"
    )


def _time_row(name: str, time: RankTime, groups: Sequence[str]) -> str:
    part = {group: getattr(time, group) / time.step if time.step else 0.0 for group in GROUPS}
    cells = "".join(f"<td>{seconds_text(getattr(time, group))}</td><td>{part[group]:.0%}</td>" for group in groups)
    return f"<tr><th>{name}</th><td>{_bar(part)}</td>{cells}</tr>"


def _bar(part: dict[str, float]) -> str:
    pieces = "".join(
        f'<i style="width:{part[group] * 100:.2f}%;background:{GROUP_COLOURS[group]}" title="{group} {part[group]:.0%}"></i>'
        for group in GROUPS
        if group != "bubble" and part[group] > 0
    )
    return f'<div class="share">{pieces}</div>'


def _stage_table(lanes: Sequence[Lane]) -> str:
    """Per stage, its computations' mean times in each lane: which stage the prediction had wrong."""
    kinds = [kind for kind in KINDS if any(span.kind == kind for lane in lanes for span in lane.spans) and not KINDS[kind].thin]
    kinds = [kind for kind in kinds if KINDS[kind].group == "compute"]
    if not kinds or not lanes:
        return ""
    means: list[dict[tuple[int, str], tuple[float, int]]] = []
    for lane in lanes:
        found: dict[tuple[int, str], tuple[float, int]] = {}
        for span in lane.spans:
            seconds, count = found.get((lane.stage_of(span), span.kind), (0.0, 0))
            found[lane.stage_of(span), span.kind] = seconds + span.end_seconds - span.start_seconds, count + 1
        means.append(found)
    two = '<tr><th colspan="2"></th>' + "".join(f"<th>{escape(lane.name)}</th>" for _ in kinds for lane in lanes) + "</tr>"
    head = "".join(f'<th colspan="{len(lanes)}">{kind}</th>' for kind in kinds)
    rows = []
    for stage, rank in enumerate(lanes[0].stage_ranks):
        cells = ""
        for kind in kinds:
            for found in means:
                seconds, count = found.get((stage, kind), (0.0, 0))
                cells += f"<td>{seconds_text(seconds / count) if count else ''}</td>"
        rows.append(f"<tr><th>stage {stage}</th><td>rank {rank}</td>{cells}</tr>")
    return (
        '<h2>Stages <small>one microbatch, on average</small></h2><div class="scroll"><table><thead>'
        f'<tr><th colspan="2"></th>{head}</tr>{two if len(lanes) > 1 else ""}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )

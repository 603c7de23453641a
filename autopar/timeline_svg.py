"""A timeline as SVG: a row per rank, boxes with their microbatch in them, transfers as a strip under the row.

Plain elements and one style sheet, so that every viewer shows it; a title in each box says what it is to whoever hovers. In a
browser it follows the reader's dark or light setting. The same lanes give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from autopar.plan_text import seconds_text
from autopar.timeline_view import KINDS, Lane, kind_of, shade, time_line, where_time_goes
from passes.timeline import Span

_MARGIN, _GUTTER, _RIGHT = 20, 118, 62  # pixels: around all, for the rows' names, for their busy share
_ROW, _STRIP, _GAP = 26, 5, 9  # a row's boxes, the strip of transfers, between rows
_SMALL_ROW, _SMALL_GAP = 13, 4  # from MANY_RANKS on
_MANY_RANKS = 24
_FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_DIGIT = 0.60  # width of a digit over the font's size
_LABEL_SIZES = (11.5, 9.5, 8.0, 7.0)  # the largest that fits
_NARROWEST_GAP = 3.0  # boxes from this width on have a hairline between them
_WIDTHS, _WANTED_BOX = (1280, 2560), 14.0  # pixels: of the drawing, between these, so that a short box has room for its label

_STYLE = """\
text { font-family: %s; fill: #24292f; }
.page { fill: #ffffff; } .track { fill: #eef1f4; }
.grid { stroke: #d0d7de; stroke-width: 1; } .end { stroke: #57606a; stroke-width: 1.5; }
.title { font-size: 16px; } .lane { font-size: 13px; } .name { font-size: 12px; } .title, .lane, .name { font-weight: 600; }
.small { font-size: 11px; } .tiny { font-size: 10px; } .small, .tiny { fill: #57606a; }
.mid { text-anchor: middle; } .right { text-anchor: end; }
.box { text-anchor: middle; pointer-events: none; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .page { fill: #0d1117; } .track { fill: #1f262e; } .grid { stroke: #30363d; } .end { stroke: #9da7b3; }
.small, .tiny { fill: #9da7b3; }
}"""


def svg(lanes: Sequence[Lane], *, title: str = "", width: int | None = None) -> str:
    """The lanes under each other on one time scale, as the text of an SVG file `width` pixels wide (None: as it needs)."""
    width = width or _fitting_width(lanes)
    drawing = _Drawing(lanes, width)
    y = float(_MARGIN)
    if title:
        drawing.text(_MARGIN, y + 14, title, "title")
        y += 30
    y = drawing.legend(y)
    for lane in lanes:
        y = drawing.lane(lane, y + 12)
    height = math.ceil(y + _MARGIN - 6)
    name = escape(title or "timeline")
    summary = escape("; ".join(time_line(lane) for lane in lanes))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{name}</title>",
            f"<desc>{summary}</desc>",
            f"<style>\n{_STYLE % _FONT}\n{drawing.shades()}\n</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            *drawing.elements,
            "</svg>\n",
        )
    )


def _fitting_width(lanes: Sequence[Lane]) -> int:
    longest = max((lane.step_seconds for lane in lanes), default=0.0)
    lengths = sorted(
        span.end_seconds - span.start_seconds
        for lane in lanes
        for span in lane.spans
        if kind_of(span.kind).group == "compute" and span.end_seconds > span.start_seconds
    )
    if not lengths:
        return _WIDTHS[0]
    wanted = _WANTED_BOX * longest / lengths[len(lengths) // 10] + 2 * _MARGIN + _GUTTER + _RIGHT
    return min(max(_WIDTHS[0], math.ceil(wanted / 20) * 20), _WIDTHS[1])


def _number(value: float) -> str:
    """Two digits after the point at most: `12`, `3.5`, `0.25`."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def tick_seconds(length_seconds: float, most: int) -> float:
    """The least of 1, 2, 5 times a power of ten that divides `length_seconds` into at most `most` parts."""
    if length_seconds <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(length_seconds / most))
    return next(power * step for step in (1, 2, 5, 10, 20) if length_seconds / (power * step) <= most + 1e-9)


def span_text(lane: Lane, span: Span) -> str:
    """What a box is, in words: for titles and tooltips."""
    length = span.end_seconds - span.start_seconds
    of = f" of microbatch {span.microbatch}" if span.microbatch >= 0 else ""
    return (
        f"{span.kind}{of}\nstage {lane.stage_of(span)}, rank {span.rank}\n"
        f"{seconds_text(span.start_seconds)} to {seconds_text(span.end_seconds)}: {seconds_text(length)}"
    )


class _Drawing:
    """The elements of one drawing."""

    def __init__(self, lanes: Sequence[Lane], width: int) -> None:
        self.lanes, self.width = lanes, width
        self.elements: list[str] = []
        self.used: set[tuple[str, int]] = set()
        self.left, self.right = _MARGIN + _GUTTER, width - _MARGIN - _RIGHT
        longest = max((lane.step_seconds for lane in lanes), default=0.0)
        self.scale = (self.right - self.left) / longest if longest else 0.0

    def text(self, x: float, y: float, words: str, style: str, title: str = "") -> None:
        hover = f"<title>{escape(title)}</title>" if title else ""
        self.elements.append(f'<text class="{style}" x="{_number(x)}" y="{_number(y)}">{hover}{escape(words)}</text>')

    def shade_class(self, kind: str, chunk: int) -> str:
        self.used.add((kind, chunk))
        return f"{kind.replace(' ', '-')}-{chunk}"

    def shades(self) -> str:
        lines = []
        for kind, chunk in sorted(self.used):
            fill, text = shade(kind, chunk)
            name = f"{kind.replace(' ', '-')}-{chunk}"
            lines.append(f".{name} {{ fill: {fill}; }} text.on-{name} {{ fill: {text}; }}")
        return "\n".join(lines)

    def legend(self, y: float) -> float:
        """Every kind there is, a swatch per chunk; then what an empty place means."""
        kinds: dict[str, int] = {}
        for lane in self.lanes:
            for span in lane.spans:
                kinds[span.kind] = max(kinds.get(span.kind, 0), span.chunk)
        order = {name: place for place, name in enumerate(KINDS)}
        x = float(self.left)
        for kind in sorted(kinds, key=lambda name: (order.get(name, len(order)), name)):
            thin, count = kind_of(kind).thin, 1 if kind_of(kind).thin else kinds[kind] + 1
            words = kind + (f", chunks 0 to {count - 1}" if count > 1 else "")
            needed = count * 15 + 6 + len(words) * 6.2 + 20
            if x + needed > self.width - _MARGIN and x > self.left:
                x, y = float(self.left), y + 20
            for chunk in range(count):
                top, height = (y + 4.5, _STRIP) if thin else (y, 14)
                style = self.shade_class(kind, chunk)
                self.elements.append(
                    f'<rect class="{style}" x="{_number(x)}" y="{_number(top)}" width="14" height="{height}" rx="2"/>'
                )
                x += 15
            self.text(x + 5, y + 11, words, "small")
            x += needed - count * 15
        words = "waiting (bubble)"
        if x + 140 > self.width - _MARGIN and x > self.left:
            x, y = float(self.left), y + 20
        self.elements.append(f'<rect class="track" x="{_number(x)}" y="{_number(y)}" width="14" height="14" rx="2"/>')
        self.text(x + 20, y + 11, words, "small")
        return y + 24

    def lane(self, lane: Lane, y: float) -> float:
        """One lane from `y` on; returns where it ends."""
        head, _, tail = time_line(lane).partition(": ")
        self.elements.append(
            f'<text x="{_MARGIN}" y="{_number(y + 11)}"><tspan class="lane">{escape(head)}</tspan>'
            f'<tspan class="small" dx="10">{escape(tail)}</tspan></text>'
        )
        y += 24
        many = lane.num_ranks >= _MANY_RANKS
        row, gap = (_SMALL_ROW, _SMALL_GAP) if many else (_ROW, _GAP)
        strip = _STRIP if any(kind_of(span.kind).thin for span in lane.spans) else 0
        bottom = y + lane.num_ranks * (row + strip + gap) - gap
        self._grid(lane, y - 4, bottom + 4)
        for rank, time in enumerate(where_time_goes(lane)):
            self._row_name(lane, rank, y, row + strip)
            end = self.left + lane.step_seconds * self.scale
            self.elements.append(
                f'<rect class="track" x="{_number(self.left)}" y="{_number(y)}" '
                f'width="{_number(end - self.left)}" height="{row + strip}"/>'
            )
            for span in lane.of_rank(rank):
                self._box(lane, span, y, row, strip)
            if time.step:
                self.text(self.width - _MARGIN, y + (row + strip) / 2 + 4, f"{time.compute / time.step:.0%} busy", "small right")
            y += row + strip + gap
        return bottom + 20

    def _grid(self, lane: Lane, top: float, bottom: float) -> None:
        longest = (self.right - self.left) / self.scale if self.scale else 0.0
        step = tick_seconds(longest, 12)
        count = math.floor(longest / step + 1e-9) if longest else 0
        unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if step >= s * 0.999), ("us", 1e-6))
        for tick in range(count + 1):
            x = _number(self.left + tick * step * self.scale)
            self.elements.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_number(top)}" y2="{_number(bottom)}"/>')
            words = f"{tick * step / size:g} {unit}" if tick else "0"
            self.elements.append(f'<text class="tiny mid" x="{x}" y="{_number(bottom + 12)}">{words}</text>')
        if self.scale:
            x = _number(self.left + lane.step_seconds * self.scale)
            self.elements.append(f'<line class="end" x1="{x}" x2="{x}" y1="{_number(top)}" y2="{_number(bottom)}"/>')

    def _row_name(self, lane: Lane, rank: int, y: float, height: float) -> None:
        stages = lane.stages_of(rank)
        named = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
        note = lane.row_notes[rank] if rank < len(lane.row_notes) else ""
        alone = lane.num_ranks == len(lane.stage_ranks) and not note
        if height < 24 or alone:
            self.text(_MARGIN, y + height / 2 + 4, f"rank {rank}", "name", note)
            return
        self.text(_MARGIN, y + height / 2 - 2, f"rank {rank}", "name", note)
        under = named if len(stages) > 1 or not note else note
        self.text(_MARGIN, y + height / 2 + 11, under if len(under) <= 20 else under[:19] + "…", "tiny", note)

    def _box(self, lane: Lane, span: Span, y: float, row: float, strip: float) -> None:
        x = self.left + span.start_seconds * self.scale
        width = (span.end_seconds - span.start_seconds) * self.scale
        if width <= 0:
            return
        chunk = span.chunk
        thin = kind_of(span.kind).thin
        style = self.shade_class(span.kind, 0 if thin else chunk)
        # receives below sends, so that both show where they overlap
        half = strip / 2 if span.kind in ("send", "receive") else strip
        top, height = (y + row + (half if span.kind == "receive" else 0), half) if thin else (y, row)
        shown = width - 0.6 if width >= _NARROWEST_GAP else max(width, 0.35)
        title = escape(span_text(lane, span))
        self.elements.append(
            f'<rect class="{style}" x="{_number(x)}" y="{_number(top)}" width="{_number(shown)}" '
            f'height="{_number(height)}"><title>{title}</title></rect>'
        )
        label = str(span.microbatch) if span.microbatch >= 0 else ""
        if thin or not label or kind_of(span.kind).group != "compute":
            return
        size = next((s for s in _LABEL_SIZES if s < row and len(label) * _DIGIT * s + 1.2 <= width), None)
        if size is not None:
            self.elements.append(
                f'<text class="box on-{style}" x="{_number(x + shown / 2)}" y="{_number(top + row / 2 + size * 0.36)}" '
                f'font-size="{_number(size)}">{label}</text>'
            )

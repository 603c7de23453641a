"""A `Drawing`: one or more timelines with their title, as text, SVG, an HTML page or a Chrome trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.plan_text import title as plan_title
from autopar.timeline_html import html
from autopar.timeline_svg import svg
from autopar.timeline_trace import trace_json
from autopar.timeline_view import Lane, lane_text, plan_lane, time_line, time_table
from costmodel.errors import BadArgument

if TYPE_CHECKING:
    from autopar.plan import Plan


@dataclass(frozen=True)
class Drawing:
    """Lanes to look at, on one time scale: predicted, measured, or both."""

    lanes: tuple[Lane, ...]
    title: str = ""
    subtitle: str = ""
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Per lane where the step goes in one line, the rows, and a table of each rank's time."""
        return "\n\n".join(f"{time_line(lane)}\n\n{lane_text(lane)}\n\n{time_table(lane)}" for lane in self.lanes)

    def svg(self) -> str:
        """The text of an SVG file."""
        return svg(self.lanes, title=self.title)

    def html(self) -> str:
        """The text of a self-contained HTML page: hover for what a box is, drag to zoom."""
        texts = [lane_text(lane) for lane in self.lanes]
        return html(self.lanes, title=self.title, subtitle=self.subtitle, notes=self.notes, texts=texts)

    def trace(self) -> str:
        """Chrome trace JSON: ui.perfetto.dev opens it."""
        return trace_json(self.lanes)

    def save_svg(self, path: str | Path) -> None:
        """Write `svg()`. BadArgument if the file cannot be written; so with the others."""
        _write(path, self.svg())

    def save_html(self, path: str | Path) -> None:
        """Write `html()`."""
        _write(path, self.html())

    def save_trace(self, path: str | Path) -> None:
        """Write `trace()`."""
        _write(path, self.trace())


def _write(path: str | Path, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"cannot write {path}", why=error.strerror or str(error)) from error


def plan_drawing(plan: Plan, more: Sequence[Lane] = ()) -> Drawing:
    """What a plan predicts, with further lanes under it."""
    first, second = plan_title(plan)
    return Drawing((plan_lane(plan), *more), first, second, plan.notes)

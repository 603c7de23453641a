"""Timelines drawn: goldens of small ones, every span in every form, colours that anyone can tell apart, times that add up."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.timeline_drawing import Drawing
from autopar.timeline_svg import tick_seconds
from autopar.timeline_view import GROUPS, KINDS, Lane, interval_difference, interval_union, shade, where_time_goes
from costmodel.errors import BadArgument
from passes.order import order
from passes.timeline import Span, simulate

SVG = "{http://www.w3.org/2000/svg}"


def lane(schedule: str = "1f1b", stages: int = 2, microbatches: int = 3, name: str = "predicted") -> Lane:
    lists = order(schedule, stages, microbatches, [(stage, stage + 1) for stage in range(stages - 1)])
    timeline = simulate(lists, forward_seconds=[1e-3] * stages, backward_seconds=[2e-3] * stages, send_seconds=1e-4)
    return Lane(name, timeline.spans, timeline.step_seconds, tuple(range(stages)), tuple(f"h.{k}" for k in range(stages)))


def split_lane() -> Lane:
    """Two ranks with two stages each in a V, the backward in two parts, and something of every other kind."""
    spans = []
    for rank in range(2):
        at = 0.5e-3 * rank
        for chunk in range(2):
            for kind, length in (("forward", 1e-3), ("backward input", 1.1e-3), ("backward weight", 0.8e-3)):
                spans.append(Span(rank, at, at + length, kind, 0, chunk))
                at += length
            spans.append(Span(rank, at - 0.2e-3, at, "collective", 0, chunk))
            spans.append(Span(rank, at, at + 0.1e-3, "send" if rank else "receive", 0, chunk))
            at += 0.3e-3
        spans.append(Span(rank, at, at + 0.2e-3, "overhead", -1))
        spans.append(Span(rank, at + 0.2e-3, at + 0.6e-3, "sum gradients", -1))
    return Lane("measured", tuple(spans), max(span.end_seconds for span in spans), (0, 1, 1, 0))


def test_small_drawings_are_the_goldens(golden):
    drawing = Drawing((lane(), split_lane()), "two lanes <&>", "of a test")
    golden("timeline/two_lanes.svg", drawing.svg())
    golden("timeline/two_lanes.trace.json", drawing.trace())
    golden("timeline/two_lanes.txt", drawing.text() + "\n")


def test_every_form_is_the_same_bytes_twice():
    for form in (Drawing.svg, Drawing.html, Drawing.trace, Drawing.text):
        first, second = (form(Drawing((lane("gpipe", 3, 5), split_lane()), "twice", notes=("a", "b"))) for _ in range(2))
        assert first == second


def test_svg_shows_each_span_once_with_what_it_is():
    shown = lane("1f1b", 4, 6)
    root = ET.fromstring(Drawing((shown,)).svg())
    titles = [title.text for title in root.iter(f"{SVG}title") if title.text and "microbatch" in title.text]
    assert len(titles) == len(shown.spans) == 2 * 4 * 6 + 4 * 3 * 6
    assert "forward of microbatch 5\nstage 3, rank 3\n" in "".join(titles)
    assert len(set(titles)) == len(titles)
    boxes = [box for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    width = float(root.get("width", 0))
    for box in boxes:
        assert float(box.get("x", -1)) >= 0 and float(box.get("x", 0)) + float(box.get("width", 0)) <= width


def test_eight_stages_of_32_microbatches_have_every_box_labelled():
    root = ET.fromstring(Drawing((lane("1f1b", 8, 32),)).svg())
    labels = [text.text for text in root.iter(f"{SVG}text") if "box" in (text.get("class") or "")]
    assert len(labels) == 8 * 32 * 2 and set(labels) == {str(number) for number in range(32)}


def test_many_ranks_and_boxes_too_narrow_for_a_label():
    root = ET.fromstring(Drawing((lane("gpipe", 32, 4),)).svg())
    assert float(root.get("height", 0)) < 32 * 30
    root = ET.fromstring(Drawing((lane("gpipe", 2, 1000),)).svg())
    assert not [text for text in root.iter(f"{SVG}text") if "box" in (text.get("class") or "")]


def page_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_from_elsewhere_and_holds_every_span():
    lanes = (dataclasses.replace(lane("gpipe", 3, 4), row_notes=("</script>",) * 3), split_lane())
    page = Drawing(lanes, "</script><b>", notes=("stage 1 begins at <x>",)).html()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", page)
    assert "<b>" not in page.split("<script")[0] and "&lt;x&gt;" in page
    assert "<!--" not in page, "a part of the page was not filled in"
    data = page_data(page)
    kinds = [kind for kind, _, _ in data["kinds"]]
    for shown, drawn in zip(lanes, data["lanes"], strict=True):
        found = {
            (rank, kinds[kind], microbatch, stage, start, length)
            for rank, row in enumerate(drawn["rows"])
            for start, length, kind, microbatch, stage, _ in row["spans"]
        }
        assert found == {
            (
                span.rank, span.kind, span.microbatch, shown.stage_of(span), round(span.start_seconds * 1e6, 3),
                round((span.end_seconds - span.start_seconds) * 1e6, 3),
            )
            for span in shown.spans
        }  # fmt: skip
        assert drawn["step"] == pytest.approx(shown.step_seconds * 1e6)


def test_a_trace_has_rows_without_overlap_and_arrows_from_box_to_box():
    both = split_lane()
    at_once = tuple(Span(0, k * 1e-4, 2e-3 + k * 1e-4, "send", k) for k in range(3))
    both = dataclasses.replace(both, spans=(*both.spans, *at_once))
    events = json.loads(Drawing((lane("1f1b", 3, 4), both)).trace())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(lane("1f1b", 3, 4).spans) + len(both.spans)
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in spans:
        rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for row in rows.values():
        assert all(left[1] <= right[0] + 1e-3 for left, right in pairwise(sorted(row)))
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == set(rows)
    arrows: dict[int, list[dict]] = {}
    for event in events:
        if event["ph"] in "sf":
            arrows.setdefault(event["id"], []).append(event)
    # per microbatch two activations and two gradients; in the V: 0 to 1 and 2 to 3, stages 1 and 2 are on one rank
    assert len(arrows) == 4 * 4 + 2 * 2
    for start, finish in arrows.values():
        assert (start["ph"], finish["ph"]) == ("s", "f")
        assert start["tid"] != finish["tid"]
        for end in (start, finish):
            assert any(first <= end["ts"] <= last for first, last in rows[end["pid"], end["tid"]])


def test_times_of_a_known_lane():
    spans = (
        Span(0, 0.0, 4.0, "forward", 0), Span(0, 1.0, 2.0, "collective", 0), Span(0, 3.0, 6.0, "send", 0),
        Span(0, 7.0, 8.0, "overhead", -1), Span(1, 6.0, 9.0, "backward", 0),
    )  # fmt: skip
    first, second = where_time_goes(Lane("x", spans, 10.0, (0, 1)))
    assert (first.compute, first.collectives, first.transfers, first.overhead, first.bubble) == (3, 1, 2, 1, 3)
    assert (second.compute, second.transfers, second.bubble) == (3, 0, 7)
    (hidden,) = where_time_goes(Lane("x", spans[:1], 10.0, (0,), collective_seconds=(1.5,)))
    assert (hidden.compute, hidden.collectives, hidden.bubble) == (2.5, 1.5, 6)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.integers(0, 50), st.sampled_from([*KINDS, "new kind"])), max_size=12)
)
def test_a_ranks_times_add_up_to_the_step(found):
    spans = tuple(Span(rank, min(a, b), max(a, b), kind, 0) for rank, a, b, kind in found)
    for time in where_time_goes(Lane("x", spans, 50.0, (0, 1))):
        assert time.step == pytest.approx(50.0)
        assert all(getattr(time, group) >= 0 for group in GROUPS)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8),
)
def test_intervals_are_as_sets_of_points(left, right):
    one, other = (interval_union((min(p), max(p)) for p in pairs if p[0] != p[1]) for pairs in (left, right))
    gaps = interval_difference(one, other)
    for point in range(60):
        inside = [any(start <= point / 2 + 0.25 < end for start, end in found) for found in (one, other, gaps)]
        assert inside[2] == (inside[0] and not inside[1])


def _channels(colour: str) -> list[float]:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return [((part + 0.055) / 1.055) ** 2.4 if part > 0.04045 else part / 12.92 for part in parts]


def _luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), _channels(colour), strict=True))


def test_the_text_in_a_box_can_be_read():
    """Web Content Accessibility Guidelines 2.1, level AA: a contrast of at least 4.5."""
    for kind in [*KINDS, "a new kind"]:
        for chunk in range(6):
            darker, lighter = sorted(map(_luminance, shade(kind, chunk)))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (kind, chunk)


# Linear RGB as seen without red, green or blue cones: Machado, Oliveira and Fernandes 2009, severity 1.
_VISION = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def _lab(linear: list[float]) -> list[float]:
    """CIE L*a*b* of linear sRGB, D65."""
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) / w for row, w in zip(matrix, white, strict=True)]
    f = [value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in xyz]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


@pytest.mark.parametrize("vision", _VISION)
def test_the_computations_colours_can_be_told_apart(vision):
    """In CIE76 units, of which 2.3 is just noticeable."""
    seen = {
        kind.name: _lab([sum(m * c for m, c in zip(row, _channels(kind.colour), strict=True)) for row in _VISION[vision]])
        for kind in KINDS.values()
        if kind.name in ("forward", "backward", "backward input", "backward weight")
    }
    for one in seen:
        for other in seen:
            if one < other:
                apart = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
                assert apart > 20, (one, other, apart)


def test_ticks_are_round():
    assert [tick_seconds(length, 10) for length in (0.01, 0.012, 0.034, 0.9)] == pytest.approx([0.001, 0.002, 0.005, 0.1])


def test_empty_timelines_draw():
    drawing = Drawing((Lane("predicted", (), 0.0, (0,)),))
    assert ET.fromstring(drawing.svg()) is not None
    assert page_data(drawing.html())["lanes"][0]["rows"][0]["spans"] == []
    assert json.loads(drawing.trace())


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(BadArgument, match="cannot write"):
        Drawing((lane(),)).save_svg(tmp_path / "no" / "such.svg")

"""A search as text: the table of the best plans, and why the others lost, from the terms of their predictions.

For every decision there is the best layout with each other value. The difference of its step from the winner's is split into terms;
the largest decides the sentence. Nothing is said that is not a difference of two predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from autopar.plan_text import bytes_text, count_text, seconds_text
from autopar.predict import Layout, LayoutPrediction
from autopar.search import DECISIONS, Plans
from costmodel.machine import basis_text

_LABELS = {
    "zero": "ZeRO", "sequence_parallel": "sequence parallel", "virtual_stages": "stages a rank", "microbatch_rows": "rows a microbatch",
}  # fmt: skip
_SHOWN = 3  # values of one decision, the nearest in time first


def layout_text(layout: Layout) -> str:
    """A layout in words: `tp=8 pp=4 dp=2, 1f1b, 16 x 1 rows, recompute full, ZeRO 1`."""
    parts = [f"tp={layout.tp}{' sequence-parallel' if layout.sequence_parallel else ''} pp={layout.pp} dp={layout.dp}"]
    if layout.pp > 1:
        parts.append(layout.schedule + (f" of {layout.virtual_stages} stages a rank" if layout.virtual_stages > 1 else ""))
    parts.append(f"{layout.microbatches} x {layout.microbatch_rows} rows")
    parts.append(f"recompute {layout.recompute}")
    if layout.dp > 1:
        parts.append(f"ZeRO {layout.zero}")
    return ", ".join(parts)


def terms(found: LayoutPrediction) -> dict[str, float]:
    """The seconds of a step by what they are spent on; they add up to the step."""
    exposed = found.exposed_seconds
    waits = {
        "tensor-parallel traffic": exposed.get("tp", 0.0),
        "context-parallel traffic": exposed.get("cp", 0.0),
        "data-parallel traffic": exposed.get("dp", 0.0),
        "pipeline idle and sends": exposed.get("pp", 0.0),
        "computing again": found.recompute_seconds,
        "the optimizer": found.optimizer_seconds,
    }
    return {"compute": max(found.step_seconds - sum(waits.values()), 0.0), **waits}


_AXES = {"tensor-parallel traffic": "tp", "context-parallel traffic": "cp", "data-parallel traffic": "dp"}


def why_slower(best: LayoutPrediction, other: LayoutPrediction, plans: Plans) -> str:
    """Why a layout lost to the best one: it does not fit, or the term that grew most."""
    if not other.fits:
        return f"needs {bytes_text(other.peak_bytes)} of the device's {bytes_text(other.memory_bytes)}"
    rows = other.layout.global_rows / best.layout.global_rows
    mine, theirs = terms(best), {name: value / rows for name, value in terms(other).items()}
    slower = other.step_seconds / rows - best.step_seconds
    if slower <= 1e-4 * best.step_seconds:
        return "as fast"
    grown = max(theirs, key=lambda name: theirs[name] - mine[name])
    before, after = mine[grown], theirs[grown]
    ratio = f"{after / before:.2g}x: " if before > 1e-3 * best.step_seconds and after > 1.05 * before else ""
    text = f"+{slower / best.step_seconds:.1%}: {grown} takes {ratio}{seconds_text(after)} instead of {seconds_text(before)}"
    axis = _AXES.get(grown)
    if axis is not None:
        now = plans.hardware.axis_link(getattr(other.layout, axis), other.layout.stride(axis)).num_nodes
        was = plans.hardware.axis_link(getattr(best.layout, axis), best.layout.stride(axis)).num_nodes
        if now > 1 and was == 1:
            text += f" ({axis}={getattr(other.layout, axis)} crosses nodes)"
    return text


def value_text(name: str, value: Any) -> str:
    """A value of a decision in words."""
    shown = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    return f"{_LABELS[name]} {shown}" if name in _LABELS else f"{name}={shown}"


def reasons(plans: Plans) -> list[tuple[str, str, LayoutPrediction]]:
    """(decision and value, why it lost, the best layout with it) for the values that the best plan does not have."""
    best = plans.predictions[0]
    found = []
    for name in DECISIONS:
        own = getattr(best.layout, name)
        others = [(value, other) for value, other in plans.decisions.get(name, {}).items() if value != own]
        others.sort(key=lambda item: (not item[1].fits, item[1].step_seconds))
        found += [(value_text(name, value), why_slower(best, other, plans), other) for value, other in others[:_SHOWN]]
    return found


def rows(plans: Plans) -> list[dict[str, Any]]:
    """The table as numbers."""
    return [
        {
            "rank": index + 1,
            **{name: getattr(found.layout, name) for name in (*DECISIONS, "microbatches", "precision")},
            "step_seconds": found.step_seconds,
            "tokens_per_second": found.tokens_per_second,
            "tflops_per_gpu": found.tflops_per_gpu,
            "mfu": found.mfu,
            "peak_bytes": found.peak_bytes,
            "memory_bytes": found.memory_bytes,
            "bubble_fraction": found.bubble_fraction,
            "communication_seconds": dict(found.communication_seconds),
            "exposed_seconds": dict(found.exposed_seconds),
            "memory": asdict(found.memory),
            "basis": found.basis,
            "uncertainty": found.uncertainty,
        }
        for index, found in enumerate(plans.predictions)
    ]


def to_json(plans: Plans) -> dict[str, Any]:
    """A search for machines: the plans, why others lost, and the Pareto front."""
    return {
        "model": plans.model,
        "gpus": plans.space.gpus,
        "hardware": plans.hardware.name,
        "evaluated": plans.evaluated,
        "fitting": plans.fitting,
        "seconds": plans.seconds,
        "plans": rows(plans),
        "lost": [{"decision": what, "why": why, "layout": _plain(other.layout)} for what, why, other in reasons(plans)],
        "pareto": [
            {"step_seconds": each.step_seconds, "peak_bytes": each.peak_bytes, "layout": _plain(each.layout)} for each in plans.front
        ],
    }


def _plain(layout: Layout) -> Mapping[str, Any]:
    return {name: getattr(layout, name) for name in (*DECISIONS, "microbatches", "precision")}


HEADERS = (
    "", "tp", "pp", "dp", "schedule", "microbatches", "recompute", "ZeRO", "step", "tokens/s", "TFLOP/s", "MFU", "memory", "bubble", "comm",
)  # fmt: skip


def cells(plans: Plans) -> list[tuple[str, ...]]:
    """The table as text."""
    shown: list[tuple[str, ...]] = []
    for index, found in enumerate(plans.predictions):
        layout = found.layout
        waits = sum(found.exposed_seconds.get(axis, 0.0) for axis in ("tp", "cp", "dp"))
        shown.append(
            (
                str(index + 1),
                f"{layout.tp}{' sp' if layout.sequence_parallel else ''}",
                f"{layout.pp}{f' x {layout.virtual_stages}' if layout.virtual_stages > 1 else ''}",
                str(layout.dp),
                layout.schedule if layout.pp > 1 else "-",
                f"{layout.microbatches} x {layout.microbatch_rows}",
                layout.recompute,
                str(layout.zero) if layout.dp > 1 else "-",
                seconds_text(found.step_seconds),
                count_text(float(f"{found.tokens_per_second:.3g}")),
                f"{found.tflops_per_gpu:.3g}",
                f"{found.mfu:.1%}",
                bytes_text(found.peak_bytes),
                f"{found.bubble_fraction:.0%}",
                f"{waits / found.step_seconds:.0%}",
            )
        )
    return shown


def heading(plans: Plans) -> list[str]:
    """What was searched, and on what the figures rest."""
    best = plans.predictions[0]
    sure = " of the step time" if best.uncertainty else "; uncertainty of the step time not known"
    batch = f"{best.layout.global_rows} rows a step" if plans.space.global_batch else f"{plans.space.replica_rows} rows a replica"
    return [
        f"{plans.model}: {count_text(plans.evaluator.facts.parameters)} parameters on {plans.space.gpus} x {plans.hardware.name}, {batch}, "
        f"{plans.space.precision}",
        f"{plans.evaluated} layouts priced in {plans.seconds:.1f} s, {plans.fitting} fit in "
        f"{bytes_text(plans.hardware.memory_bytes)} a device; "
        f"{basis_text(best.basis, best.uncertainty)}{sure}",
    ]


def search_text(plans: Plans) -> str:
    """What `print(plans)` shows."""
    align = ["right", *["left"] * 7, *["right"] * 7]
    table = tabulate(cells(plans), headers=HEADERS, colalign=align, disable_numparse=True)
    lines = [*heading(plans), "", *(line.rstrip() for line in table.splitlines()), ""]
    lines.append("comm: share of the step that waits for tensor-, context- and data-parallel traffic; memory and rates of one device")
    best = plans.predictions[0]
    losers = [f"- {index + 2}: {why_slower(best, other, plans)}" for index, other in enumerate(plans.predictions[1:])]
    lines += ["", "WHY THE RUNNERS-UP LOST", *losers] if losers else []
    others = [f"- {what}: {why}  [{layout_text(other.layout)}]" for what, why, other in reasons(plans)]
    lines += ["", "OTHER DECISIONS  (the best layout with each)", *others] if others else []
    return "\n".join(lines) + "\n"

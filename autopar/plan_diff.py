"""What differs between two plans, and what it does to time and memory."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tabulate import tabulate

from autopar.plan_text import bytes_text, mesh_text, seconds_text, stage_layers, title
from autopar.weight_rows import fold_names, name_pattern

if TYPE_CHECKING:
    from autopar.plan import Plan


def diff_text(before: Plan, after: Plan) -> str:
    """A table of the decisions and predictions that are not the same; `the same plan` if there are none."""
    if before.identity == after.identity:
        return "the same plan\n"
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, one: str, other: str, change: str = "") -> None:
        if one != other:
            rows.append((what, one, other, change))

    a, b = before.predicted, after.predicted
    add("model", before.model, after.model)
    add("mesh", mesh_text(before), mesh_text(after))
    add("batch", _sizes(before), _sizes(after))
    add("microbatches", str(before.microbatches), str(after.microbatches))
    add("schedule", before.schedule, after.schedule)
    add("precision", before.precision, after.precision)
    add("hardware", before.hardware, after.hardware)
    add(
        "seconds a step",
        seconds_text(a.step_seconds),
        seconds_text(b.step_seconds),
        _change(a.step_seconds, b.step_seconds),
    )
    add("bubble", f"{a.bubble_fraction:.1%}", f"{b.bubble_fraction:.1%}")
    add(
        "communication",
        seconds_text(a.communication_seconds),
        seconds_text(b.communication_seconds),
        _change(a.communication_seconds, b.communication_seconds),
    )
    add("peak memory a rank", bytes_text(a.peak_bytes), bytes_text(b.peak_bytes), _change(a.peak_bytes, b.peak_bytes))
    for index in range(max(len(before.stages), len(after.stages))):
        one, other = (
            stage_layers(plan.stages[index]) if index < len(plan.stages) else "none" for plan in (before, after)
        )
        add(f"stage {index}", one, other)
    changed: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in {**before.parameter_notation, **after.parameter_notation}:
        texts = tuple(plan.parameter_notation.get(name, "none") for plan in (before, after))
        if texts[0] != texts[1]:
            changed[name_pattern(name), texts[0], texts[1]].append(name)
    for (_, one, other), names in changed.items():
        for folded, _count in fold_names(names):
            add(folded, one, other)
    lines = [f"- {title(before)[0]}", f"+ {title(after)[0]}", ""]
    table = tabulate(rows, headers=("", before.identity, after.identity, "change"), disable_numparse=True)
    return "\n".join([*lines, *(line.rstrip() for line in table.splitlines())]) + "\n"


def _sizes(plan: Plan) -> str:
    return ", ".join(f"{name} = {value}" for name, value in plan.sizes.items()) or "fixed"


def _change(one: float, other: float) -> str:
    return f"{(other / one - 1) * 100:+.1f}%" if one else ""

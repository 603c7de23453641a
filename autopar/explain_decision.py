"""Why a search decided as it did: the best layout with each value of one decision beside the chosen one, term by term.

A value is not judged alone: degrees multiply to the devices, and what else is best changes with it. So a row is the fastest layout of the
whole space that has this value (or, where none fits, the one that comes nearest); the row below it, marked "only", is the chosen layout
with this one decision changed and what must follow from it: dp for tp and pp, pp for dp, and the number of microbatches. Figures are
the predictions that the search went by, with schedules played.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from autopar.plan_text import bytes_text, seconds_text
from autopar.predict import Layout, LayoutPrediction
from autopar.search import DECISIONS, Plans, best_with, exactly
from autopar.search_text import layout_text, terms, value_text, why_slower
from costmodel.errors import AutoparError, BadArgument
from costmodel.machine import basis_text
from passes.layout import RECOMPUTES
from passes.reshard import Reshard, collective_seconds
from passes.schedules import SCHEDULES

_ALIASES = {"sp": "sequence_parallel", "microbatch": "microbatch_rows", "rows": "microbatch_rows"}
_COLUMNS = {
    "compute": "compute", "tensor-parallel traffic": "tp", "data-parallel traffic": "dp", "pipeline idle and sends": "pp",
    "computing again": "again", "the optimizer": "optimizer",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One value of the decision: its best layout (None: there is none), and the chosen layout with only this changed."""

    value: Any
    found: LayoutPrediction | None
    only: LayoutPrediction | None
    why: str


@dataclass(frozen=True)
class DecisionExplanation:
    """A decision and its values, the chosen one first, then the fastest. Prints as a table and a sentence for each."""

    name: str
    plans: Plans
    best: LayoutPrediction
    choices: tuple[Choice, ...]

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        shown: list[tuple[str, Any, LayoutPrediction | None, str]] = [("chosen", getattr(self.best.layout, self.name), self.best, "")]
        for choice in self.choices:
            shown += [("best", choice.value, choice.found, choice.why), ("only", choice.value, choice.only, "")]
        return {
            "decision": self.name, "basis": self.best.basis, "uncertainty": self.best.uncertainty,
            "choices": [
                {
                    "kind": kind, "value": value, "why": why, "layout": layout_text(found.layout), "step_seconds": found.step_seconds,
                    "terms": terms(found), "peak_bytes": found.peak_bytes, "fits": found.fits, "margin_bytes": found.margin_bytes,
                }
                if found is not None else {"kind": kind, "value": value, "why": why}
                for kind, value, found, why in shown
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        plans, best = self.plans, self.best
        rows = [_row("*", value_text(self.name, getattr(best.layout, self.name)), best, best)]
        lines = []
        for choice in self.choices:
            label = value_text(self.name, choice.value)
            if choice.found is not None:
                rows.append(_row("", label, choice.found, best))
            if choice.only is not None and (choice.found is None or choice.only.layout != choice.found.layout):
                rows.append(_row("", f"only {label}", choice.only, best))
            lines.append(f"- {label}: {choice.why}")
        headers = ("", "decision", "step", "more", *_COLUMNS.values(), "memory", "layout")
        align = ("left", "left", *("right",) * (len(_COLUMNS) + 3), "left")
        table = tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
        title = (
            f"{self.name} of {plans.model} on {plans.space.gpus} x {plans.hardware.name}: {bytes_text(best.memory_bytes)} a device; "
            f"{basis_text(best.basis, best.uncertainty)} of the step time"
        )
        return "\n".join([title, "", *(line.rstrip() for line in table.splitlines()), "", *lines])


LEGEND = (
    "Each row is the fastest layout that has this value; * is the search's. 'only': the chosen layout with just this changed.\n"
    "step = compute + waits for tp, dp and pp + computing again + optimizer; memory: of the fullest rank; ! where it does not fit."
)


def _row(mark: str, label: str, found: LayoutPrediction, best: LayoutPrediction) -> tuple[str, ...]:
    rows = found.layout.global_rows / best.layout.global_rows
    parts = terms(found)
    more = "" if found is best else f"{found.step_seconds / rows / best.step_seconds - 1:+.1%}"
    return (
        mark, label, seconds_text(found.step_seconds), more, *(seconds_text(parts[term]) if parts[term] else "-" for term in _COLUMNS),
        bytes_text(found.peak_bytes) + ("" if found.fits else " !"), layout_text(found.layout),
    )  # fmt: skip


def decision_of(asked: str) -> str | None:
    """The decision that "tp" or "tp=16" names; None if it is none."""
    name = asked.partition("=")[0].replace("-", "_")
    name = _ALIASES.get(name, name)
    return name if name in DECISIONS else None


def explain_decision(plans: Plans, asked: str) -> DecisionExplanation:
    """The values of one decision of a search: `asked` is a name of DECISIONS ("tp") or one value of it ("tp=16").

    BadArgument for another name, or a value that cannot be.
    """
    _, equals, text = asked.partition("=")
    name = decision_of(asked)
    if name is None:
        raise BadArgument(f"{asked!r} is no decision of a search", use=", ".join(DECISIONS) + ", or one value, such as tp=16")
    best = plans.predictions[0]
    chosen = getattr(best.layout, name)
    values = [_value(name, text)] if equals else [value for value in plans.decisions[name] if value != chosen]
    found = [_choice(plans, best, name, value) for value in values if value != chosen]
    found.sort(key=lambda c: (c.found is None, c.found is not None and not c.found.fits, _seconds_a_row(c.found)))
    return DecisionExplanation(name, plans, best, tuple(found))


def _seconds_a_row(found: LayoutPrediction | None) -> float:
    return found.step_seconds / found.layout.global_rows if found is not None else 0.0


def _value(name: str, text: str) -> Any:
    words: dict[str, Sequence[str]] = {"schedule": tuple(SCHEDULES), "recompute": RECOMPUTES}
    if name in words:
        if text not in words[name]:
            raise BadArgument(f"{name}={text} is no choice", use=", ".join(words[name]))
        return text
    if name == "sequence_parallel":
        if text not in ("on", "off", "True", "False"):
            raise BadArgument(f"{name}={text} is no choice", use="on or off")
        return text in ("on", "True")
    if not text.isdigit() or (int(text) < 1 and name != "zero"):
        raise BadArgument(f"{name}={text} is no choice", use="an integer")
    return int(text)


def _choice(plans: Plans, best: LayoutPrediction, name: str, value: Any) -> Choice:
    found, only = best_with(plans, name, value), _only(plans, best, name, value)
    if found is None:
        return Choice(value, None, only, _impossible(plans, name, value))
    why = why_slower(best, found, plans)
    if not found.fits:
        why = f"fits in no layout: the nearest {why}, {bytes_text(-found.margin_bytes)} too much"
    if name == "tp" and (note := _collective_note(plans, best.layout, found.layout)):
        why += f"; {note}"
    if only is not None and only.layout != found.layout:
        why += f". Only this changed: {why_slower(best, only, plans)}"
    return Choice(value, found, only, why)


def _impossible(plans: Plans, name: str, value: Any) -> str:
    facts, gpus = plans.evaluator.facts, plans.space.gpus
    if name in ("tp", "pp", "dp") and gpus % value:
        return f"cannot be: it does not divide {gpus} GPUs"
    if name == "pp" and value > facts.num_blocks:
        return f"cannot be: the model has {facts.num_blocks} blocks to cut between"
    return "cannot be, with this model, these devices and what else was decided"


def _only(plans: Plans, best: LayoutPrediction, name: str, value: Any) -> LayoutPrediction | None:
    """The chosen layout with one decision changed, and what has to follow."""
    layout, changed = best.layout, {name: value}
    follows = {"tp": "dp", "pp": "dp", "dp": "pp"}.get(name)
    if follows is not None:
        product = getattr(layout, name) * getattr(layout, follows)
        if product % value:
            return None
        changed[follows] = product // value
    if name == "schedule":
        row = SCHEDULES[value]
        if row.virtual_stages is None or layout.virtual_stages not in row.virtual_stages:
            changed["virtual_stages"] = row.default_virtual_stages
    replicas, rows = changed.get("dp", layout.dp), changed.get("microbatch_rows", layout.microbatch_rows)
    parts = replicas * rows if plans.space.global_batch is not None else layout.dp * rows
    if layout.global_rows % parts:
        return None
    changed["microbatches"] = layout.global_rows // parts
    try:
        return exactly(plans.evaluator, plans.evaluator.predict(replace(layout, **changed)))
    except AutoparError:
        return None


def _collective_note(plans: Plans, best: Layout, other: Layout) -> str:
    """What the longest tensor-parallel collective of the chosen layout takes on the links of the other one."""
    if best.tp == 1 or other.tp == 1:
        return ""
    pricing, longest = plans.evaluator.pricing(best.microbatch_rows, best.precision), (0.0, "", 0)
    links = [plans.hardware.axis_link(layout.tp, layout.stride("tp")) for layout in (best, other)]
    for call in plans.evaluator.graph(best.tp, best.sequence_parallel).line:
        row, kind = call.node.meta.get("reshard"), call.node.meta.get("tensor")
        if isinstance(row, Reshard) and kind is not None:
            for name in filter(None, (row.forward, row.backward)):
                num_bytes = pricing.num_bytes(kind)
                longest = max(longest, (collective_seconds(name, num_bytes=num_bytes, axis_size=best.tp, link=links[0]), name, num_bytes))
    before, name, num_bytes = longest
    if not before:
        return ""
    after = collective_seconds(name, num_bytes=num_bytes, axis_size=other.tp, link=links[1])
    places = [f"{link.num_nodes} nodes" if link.num_nodes > 1 else "one node" for link in links]
    ratio = f"{after / before:.2g}x slower" if after > before else f"{before / after:.2g}x faster"
    return (
        f"{name} of {bytes_text(num_bytes)} is {ratio}: {seconds_text(after)} over {other.tp} ranks on {places[1]}, "
        f"{seconds_text(before)} over {best.tp} on {places[0]}"
    )

"""Folded graphs as JSON: what a cache of traces holds, small whatever the depth of the model. Names and numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passes.fold import Folded, FoldedUnit
from passes.serialize import graph_from_json, graph_to_json


def folded_to_json(folded: Folded) -> dict[str, Any]:
    """A folded graph as JSON values."""
    plain = [
        {key: value for key, value in node.meta.items() if isinstance(value, (bool, int, str)) and key not in ("size", "owner")}
        for node in folded.module.graph.nodes
    ]
    return {
        "graph": graph_to_json(folded.module.graph), "meta": plain, "units": [[unit.count, unit.run] for unit in folded.units],
        "copies": dict(folded.copies),
    }  # fmt: skip


def folded_from_json(values: Mapping[str, Any]) -> Folded:
    """What `folded_to_json` gave, read back. BadPlan if the records are no graph."""
    module = graph_from_json(values["graph"], {})
    for node, meta in zip(module.graph.nodes, values["meta"], strict=True):
        node.meta |= meta
    return Folded(module, tuple(FoldedUnit(count, run) for count, run in values["units"]), dict(values["copies"]))

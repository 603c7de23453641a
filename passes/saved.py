"""What autograd keeps for backward, from formulas: storages of a localized graph, as `passes.recompute.Saves` counts them.

`autopar.measure_memory.saves` finds the same by running an emitted stage without values; this needs no program and takes milliseconds, so
it serves searches over layouts. A storage is what a call makes; a view lies in its source's. Which inputs and results an op keeps is its
row in `costmodel.ops`. Parameters and the model's inputs have no storage here: they are there anyway;
a product keeps its weight where that was computed.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping

from torch import fx

from costmodel.ops import is_view, op_saves
from passes.call_cost import result_sharding
from passes.costs import Pricing, op_name
from passes.ir import calls, is_state, is_trainable, output_types, tensor_inputs, tensor_type
from passes.localize import sharding
from passes.placement import local_type
from passes.recompute import Saves
from passes.rules import CONTRACTIONS
from passes.values import Value, value_of

_CONTRACTIONS = frozenset(row.op for row in CONTRACTIONS)
_ALIASES = frozenset({"copy_to", "own_gradient"})  # reshards whose result is their argument


def formula_saves(
    graph: fx.Graph, pricing: Pricing, axis_sizes: Mapping[str, int], held: Collection[fx.Node] = ()
) -> Saves:
    """The storages of a localized graph at the sizes of `pricing`. A call with several results goes by its first piece's name. `held`:
    casts that are there as parameters are.
    """
    storage: dict[Value, int] = {}
    num_bytes: dict[int, int] = {}
    by_name: dict[str, int] = {}
    made: dict[str, frozenset[int]] = {}
    saved: dict[str, frozenset[int]] = {}

    def new(size: float) -> int:
        num_bytes[len(num_bytes)] = int(size)
        return len(num_bytes) - 1

    for node in calls(graph):
        kinds = () if node in held else output_types(node)
        if node.target is operator.getitem:
            if value_of(node) in storage:
                by_name[node.name] = storage[value_of(node)]
            continue
        if not kinds:
            continue
        sources = tensor_inputs(node)
        shapes = []
        for source in sources:
            kind = tensor_type(source)
            assert kind is not None
            shapes.append(pricing.shape(local_type(kind, sharding(source), axis_sizes)))
        results = [
            pricing.shape(local_type(kind, result_sharding(node, index), axis_sizes)) for index, kind in enumerate(kinds)
        ]
        is_reshard = bool(node.meta.get("reshard"))
        name = node.target.__name__ if is_reshard else op_name(node.target)  # type: ignore[union-attr]
        view = name in _ALIASES if is_reshard else is_view(name)
        before = len(num_bytes)
        for index, shape in enumerate(results):
            viewed = value_of(sources[0]) if view and sources else None
            if viewed is not None and (viewed in storage or is_state(viewed[0]) or viewed[0].op == "placeholder"):
                if viewed in storage:
                    storage[node, index] = storage[viewed]
            else:
                storage[node, index] = new(shape.num_bytes)
        if tensor_type(node) is not None and (node, 0) in storage:
            by_name[node.name] = storage[node, 0]
        own: set[int] = set(range(before, len(num_bytes)))
        kept: set[int] = set()
        if is_trainable(node) and not is_reshard:
            found = op_saves(name, shapes, results, tuple(map(is_trainable, sources)), _is_causal(node, name))
            kept |= {storage[value_of(sources[k])] for k in found.inputs if value_of(sources[k]) in storage}
            kept |= {storage[node, k] for k in found.outputs if (node, k) in storage}
            if node.target in _CONTRACTIONS and is_trainable(sources[0]) and len(sources) > 1 and value_of(sources[1]) in storage:
                kept.add(storage[value_of(sources[1])])  # a weight that was computed: cast by autocast
            if found.extra_bytes:
                extra = new(float(found.extra_bytes))
                own.add(extra)
                kept.add(extra)
        key = _key(node)
        made[key], saved[key] = frozenset(own), frozenset(kept)
    return Saves(num_bytes, by_name, made, saved)


def _is_causal(node: fx.Node, name: str) -> bool:
    return "scaled_dot_product_attention" in name and len(node.args) > 5 and bool(node.args[5])


def _key(node: fx.Node) -> str:
    """The name that `passes.recompute.line_of` looks a call up by."""
    if tensor_type(node) is not None:
        return node.name
    pieces = [user for user in node.users if user.target is operator.getitem]
    return min(pieces, key=lambda piece: piece.args[1]).name if pieces else node.name  # type: ignore[arg-type, return-value]

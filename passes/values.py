"""Values of a graph: the tensors that calls yield and use, and which of them depend on parameters or on random numbers."""

from __future__ import annotations

import operator

from torch import fx

from passes.ir import is_state, output_types

Value = tuple[fx.Node, int]  # a tensor: the node that yields it and which of its results it is


def value_of(node: fx.Node) -> Value:
    """The value a tensor node stands for: getitem is another name for its source's result."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        return source, index
    return node, 0


def is_call(node: fx.Node) -> bool:
    """True for a call that yields tensors (not a size, not a getitem)."""
    return node.op == "call_function" and node.target is not operator.getitem and bool(output_types(node))


def depends_on_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed from parameters. The others (masks, positions, labels) are cheap, are kept whole and recomputed anywhere."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (is_state(node) and node.meta.get("kind") == "parameter") or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def computed_once(graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed from parameters or from random numbers: one stage computes them. Drawing twice would give two values."""
    found = depends_on_parameters(graph)
    for node in graph.nodes:
        if node.meta.get("random") or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found

"""Casts of parameters that are made once a step: which of a stage's casts, and what a parameter's gradient then comes through.

A mixed precision casts each weight to the low dtype where it is used, as autocast does (`passes.canonical_import`). A parameter changes
only between steps, so the cast of it is the same for all microbatches of one: a *held* cast (`held` in the node's meta, a decision of
the plan) is made before the first and kept to the last, as a parameter is. What autograd keeps of it for a microbatch then costs nothing.

Gradients are added up as without that. A microbatch's gradient of the cast, in the low dtype, is cast to the parameter's and added to its
`.grad` in that. Where the cast is the parameter's only use on the stage (`is_leaf`), the copy takes the parameter's place as a leaf of
the graph. Where the parameter has other uses, autograd adds all of theirs up, in its own order, before it touches `.grad`: there the cast
stays a step of the graph, for its gradient alone.

Only casts of the parameter itself are held, and of each parameter those to one dtype; a cast of anything computed from it, a view
included, is made anew. One dtype a parameter, since a copy for each would take its memory for ever fewer uses.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.ir import DTYPE_NAMES, calls, is_state, tensor_type

aten = torch.ops.aten


def cast_parameter(node: fx.Node) -> fx.Node | None:
    """The parameter that this call casts to another floating dtype, and does nothing else to; None for any other node."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_state(source) or source.meta.get("kind") != "parameter":
        return None
    have, given = tensor_type(source), tensor_type(node)
    if have is None or given is None or not (have.dtype.is_floating_point and given.dtype.is_floating_point):
        return None
    return source


def casts_to_hold(graph: fx.Graph) -> frozenset[fx.Node]:
    """The casts of a stage that can be made once a step."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in calls(graph):
        if (source := cast_parameter(node)) is not None:
            found.setdefault(source, []).append(node)
    return frozenset(node for nodes in found.values() for node in nodes if node.args[1] == nodes[0].args[1])


def is_held(node: fx.Node) -> bool:
    """True for a cast that the plan makes once a step."""
    return bool(node.meta.get("held"))


def is_leaf(node: fx.Node) -> bool:
    """True for a value of a stage that gradients end at: a parameter, or the held cast of one that has no other use there."""
    if is_held(node):
        source = node.args[0]
        return isinstance(source, fx.Node) and len(source.users) == 1
    return is_state(node) and node.meta.get("kind") == "parameter"


def leaf_parameter(node: fx.Node) -> fx.Node:
    """The parameter that gets the gradient of a leaf."""
    return node.args[0] if is_held(node) else node  # type: ignore[return-value]


def held_casts(graph: fx.Graph) -> dict[str, str]:
    """The parameters of a stage that are cast once a step, and to what: {"h.0.up.weight": "bf16"}."""
    return {str(node.args[0].target): DTYPE_NAMES[node.args[1]] for node in calls(graph) if is_held(node)}  # type: ignore

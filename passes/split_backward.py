"""Which matmuls of a stage can put off their weight gradients, for schedules with BackwardInput and BackwardWeight.

A weight gradient is put off at the op that makes it, so it must be the whole of the parameter's gradient on the stage, or
one of several that are all put off: autograd adds up what comes from all uses before it touches `.grad`, and a part that
came early would be added in another order. A linear whose weight is also an embedding on the same stage therefore stays as
it is; on two stages it need not.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.ir import is_state, is_trainable

aten = torch.ops.aten

# op -> (place of x, of the weight, of the bias or None)
PLACES = {aten.linear.default: (0, 1, 2), aten.mm.default: (0, 1, None), aten.addmm.default: (1, 2, 0)}


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(x, weight, bias) of a matmul that is in PLACES."""
    x, weight, bias = PLACES[node.target]  # type: ignore[index]
    given = node.args[bias] if bias is not None and bias < len(node.args) else node.kwargs.get("bias")
    return node.args[x], node.args[weight], given  # type: ignore[return-value]


def _parameter(node: object) -> bool:
    return isinstance(node, fx.Node) and is_state(node) and node.meta.get("kind") == "parameter"


def _possible(node: fx.Node) -> bool:
    """A plain matmul with a parameter that is trained."""
    if node.target not in PLACES or set(node.kwargs) - {"bias"}:
        return False
    _, weight, bias = operands(node)
    if not _parameter(weight) or not (bias is None or _parameter(bias)):
        return False
    return is_trainable(weight) or (bias is not None and is_trainable(bias))


def deferrable(graph: fx.Graph) -> frozenset[fx.Node]:
    """The matmuls whose weight and bias gradients can wait."""
    found = {node for node in graph.nodes if _possible(node)}
    uses: dict[str, list[tuple[fx.Node, fx.Node]]] = {}  # parameter -> (its node, a user)
    for node in graph.nodes:
        if _parameter(node):
            uses.setdefault(str(node.target), []).extend((node, user) for user in node.users)
    while True:
        mixed = {
            name
            for name, users in uses.items()
            if any(user not in found or operands(user)[0] is node for node, user in users)
        }
        kept = {
            node
            for node in found
            if not any(str(state.target) in mixed for state in operands(node)[1:] if state is not None)
        }
        if kept == found:
            return frozenset(found)
        found = kept

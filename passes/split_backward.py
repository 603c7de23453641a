"""Which matmuls of a stage can put off their weight gradients, for schedules with BackwardInput and BackwardWeight.

A weight gradient is put off at the op that makes it, so it must be the whole of the parameter's gradient on the stage, or
one of several that are all put off: autograd adds up what comes from all uses before it touches `.grad`, and a part that
came early would be added in another order. A linear whose weight is also an embedding on the same stage therefore stays as
it is; on two stages it need not. A weight that is cast once a step (`passes.step_casts`) is as good as a parameter; behind a cast
that each microbatch makes, a gradient cannot wait.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.ir import is_trainable
from passes.step_casts import is_held, is_leaf, leaf_parameter

aten = torch.ops.aten

# op -> (place of x, of the weight, of the bias or None)
PLACES = {aten.linear.default: (0, 1, 2), aten.mm.default: (0, 1, None), aten.addmm.default: (1, 2, 0)}


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(x, weight, bias) of a matmul that is in PLACES."""
    x, weight, bias = PLACES[node.target]  # type: ignore[index]
    given = node.args[bias] if bias is not None and bias < len(node.args) else node.kwargs.get("bias")
    return node.args[x], node.args[weight], given  # type: ignore[return-value]


def _possible(node: fx.Node) -> bool:
    """A plain matmul with a parameter that is trained, or the cast of one."""
    if node.target not in PLACES or set(node.kwargs) - {"bias"}:
        return False
    _, weight, bias = operands(node)
    if not is_leaf(weight) or not (bias is None or is_leaf(bias)):
        return False
    return is_trainable(weight) or (bias is not None and is_trainable(bias))


def deferrable(graph: fx.Graph) -> frozenset[fx.Node]:
    """The matmuls whose weight and bias gradients can wait."""
    found = {node for node in graph.nodes if _possible(node)}
    uses: dict[str, list[tuple[fx.Node, fx.Node]]] = {}  # parameter -> (what stands for it, a user of that)
    for node in graph.nodes:
        if is_leaf(node):
            users = [(node, user) for user in node.users if not (is_held(user) and is_leaf(user))]
            uses.setdefault(str(leaf_parameter(node).target), []).extend(users)
    while True:
        mixed = {
            name
            for name, users in uses.items()
            if any(user not in found or operands(user)[0] is node for node, user in users)
        }
        kept = {
            node
            for node in found
            if not any(str(leaf_parameter(leaf).target) in mixed for leaf in operands(node)[1:] if leaf is not None)
        }
        if kept == found:
            return frozenset(found)
        found = kept

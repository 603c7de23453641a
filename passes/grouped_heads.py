"""Grouped heads: attention reads shared key and value heads where they are, instead of copies of them.

Model libraries repeat the key and value heads (`unsqueeze`, `expand`, `reshape`) when they hold a mask, and let
attention group the query heads (`enable_gqa`) when they hold none. While tracing they always hold one. Where
`fold_causal_masks` has taken it away, the user's own eager run has none and takes the second way, whose gradients
round differently and which makes no copies. So this pass takes it too, only for those attentions: a model that
repeats heads without a mask does so in its eager run as well.

It runs on one rank's graph: the query heads of a rank may be split further than its key heads can be, and a repeat
with a collective behind it stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.ir import tensor_type

aten = torch.ops.aten

MASK_FOLDED = "mask_folded"  # in the meta of an attention: its mask was provably causal
_MOST_HEAD_SIZE = 256  # beyond it there is no kernel for grouped heads


def group_heads(graph: fx.Graph) -> None:
    """Attention over repeated heads becomes grouped attention, in place; dead code elimination takes the repeats."""
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or not node.meta.get(MASK_FOLDED):
            continue
        query, key, value = node.args[:3]
        keys, values = _before_repeat(key), _before_repeat(value)
        if keys is None or values is None or node.kwargs.get("enable_gqa"):
            continue
        size = _shape(keys)[-1]
        if size == _shape(values)[-1] and isinstance(size, int) and size <= _MOST_HEAD_SIZE:
            node.args = (query, keys, values, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    kind = tensor_type(node)
    assert kind is not None
    return kind.shape


def _before_repeat(node: Any) -> fx.Node | None:
    """[B, K, S, D] if `node` is its heads, each G times in a row: [B, K * G, S, D]."""
    chain = [node]
    for targets in ((aten.reshape.default, aten.view.default), (aten.expand.default,), (aten.unsqueeze.default,)):
        if not isinstance(chain[-1], fx.Node) or chain[-1].target not in targets:
            return None
        chain.append(chain[-1].args[0])
    _, expanded, unsqueezed, heads = chain
    if unsqueezed.args[1] not in (2, -3) or len(_shape(heads)) != 4 or not isinstance(heads, fx.Node):
        return None
    batch, groups, copies, length, size = _shape(expanded)
    same = (batch, groups, length, size) == _shape(heads) and _shape(node) == (batch, groups * copies, length, size)
    return heads if same else None

"""Where the rows of a batch meet: what a microbatch cannot compute as its part of the whole batch.

Cutting a batch into microbatches is exact where every value of a row comes from that row alone, and the loss adds the
rows up. A loss that compares rows with each other (contrastive), a regulariser on statistics over the batch, the root
of a mean over it: these mean something else for a microbatch. They are found by shapes: on the way to the loss, outside
of the sums and means that the loss pass weighs, a floating value that has rows gives one that has none, or one that has
rows in two dims. And they are found by rules: an op that cannot be split along the dim with the rows, or that sums over
it, looks across rows (attention, a softmax, a shift along dim 0: a model whose first dim is time). What only moves rows
(views, indexing) is not asked. Batch norm in training is no such place: a microbatch's statistics are what training by
microbatches means by it, as it does on one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import fx

from passes.canonical_rewrite import argument, op_name
from passes.ir import Size, TensorType, output_types, size_symbol, tensor_inputs, tensor_type
from passes.patterns import call_of
from passes.rules import RULES

ROWS = size_symbol("B")

# Ops that put rows elsewhere, and batch norm: their rules keep dims whole for reasons of other kinds.
_MOVES_ROWS = {
    "view", "reshape", "_unsafe_view", "flatten", "expand", "repeat", "squeeze", "slice", "slice_scatter", "select_scatter",
    "index", "index_select", "index_put", "gather", "scatter", "scatter_add", "embedding", "batch_norm",
}  # fmt: skip
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _has_rows(size: Size) -> bool:
    return not isinstance(size, int) and ROWS in size.free_symbols


def _dims_with_rows(kind: TensorType) -> int:
    return sum(map(_has_rows, kind.shape))


def _looks_across(node: fx.Node) -> bool:
    """True for an op that needs all rows to give one, by its rule; False if it has none that says so."""
    name = op_name(node.target)
    kinds = [kind for kind in map(tensor_type, tensor_inputs(node)) if kind is not None]
    if name in _RECURRENT:
        return _has_rows(kinds[0].shape[1 if argument(node, "batch_first") else 0])
    if name.endswith("embedding_bag"):  # bags are places in a flat list
        return len(kinds[1].shape) == 1 and any(map(_dims_with_rows, kinds[2:]))
    rule = RULES.get(node.target)
    if rule is None or name in _MOVES_ROWS:
        return False
    try:
        binding = rule.binding(call_of(node))
    except ValueError:
        return False
    kept = {name for pattern in binding.outputs for dim in pattern for name in dim.names}
    return any(
        _has_rows(binding.sizes[name]) and (name in binding.whole or name not in kept)
        for pattern, kind in zip(binding.inputs, kinds, strict=False)
        for dim in pattern
        for name in dim.names
        if kind.is_floating
    )


def _reads_shape_only(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return name.startswith("new_") or name.endswith("_like")


def where_rows_meet(ends: Iterable[fx.Node], weighed: Set[fx.Node]) -> list[fx.Node]:
    """The calls at which rows meet among `ends` and what they are computed from, without those in `weighed`."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = tensor_type(node)
        if kind is not None and not kind.is_floating and kind.dtype != torch.bool:
            continue  # positions and counts: which rows go together (tokens to experts), not what comes of them
        stack.extend(node.all_input_nodes)
        if node.op != "call_function" or node in weighed or _reads_shape_only(node):
            continue
        results = [kind for kind in output_types(node) if kind.is_floating]
        inputs = [kind for kind in map(tensor_type, tensor_inputs(node)) if kind is not None and kind.is_floating]
        had = max(map(_dims_with_rows, inputs), default=0)
        has = max(map(_dims_with_rows, results), default=had)
        if (had and not has) or (has > 1 and had < 2) or _looks_across(node):
            found.append(node)
    return found

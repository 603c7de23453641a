"""Where the rows of a batch meet: what a microbatch cannot compute as its part of the whole batch.

Cutting a batch into microbatches is exact where every value of a row comes from that row alone, and the loss adds the
rows up. A loss that compares rows with each other (contrastive), a regulariser on statistics over the batch, the root
of a mean over it: these mean something else for a microbatch. They are found by shapes: on the way to the loss, outside
of the sums and means that the loss pass weighs, a floating value that has rows gives one that has none, or one that has
rows in two dims. Batch norm in training is no such place: a microbatch's statistics are what training by microbatches
means by it, as it does on one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import fx

from passes.ir import TensorType, output_types, size_symbol, tensor_inputs, tensor_type

ROWS = size_symbol("B")


def _dims_with_rows(kind: TensorType) -> int:
    return sum(not isinstance(size, int) and ROWS in size.free_symbols for size in kind.shape)


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
        if (had and not has) or (has > 1 and had < 2):
            found.append(node)
    return found

"""Slices that tile a dim become one split: q, k and v cut out of a fused projection by hand.

A rule sees one call. Of three slices of one dim, each looks across it and would keep it whole; as the parts of one
`split_with_sizes` they can be split together, each in itself. This is for dims that a product made, and for weights: slices
of what has been reshaped into heads since (rotary positions) do not come from a fused dim and stay slices.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.canonical_rewrite import Builder, rewrite
from passes.ir import TensorType, is_state, is_trainable, output_types, tensor_inputs, tensor_type
from passes.patterns import elementwise
from passes.rules import CONTRACTIONS, rule_of

aten = torch.ops.aten
Parts = dict[tuple[int, int], fx.Node]

_PRODUCTS = frozenset(row.op for row in CONTRACTIONS)


def merge_slices(graph: fx.Graph) -> fx.Graph:
    """Slices of one dim that are disjoint and leave nothing out become the pieces of a split."""
    tiles = {source: found for source in graph.nodes if (found := _tiles(source)) is not None}
    pieces: dict[fx.Node, fx.Node] = {}  # slice -> what stands for it in the new graph

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node in pieces:
            return pieces[node]
        new = builder.copy(node, args, kwargs)
        if node in tiles:
            dim, slices = tiles[node]
            bounds = sorted({bounds for bounds, _ in slices})
            kinds = [tensor_type(next(user for b, user in slices if b == bounds_)) for bounds_ in bounds]
            sizes = [stop - start for start, stop in bounds]
            types = [kind for kind in kinds if isinstance(kind, TensorType)]
            split = builder.call(
                aten.split_with_sizes.default, (new, sizes, dim), like=slices[0][1], tensors=types, name=f"{node.name}_split"
            )
            made: Parts = {}
            for part, user in slices:
                if part not in made:
                    index = bounds.index(part)
                    made[part] = builder.call(
                        operator.getitem, (split, index), like=user, tensor=types[index], name=user.name
                    )
                pieces[user] = made[part]
        return new

    return rewrite(graph, rule)


def _tiles(source: fx.Node) -> tuple[int, list[tuple[tuple[int, int], fx.Node]]] | None:
    """The dim of a product or weight that slices tile, and the slices with their bounds."""
    kind = tensor_type(source)
    if kind is None or not is_trainable(source) or not _is_fused(source):
        return None
    by_dim: dict[int, list[tuple[tuple[int, int], fx.Node]]] = {}
    for user in source.users:
        bounds = _bounds(user, source, kind)
        if bounds is not None:
            by_dim.setdefault(bounds[0], []).append((bounds[1], user))
    for dim, slices in by_dim.items():
        parts = sorted({part for part, _ in slices})
        starts, stops = [start for start, _ in parts], [stop for _, stop in parts]
        if len(parts) > 1 and starts == [0, *stops[:-1]] and stops[-1] == kind.shape[dim]:
            return dim, slices
    return None


def _is_fused(node: fx.Node) -> bool:
    """True for a parameter, a product, and what element-wise ops make of one product."""
    while node.op == "call_function" and node.target not in _PRODUCTS:
        rule, sources = rule_of(node.target), [arg for arg in tensor_inputs(node) if not is_state(arg)]
        if rule is None or rule.annotation is not elementwise or len(sources) != 1 or len(output_types(node)) != 1:
            return False
        node = sources[0]
    return node.op == "call_function" or (is_state(node) and node.meta.get("kind") == "parameter")


def _bounds(user: fx.Node, source: fx.Node, kind: TensorType) -> tuple[int, tuple[int, int]] | None:
    """(dim, (start, stop)) of a slice with constant bounds and without a step."""
    if user.target is not aten.slice.Tensor or user.args[0] is not source:
        return None
    given: tuple[Any, ...] = user.args
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    _, dim, start, stop, step = given + defaults[len(given) :]
    size = kind.shape[dim] if isinstance(dim, int) else None
    if step != 1 or not isinstance(dim, int) or not isinstance(size, int):
        return None
    found = []
    for bound in (0 if start is None else start, size if stop is None else stop):
        if not isinstance(bound, int):
            return None
        found.append(min(max(bound + size if bound < 0 else bound, 0), size))
    return dim % len(kind.shape), (found[0], found[1])

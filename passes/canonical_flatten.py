"""Linear layers that flatten what comes before the features, done on the dims themselves.

view(x, [B*T, K]) -> mm(w) -> add(b) -> view([B, T, N]) is matmul(x, w) + b on [B, T, K]. The fused dim B*T cannot be
split over tokens, and programs read worse with it. So where a value is flattened, goes through ops that treat each row
by itself (a matmul with a weight on the right, pointwise ops), and is turned back to the same leading dims, those ops
run on all dims, and neither view is left.

No bit changes. An N-d matmul with a 2-d weight is the same call of `mm`. An add that puts a bias to such a product is
marked meta["flat"]: where the fused kernel comes back (`passes.localize`), it gets rows, as in the user's code. It is
turned back by sizes, which must be at hand there: leading dims are ints or plain symbols.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.canonical_rewrite import Builder, rewrite
from passes.ir import Size, TensorType, origin, tensor_inputs, tensor_type

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default)
_MATMULS: dict[Any, Any] = {aten.mm.default: aten.matmul.default, aten.linear.default: aten.linear.default}


def keep_leading_dims(graph: fx.Graph) -> fx.Graph:
    """Flattening views and the views that undo them are left out, wherever only ops on rows are between them."""
    leading = _flat_values(graph)
    undone = _undone(graph, leading)
    whole: dict[fx.Node, Any] = {}  # flat node of the old graph -> new node with all dims

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node not in undone:
            return builder.copy(node, args, kwargs)
        kind, where = tensor_type(node), origin(node)
        assert kind is not None
        args = tuple(
            whole.get(old, new) if isinstance(old, fx.Node) else new for old, new in zip(node.args, args, strict=True)
        )
        if node not in leading:  # a view that undoes
            if tensor_type(args[0]) == kind:
                return args[0]
            return builder.emit(aten.reshape.default, args, kwargs, node.meta, node.name)
        full = TensorType(kind.dtype, (*leading[node], *kind.shape[1:]))
        if node.target in _VIEWS:
            source = args[0]
            if tensor_type(source) != full:
                source = builder.call(
                    aten.reshape.default, (source, builder.shape(full.shape, where)), like=node, tensor=full
                )
            whole[node] = source
        else:
            marks = {"flat": True} if "fused" in node.meta else {}
            meta = {**node.meta, "tensor": full, **marks}
            whole[node] = builder.emit(_MATMULS.get(node.target, node.target), args, kwargs, meta, node.name)
        flat = builder.shape(kind.shape, where)  # for users that want rows; dead if there are none
        return builder.call(aten.reshape.default, (whole[node], flat), like=node, tensor=kind)

    return rewrite(graph, rule) if undone else graph


def _flat_values(graph: fx.Graph) -> dict[fx.Node, tuple[Size, ...]]:
    """The values whose dim 0 is several dims of a view's source, with those dims: the views, and what is computed row by row."""
    found: dict[fx.Node, tuple[Size, ...]] = {}
    for node in graph.nodes:
        kind = tensor_type(node)
        if node.op != "call_function" or kind is None or not kind.shape:
            continue
        if node.target in _VIEWS:
            dims = _flattened_dims(node, kind)
        else:
            dims = _dims_of_rows(node, kind, found)
        if dims is not None:
            found[node] = dims
    return found


def _flattened_dims(node: fx.Node, kind: TensorType) -> tuple[Size, ...] | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = tensor_type(source).shape  # type: ignore[union-attr]
    product: Size = 1
    for count, size in enumerate(shape, 1):
        if not isinstance(size, int) and not size.is_Symbol:
            return None
        product = product * size
        if count > 1 and product == kind.shape[0]:
            return shape[:count]
    return None


def _dims_of_rows(node: fx.Node, kind: TensorType, found: dict[fx.Node, tuple[Size, ...]]) -> tuple[Size, ...] | None:
    """The leading dims of a result, if the op works row by row on flat values; other arguments have none of them."""
    inputs = tensor_inputs(node)
    flat = [arg for arg in inputs if arg in found]
    dims = {found[arg] for arg in flat}
    if len(dims) != 1 or any(arg not in node.args for arg in flat):
        return None
    if node.target in _MATMULS:
        return dims.pop() if flat == inputs[:1] and len(kind.shape) == 2 else None
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return None
    for arg in inputs:
        shape = tensor_type(arg).shape  # type: ignore[union-attr]
        fits = (
            shape[:1] == kind.shape[:1] and len(shape) == len(kind.shape)
            if arg in found
            else len(shape) < len(kind.shape)
        )
        if not fits:
            return None
    return dims.pop()


def _undone(graph: fx.Graph, leading: dict[fx.Node, tuple[Size, ...]]) -> set[fx.Node]:
    """The views that give flat values their leading dims back, and the flat values on the way to them."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in _VIEWS and node not in leading and source in leading:
            dims = leading[source]
            if tensor_type(node).shape[: len(dims)] == dims:  # type: ignore[union-attr]
                found.update((node, source))
        elif node in found and node.target not in _VIEWS:
            found.update(arg for arg in tensor_inputs(node) if arg in leading)
    views = {node for node in found if node in leading and node.target not in _VIEWS}
    return found if views else set()  # a view of a view is not worth a change

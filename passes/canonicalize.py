"""From what torch.export gives to the canonical graph of passes/ir.py: few kinds of op, nothing dead, nothing baked
that is a size.

`canonicalize` is the composition of PASSES, each a function from graph to graph. What they may not do is change
numbers: executed with the marked biases fused again, the canonical graph gives the bits of the user's model. Therefore
common subexpressions are merged only where no gradient flows (elsewhere it would change the order of gradient sums),
and nothing is decomposed further than linear = matmul + bias, but for ops that eager runs as several ops anyway
(`passes.canonical_composites`). To add a pass: write graph -> graph with `rewrite`, and
put it in the tuple.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.canonical_flatten import keep_leading_dims
from passes.canonical_import import Imports, import_graph
from passes.canonical_inplace import functionalise
from passes.canonical_masks import fold_causal_masks
from passes.canonical_rewrite import Builder, argument, is_random, op_name, rewrite, shape_of
from passes.canonical_slices import merge_slices
from passes.ir import TensorType, is_trainable, origin, tensor_type

aten = torch.ops.aten

_SAME_SHAPE_SPELLINGS = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "expand",
    "expand_as",
}
_KEEPS_LAYOUT = {"view", "reshape", "unsqueeze", "squeeze", "detach", "to", "dropout"}
_BITWISE = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}
# `x.new_zeros(...)` reads nothing of x but dtype and device.
_NEW: dict[str, Any] = {
    "new_zeros": aten.zeros.default, "new_ones": aten.ones.default, "new_full": aten.full.default,
    "new_empty": aten.empty.memory_format,
}  # fmt: skip
_BIASED_CONVOLUTIONS = frozenset(
    ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)
_SPARSE_GRADIENT = {"embedding", "embedding_bag", "_embedding_bag"}
_SPLITS = {
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unbind",
    "unsafe_split",
    "unsafe_chunk",
    "hsplit",
    "vsplit",
}


def _identity(node: fx.Node) -> bool:
    """True for a call that returns its first argument's values, shape and dtype unchanged, and so can be left out."""
    name = op_name(node.target)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or tensor_type(source) is None or tensor_type(source) != tensor_type(node):
        return False
    if name in ("alias", "lift_fresh", "lift_fresh_copy", *(_SAME_SHAPE_SPELLINGS - {"expand_as"})):
        return True
    if name == "to":
        return argument(node, "device") is None or _device_of(source) == argument(node, "device")
    if name in ("type_as", "_to_copy", "expand_as"):
        return not any(value is not None for key, value in node.kwargs.items() if key in ("device", "memory_format"))
    if name == "detach":
        return not is_trainable(source)
    if name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
        return not is_random(node)
    if name == "clone":
        return node.kwargs.get("memory_format") is None
    if name == "contiguous":
        return node.kwargs.get("memory_format") in (None, torch.contiguous_format) and _layout_is_free(node)
    if name == "slice":
        step = argument(node, "step")
        return step == 1 and argument(node, "start") in (None, 0)
    if name in ("add", "sub") and not source.meta["tensor"].is_floating:
        return type(node.args[1]) is int and node.args[1] == 0
    return False


def _device_of(node: fx.Node) -> Any:
    return node.meta.get("device")


def _layout_is_free(node: fx.Node) -> bool:
    """True if nothing can tell whether this `contiguous` ran: it did nothing, or only reshapes read its result."""
    return bool(node.meta.get("no_op")) or all(
        op_name(user.target) in _SAME_SHAPE_SPELLINGS or (_identity(user) and _layout_is_free(user))
        for user in node.users
    )


def _updated_states(graph: fx.Graph) -> set[str]:
    return {name for node in graph.nodes for name in node.meta.get("mutates", ())}


def _reads_state(node: Any, names: set[str]) -> bool:
    """True if a value is, or is a view of, one of these buffers."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        target = node.target
        is_view = isinstance(target, torch._ops.OpOverload) and any(item.alias_info for item in target._schema.returns)
        if target is not operator.getitem and not is_view:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target in names


def strip_no_ops(graph: fx.Graph) -> fx.Graph:
    """Leave out what changes nothing: `to` the same dtype, `alias`, `clone`, slices of everything, `contiguous` before
    a reshape."""
    updated = _updated_states(graph)

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_function" and _identity(node) and not (updated and _reads_state(node.args[0], updated)):
            return args[0]
        return builder.copy(node, args, kwargs)

    return rewrite(graph, rule)


def _is_dense(node: fx.Node, dense: dict[fx.Node, bool]) -> bool:
    """True if a `view` of this value works whatever layouts kernels give their results. `dense` knows the nodes before
    it."""
    if node.op != "call_function":
        return True
    target, name = node.target, op_name(node.target)
    sources = [source for source in node.all_input_nodes if tensor_type(source) is not None]
    if target is operator.getitem:
        return op_name(node.all_input_nodes[0].target) not in _SPLITS
    if name == "scaled_dot_product_attention" or not isinstance(target, torch._ops.OpOverload):
        return False
    if name in _KEEPS_LAYOUT or torch.Tag.pointwise in target.tags:
        return all(dense[source] for source in sources)
    return not any(item.alias_info for item in target._schema.returns)


def one_spelling(graph: fx.Graph) -> fx.Graph:
    """One way to write each thing: explicit sizes in view, reshape and expand; split_with_sizes for split, chunk and
    unbind; bitwise_and for `&`; permute for movedim; to.dtype for casts; dense gradients for sparse ones. `view` of a
    value that need not be dense becomes `reshape`."""

    dense: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        dense[node] = _is_dense(node, dense)

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, kind, where = op_name(node.target), tensor_type(node), origin(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if name in _SPARSE_GRADIENT and argument(node, "sparse"):
            position = [parameter.name for parameter in node.target._schema.arguments].index("sparse")  # type: ignore[union-attr]
            if position < len(args):
                args = (*args[:position], False, *args[position + 1 :])
            return builder.copy(node, args, {key: value for key, value in kwargs.items() if key != "sparse"})
        if name in ("expand", "expand_as") and kind is not None:
            return builder.emit(
                aten.expand.default, (args[0], builder.shape(kind.shape, where)), {}, node.meta, node.name
            )
        if (
            name in _SAME_SHAPE_SPELLINGS
            and kind is not None
            and source is not None
            and getattr(node.target, "_overloadname", "") != "dtype"
        ):
            op = aten.view.default if name in ("view", "view_as") and dense[source] else aten.reshape.default
            return builder.emit(op, (args[0], builder.shape(kind.shape, where)), {}, node.meta, node.name)
        if name in _SPLITS and "tensors" in node.meta:
            return _split(builder, node, args[0])
        if node.target is operator.getitem and source is not None and op_name(source.target) == "unbind":
            return _unbound(builder, node, args)
        if name in _BITWISE:
            op = getattr(getattr(aten, _BITWISE[name]), getattr(node.target, "_overloadname", "Tensor"))
            return builder.emit(op, args, kwargs, node.meta, node.name)
        if (
            name in ("to", "type_as", "_to_copy")
            and source is not None
            and kind is not None
            and _only_casts(node, source)
        ):
            return builder.emit(aten.to.dtype, (args[0], kind.dtype), {}, node.meta, node.name)
        if name == "squeeze" and getattr(node.target, "_overloadname", "") == "default" and source is not None:
            dims = [dim for dim, size in enumerate(shape_of(source)) if size == 1]
            return builder.emit(aten.squeeze.dims, (args[0], dims), {}, node.meta, node.name)
        if (
            name in ("t", "numpy_T", "mT", "adjoint", "swapaxes", "swapdims", "movedim", "moveaxis")
            and source is not None
        ):
            return _permuted(builder, node, args, len(shape_of(source)))
        if name in _NEW and kind is not None and node.meta.get("device") is not None:
            given = {"dtype": kind.dtype, "device": node.meta["device"]}
            return builder.emit(_NEW[name], args[1:], given, node.meta, node.name)
        if name == "narrow" and source is not None and isinstance(argument(node, "start"), int):
            dim, start, length = args[1:4]
            stop = builder.size(start + (length.meta["size"] if isinstance(length, fx.Node) else length), where)
            return builder.emit(aten.slice.Tensor, (args[0], dim, start, stop), {}, node.meta, node.name)
        return builder.copy(node, args, kwargs)

    return rewrite(graph, rule)


def _split(builder: Builder, node: fx.Node, source: fx.Node) -> fx.Node:
    shape, pieces = shape_of(source), node.meta["tensors"]
    dim = {"hsplit": 0 if len(shape) == 1 else 1, "vsplit": 0}.get(op_name(node.target))
    dim = (int(argument(node, "dim")) if dim is None else dim) % len(shape)
    if op_name(node.target) == "unbind":
        pieces = tuple(TensorType(piece.dtype, (*shape[:dim], 1, *shape[dim + 1 :])) for piece in pieces)
    sizes = builder.shape((piece.shape[dim] for piece in pieces), origin(node))
    meta = {**node.meta, "tensors": pieces}
    return builder.emit(aten.split_with_sizes.default, (source, sizes, dim), {}, meta, node.name)


def _unbound(builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    """A piece of an unbind: a piece of size 1 without that dim."""
    split, index = args
    piece = builder.call(operator.getitem, (split, index), like=node, tensor=split.meta["tensors"][index])
    return builder.emit(aten.squeeze.dim, (piece, split.args[2]), {}, node.meta, node.name)


def _only_casts(node: fx.Node, source: fx.Node) -> bool:
    same_device = _device_of(node) == _device_of(source)
    return same_device and node.kwargs.get("memory_format") is None and len(node.args) < 5


def _permuted(builder: Builder, node: fx.Node, args: tuple[Any, ...], rank: int) -> Any:
    name, order = op_name(node.target), list(range(rank))
    if name in ("t", "mT", "adjoint", "swapaxes", "swapdims"):
        if rank < 2 or (name == "adjoint" and node.meta["tensor"].dtype.is_complex):
            return builder.copy(node, args, {})
        first, second = args[1:3] if name.startswith("swap") else (rank - 2, rank - 1)
        return builder.emit(aten.transpose.int, (args[0], first % rank, second % rank), {}, node.meta, node.name)
    if name == "numpy_T":
        order.reverse()
    else:
        sources, targets = ([item] if isinstance(item, int) else list(item) for item in args[1:3])
        moved = {target % rank: source % rank for source, target in zip(sources, targets, strict=True)}
        others = iter(dim for dim in order if dim not in moved.values())
        order = [moved[dim] if dim in moved else next(others) for dim in order]
    return builder.emit(aten.permute.default, (args[0], order), {}, node.meta, node.name)


def _key(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return tuple(_key(item) for item in arg)
    if isinstance(arg, dict):
        return tuple((name, _key(value)) for name, value in sorted(arg.items()))
    if isinstance(arg, slice):
        return ("slice", _key(arg.start), _key(arg.stop), _key(arg.step))
    return (type(arg), arg)  # 1, 1.0 and True are equal in Python and different here


def merge_common(graph: fx.Graph) -> fx.Graph:
    """Equal computations without gradient and without randomness are done once: position ids, masks, rotary tables."""
    updated = _updated_states(graph)
    seen: dict[Any, fx.Node] = {}

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pinned = node.meta.get("mutates") or (
            updated and any(_reads_state(arg, updated) for arg in node.all_input_nodes)
        )
        if node.op != "call_function" or is_trainable(node) or node.meta.get("random") or pinned or "size" in node.meta:
            return builder.copy(node, args, kwargs)
        if op_name(node.target).startswith("empty") or op_name(node.target) == "new_empty":
            return builder.copy(node, args, kwargs)
        key = (node.target, _key(args), _key(kwargs))
        if key not in seen:
            seen[key] = builder.copy(node, args, kwargs)
        return seen[key]

    return rewrite(graph, rule)


def split_biases(graph: fx.Graph) -> fx.Graph:
    """linear with bias -> linear, add; addmm -> mm, add; a convolution with bias -> convolution, add of the bias in its
    dim.

    The add is marked so that the exact fused op can be put back where nothing comes between the two: meta["fused"] is
    "linear", "addmm" or "convolution", meta["bias_of"] the product's node name.
    """

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = op_name(node.target)
        if name == "linear" and isinstance(argument(node, "bias"), fx.Node):
            bias = args[2] if len(args) > 2 else kwargs["bias"]
            product = builder.emit(aten.linear.default, args[:2], {}, node.meta, node.name)
        elif name == "addmm" and argument(node, "beta") == 1 and argument(node, "alpha") == 1:
            bias = args[0]
            product = builder.emit(aten.mm.default, args[1:3], {}, node.meta, node.name)
        elif name in _BIASED_CONVOLUTIONS and isinstance(argument(node, "bias"), fx.Node) and len(args) > 2:
            weight, bias = node.args[1:3]
            product = builder.emit(node.target, (*args[:2], None, *args[3:]), kwargs, node.meta, node.name)
            shape = [*shape_of(bias), *[1] * (len(shape_of(weight)) - 2)]  # type: ignore[arg-type]
            kind = TensorType(bias.meta["tensor"].dtype, tuple(shape))  # type: ignore[union-attr]
            bias = builder.call(aten.reshape.default, (args[2], shape), like=node, tensor=kind, name=f"{bias.name}_shaped")  # type: ignore[union-attr]
            name = "convolution"
        else:
            return builder.copy(node, args, kwargs)
        marks = {"fused": name, "bias_of": product.name}
        return builder.emit(aten.add.Tensor, (product, bias), {}, {**node.meta, **marks}, f"{product.name}_bias")

    return rewrite(graph, rule)


def remove_dead(graph: fx.Graph) -> fx.Graph:
    """Drop what no output and no buffer update needs. Inputs and sizes stay: they are the graph's signature."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node.meta.get("mutates") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    builder = Builder()
    mapped: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in needed:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapped.__getitem__)
            mapped[node] = builder.copy(node, args, kwargs)
    return builder.graph


Pass = Callable[[fx.Graph], fx.Graph]
PASSES: tuple[Pass, ...] = (
    functionalise,
    strip_no_ops,
    one_spelling,
    merge_common,
    merge_slices,
    fold_causal_masks,
    split_biases,
    keep_leading_dims,
    remove_dead,
)


def canonicalize(module: fx.GraphModule, imports: Imports) -> fx.GraphModule:
    """The canonical graph module of an exported one. It shares every tensor with the user's model."""
    graph = import_graph(module, imports)
    for apply in PASSES:
        graph = apply(graph)
    graph.lint()
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    root = {state.name: state.tensor for state in imports.states.values() if state.name in read}
    return fx.GraphModule(root, graph, class_name="Canonical")

"""In-place ops become ordinary ones, so that every value is written once and passes may move and drop nodes freely.

Each tensor of the incoming graph is a root or a view of another one. Writing to a tensor makes a new value of its root:
the functional op's result, carried up the chain of views by the inverse of each (`slice` -> `slice_scatter`). A view
that is read after its root changed is made again from the new value. What stays in place is the state that the user's
model itself updates in forward, buffers such as running statistics: those nodes carry meta["mutates"], the buffers'
names; they are never dead and never merged. A changed input keeps the caller's tensor untouched.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from costmodel.errors import CaptureError
from passes.canonical_rewrite import Builder, argument, op_name, shape_of
from passes.ir import TensorType, is_trainable, origin, tensor_type

aten = torch.ops.aten

_WHOLE = {
    "alias",
    "detach",
    "detach_",
    "contiguous",
    "to",
    "lift_fresh",
    "lift_fresh_copy",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
}
_RESHAPING = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "view_as",
    "reshape_as",
}
_STATISTICS = {
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
}  # update running_mean, running_var without saying so
_FUNCTIONAL = {
    "normal_": aten.normal_functional,
    "__iand__": aten.bitwise_and, "__ior__": aten.bitwise_or, "__ixor__": aten.bitwise_xor,
    "__ilshift__": aten.bitwise_left_shift, "__irshift__": aten.bitwise_right_shift,
}  # fmt: skip


@dataclass
class _Root:
    value: Any
    version: int = 0


@dataclass
class _Alias:
    root: _Root
    parent: fx.Node | None  # the old node it is a view of; None for the root itself
    value: Any
    version: int = 0


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _viewed(node: fx.Node) -> fx.Node | None:
    """The old node whose memory this one shares, by the op's schema; None if it has its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        return source if _viewed(source) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return None
    if op_name(node.target) in ("to", "contiguous", "dropout", "alpha_dropout", "feature_dropout", "lift_fresh_copy"):
        return source if _keeps_memory(node, source) else None
    returns = node.target._schema.returns
    return source if returns and returns[0].alias_info is not None else None


def _keeps_memory(node: fx.Node, source: fx.Node) -> bool:
    name = op_name(node.target)
    if name == "to":
        return (
            tensor_type(node) == tensor_type(source) and not argument(node, "copy") and _device(node) == _device(source)
        )
    if name == "contiguous":
        return bool(node.meta.get("no_op"))
    return name.endswith("dropout") and argument(node, "train") is False


def _device(node: fx.Node) -> Any:
    return node.meta.get("device")


def functionalise(graph: fx.Graph) -> fx.Graph:
    """The graph without in-place ops, except updates of buffers."""
    return _Functionaliser().run(graph)


class _Functionaliser:
    def __init__(self) -> None:
        self.builder = Builder()
        self.aliases: dict[fx.Node, _Alias] = {}

    def run(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            if _is_mutable(node):
                self.write(node)
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.read)
            parent = _viewed(node)
            if op_name(node.target) in _STATISTICS:
                new = self.builder.copy(node, args, kwargs, **self.statistics(node))
            else:
                new = self.builder.copy(node, args, kwargs)
            root = self.aliases[parent].root if parent is not None else _Root(new)
            self.aliases[node] = _Alias(root, parent, new, root.version)
        return self.builder.graph

    def statistics(self, node: fx.Node) -> dict[str, Any]:
        names = [argument(node, name) for name in ("running_mean", "running_var")]
        if not argument(node, _STATISTICS[op_name(node.target)]) or not isinstance(names[0], fx.Node):
            return {}
        return {"mutates": tuple(str(state.target) for state in names)}

    def read(self, node: fx.Node) -> Any:
        """The present value of an old node: as it was, or made again from a root that was written to since."""
        alias = self.aliases[node]
        if alias.version != alias.root.version:
            if alias.parent is None:
                alias.value = alias.root.value
            elif _is_mutable(node):
                alias.value = self.read(alias.parent)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.read)
                alias.value = self.builder.copy(node, args, kwargs)
            alias.version = alias.root.version
        return alias.value

    def write(self, node: fx.Node) -> None:
        target = node.args[0] if node.args else None
        if op_name(node.target) == "" or not isinstance(target, fx.Node):
            raise self.refusal(node, f"the op {node.target} changes its arguments")
        alias = self.aliases[target]
        base = target
        while (parent := self.aliases[base].parent) is not None:
            base = parent
        if base.op == "get_attr" and base.meta["kind"] == "parameter" and op_name(node.target) != "detach_":
            raise self.refusal(node, f"forward changes the parameter {base.target} in place")
        is_buffer = base.op == "get_attr" and base.meta["kind"] == "buffer"
        if is_buffer and target is base and op_name(node.target) != "detach_":
            new = self.update_buffer(node, base)
        else:
            new = self.functional(node, target)
            self.replace(target, new, node)
            if is_buffer:
                self.builder.call(
                    aten.copy_.default, (self.buffer_node(base), self.without_gradient(alias.root.value, node)),
                    like=node, tensor=tensor_type(base),
                ).meta["mutates"] = (str(base.target),)  # fmt: skip
        self.aliases[node] = _Alias(alias.root, target, new, alias.root.version)

    def update_buffer(self, node: fx.Node, base: fx.Node) -> Any:
        """A whole buffer's update stays as it is, except a copy onto itself (`self.count += 1` ends with one)."""
        alias = self.aliases[base]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.read)
        if op_name(node.target) == "copy_" and args[1] is alias.value:
            return alias.value
        args = (self.buffer_node(base), *(self.without_gradient(arg, node) for arg in args[1:]))
        new = self.builder.copy(node, args, kwargs, mutates=(str(base.target),))
        alias.root.value, alias.root.version = new, alias.root.version + 1
        return new

    def buffer_node(self, base: fx.Node) -> fx.Node:
        return next(node for node in self.builder.graph.nodes if node.op == "get_attr" and node.target == base.target)

    def without_gradient(self, value: Any, like: fx.Node) -> Any:
        if not isinstance(value, fx.Node) or not is_trainable(value):
            return value
        return self.builder.call(aten.detach.default, (value,), like=like, tensor=tensor_type(value))

    def functional(self, node: fx.Node, target: fx.Node) -> Any:
        """The new value of `target`, of the same type."""
        kind = tensor_type(target)
        assert kind is not None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.read)
        name = op_name(node.target)
        if name == "copy_":
            source: Any = args[1]
            if tensor_type(source) == kind:
                return source
            if shape_of(source) != kind.shape:
                shape = self.builder.shape(kind.shape, origin(node))
                source = self.builder.call(
                    aten.expand.default,
                    (source, shape),
                    like=node,
                    tensor=TensorType(source.meta["tensor"].dtype, kind.shape),
                )
            return self.cast(source, kind, node)
        packet = _FUNCTIONAL.get(name) or getattr(aten, name.removesuffix("_"), None)
        overload = getattr(node.target, "_overloadname", "default")
        if name == "bernoulli_" and overload == "float":
            packet, overload = aten.bernoulli, "p"
        function = getattr(packet, overload, None) if packet is not None else None
        if function is None or not (name.endswith("_") and tensor_type(node) == kind):
            raise self.refusal(node, f"the in-place op {name} has no ordinary form")
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        for position, wanted in enumerate(
            function._schema.arguments
        ):  # what the in-place op leaves to a default, and this one does not
            if (
                position >= len(args)
                and wanted.name not in kwargs
                and not wanted.has_default_value()
                and wanted.name in defaults
            ):
                kwargs = {**kwargs, wanted.name: defaults[wanted.name]}
        promoted = kind.dtype
        for arg in (arg for arg in args[1:] if isinstance(arg, fx.Node) and tensor_type(arg) is not None):
            if shape_of(arg) or arg.meta["tensor"].is_floating > kind.is_floating:
                promoted = torch.promote_types(promoted, arg.meta["tensor"].dtype)
        if torch.Tag.pointwise not in function.tags:
            promoted = kind.dtype
        value = self.builder.call(function, args, kwargs, like=node, tensor=TensorType(promoted, kind.shape))
        return self.cast(value, kind, node)

    def cast(self, value: fx.Node, kind: TensorType, node: fx.Node) -> fx.Node:
        if value.meta["tensor"].dtype == kind.dtype:
            return value
        return self.builder.call(aten.to.dtype, (value, kind.dtype), like=node, tensor=kind)

    def replace(self, target: fx.Node, value: Any, node: fx.Node) -> None:
        """Give `target` a new value: carry it up to the root, whose other views will be made again."""
        changed, new = target, value
        while (parent := self.aliases[changed].parent) is not None:
            new = self.scatter(changed, parent, new, node)
            changed = parent
        root = self.aliases[target].root
        root.value, root.version = new, root.version + 1
        alias = self.aliases[target]
        alias.value, alias.version = value, root.version

    def scatter(self, view: fx.Node, parent: fx.Node, value: Any, node: fx.Node) -> Any:
        """The value of `parent` after its view got `value`: the inverse of one view op."""
        name, kind = op_name(view.target), tensor_type(parent)
        if "tensors" in view.meta:
            return value  # the list of pieces: scatter_piece has carried the value past it
        if _is_mutable(view) or name in _WHOLE:
            if name == "detach" and is_trainable(parent):
                raise self.refusal(node, "a detached view of a value with a gradient is changed in place")
            return value
        if view.target is operator.getitem:  # one of the pieces that split, chunk or unbind gave
            return self.scatter_piece(view, parent, value, node)
        assert kind is not None
        call, where = self.builder.call, origin(node)
        if name in _RESHAPING:
            return call(aten.reshape.default, (value, self.builder.shape(kind.shape, where)), like=node, tensor=kind)
        if name in ("transpose", "t"):
            dims = (0, 1) if name == "t" else view.args[1:3]
            return call(aten.transpose.int, (value, *dims), like=node, tensor=kind)
        if name == "permute":
            order = [int(dim) % len(kind.shape) for dim in argument(view, "dims")]
            inverse = [order.index(dim) for dim in range(len(order))]
            return call(aten.permute.default, (value, inverse), like=node, tensor=kind)
        rest = fx.node.map_arg(view.args[1:], self.read)
        scatters = {
            "slice": aten.slice_scatter.default,
            "select": aten.select_scatter.default,
            "diagonal": aten.diagonal_scatter.default,
        }
        if name in scatters:
            return call(scatters[name], (self.read(parent), value, *rest), like=node, tensor=kind)
        raise self.refusal(node, f"a view made by {name} is changed in place")

    def scatter_piece(self, view: fx.Node, parent: fx.Node, value: Any, node: fx.Node) -> Any:
        source, index = parent.args[0], int(view.args[1])  # type: ignore[arg-type]
        assert isinstance(source, fx.Node)
        kind, whole = tensor_type(source), self.read(source)
        assert kind is not None
        dim = int(argument(parent, "dim")) % len(kind.shape)
        if op_name(parent.target) == "unbind":
            return self.builder.call(aten.select_scatter.default, (whole, value, dim, index), like=node, tensor=kind)
        pieces = [piece.shape[dim] for piece in parent.meta["tensors"]]
        start = self.builder.size(sum(pieces[:index]), origin(node))
        stop = self.builder.size(sum(pieces[: index + 1]), origin(node))
        return self.builder.call(aten.slice_scatter.default, (whole, value, dim, start, stop), like=node, tensor=kind)

    @staticmethod
    def refusal(node: fx.Node, what: str) -> CaptureError:
        return CaptureError(what, where=str(origin(node)) or None, use="the form that returns a new tensor")

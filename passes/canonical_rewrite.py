"""How a pass is written: a rule per node, applied in order to a new graph. The graph that comes in is never edited.

A rule gets the builder of the new graph, an old node and its arguments already mapped to new nodes, and returns what
stands for the old node from now on: a new node, another new node, or a plain value. The builder keeps the invariants of
passes/ir.py: every node that it makes has a type, an origin, and freshly derived `trainable` and `random` marks, and
sizes are hash-consed: one node per expression, however often the user's code wrote `x.shape[0] * 3`.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import fx

from costmodel.errors import CaptureError
from passes.ir import Origin, Size, TensorType, origin, output_types, tensor_type

aten = torch.ops.aten

# Ops whose float result has no gradient although an argument may have one.
_NO_GRADIENT = {
    "detach", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "bernoulli",
}  # fmt: skip

# Python functions for the integer functions that torch.export puts into size expressions, by the class's name.
_SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod,
    "PowByNatural": operator.pow, "FloatPow": operator.pow, "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv, "Max": builtins.max, "Min": builtins.min, "Abs": builtins.abs,
    "ToFloat": builtins.float, "TruncToInt": math.trunc, "CeilToInt": math.ceil, "FloorToInt": math.floor,
    "RoundToInt": builtins.round, "OpaqueUnaryFn_sqrt": math.sqrt, "OpaqueUnaryFn_log2": math.log2,
    "OpaqueUnaryFn_log": math.log, "OpaqueUnaryFn_exp": math.exp,
}  # fmt: skip

_NOWHERE = Origin()
Rule = Callable[["Builder", fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def op_name(target: Any) -> str:
    """`aten.add.Tensor` -> "add"; the empty string for anything that is not an ATen overload."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return ""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An OpOverload call's argument by its schema name, whether passed by position, by keyword or not at all."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else default)
    return default


def is_random(node: fx.Node) -> bool:
    """True if two runs of this node may differ: a random op that its own arguments (p = 0, train = False) do not switch
    off."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = {parameter.name for parameter in target._schema.arguments}
    if any(name in names and argument(node, name) is False for name in ("train", "training")):
        return False
    chances: list[str] = [name for name in ("dropout_p", "dropout") if name in names]
    chances += ["p"] if "dropout" in target._schema.name and "p" in names else []
    return not any(argument(node, name) == 0 for name in chances)


def _derive_marks(node: fx.Node) -> None:
    sources = node.all_input_nodes
    flows = any(source.meta.get("trainable") for source in sources)
    is_float = any(kind.is_floating for kind in output_types(node))
    node.meta["trainable"] = flows and is_float and op_name(node.target) not in _NO_GRADIENT
    node.meta["random"] = is_random(node)


class Builder:
    """The new graph of one pass, and the only way to add nodes to it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._sizes: dict[sympy.Expr, fx.Node] = {}

    def placeholder(self, name: str, **meta: Any) -> fx.Node:
        """A tensor input (`tensor=`) or a symbolic size (`size=` its symbol)."""
        node = self.graph.create_node("placeholder", name, name=name)
        return self._record(node, meta)

    def state(self, name: str, **meta: Any) -> fx.Node:
        """The get_attr node of a parameter, buffer or constant."""
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self._record(node, meta)

    def _record(self, node: fx.Node, meta: dict[str, Any]) -> fx.Node:
        node.meta.update(meta)
        if "size" in meta:
            self._sizes[meta["size"]] = node
        return node

    def emit(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: dict[str, Any], name: str | None = None
    ) -> fx.Node:
        """A call with the given meta; `trainable` and `random` are derived."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta.update(meta)
        _derive_marks(node)
        return node

    def copy(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], **meta: Any) -> Any:
        """The old node with new arguments: same op, name, types and origin; `meta` overrides."""
        target, merged = node.target, {**node.meta, **meta}
        if node.op == "placeholder":
            return self.placeholder(str(target), **merged)
        if node.op == "get_attr":
            return self.state(str(target), **merged)
        if node.op == "output":
            return self.graph.output(args[0])
        if "size" in merged:
            return self.size(merged["size"], origin(node))
        return self.emit(target, args, kwargs, merged, node.name)

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node,
        tensor: TensorType | None = None,
        tensors: Iterable[TensorType] | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """A node that the user's code does not have; `like` lends its origin, and its type where none is given."""
        kind: dict[str, Any] = (
            {"tensors": tuple(tensors)} if tensors is not None else {"tensor": tensor or tensor_type(like)}
        )
        place: dict[str, Any] = {
            key: like.meta[key] for key in ("origin", "frames", "owner", "device") if key in like.meta
        }
        return self.emit(target, args, kwargs or {}, {**place, **kind}, name)

    def size(self, expr: Size, where: Origin = _NOWHERE) -> Any:
        """The int, or the one node, that computes a size expression."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        if expr.is_Rational or expr.is_Float:
            return float(expr)
        if expr not in self._sizes:
            node = self._size_call(expr, where)
            node.meta.update(size=expr, origin=where)
            self._sizes[expr] = node
        return self._sizes[expr]

    def _size_call(self, expr: sympy.Expr, where: Origin) -> fx.Node:
        if isinstance(expr, sympy.Add):
            first, *rest = sorted(
                expr.args, key=lambda term: (bool(term.could_extract_minus_sign()), term.is_number, str(term))
            )
            left = first if len(rest) == 1 else sympy.Add(first, *rest[:-1])
            last = rest[-1]
            if last.could_extract_minus_sign():
                return self._call_size(operator.sub, left, -last, where)
            return self._call_size(operator.add, left, last, where)
        if isinstance(expr, sympy.Mul):
            *left, last = sorted(expr.args, key=lambda factor: (factor.is_number, str(factor)))
            return self._call_size(operator.mul, sympy.Mul(*left), last, where)
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            return self._call_size(operator.pow, expr.base, expr.exp, where)
        function = _SIZE_FUNCTIONS.get(type(expr).__name__)
        if function is None:
            raise CaptureError(
                f"a tensor size is computed by {expr}, which has no Python form here",
                where=str(where) or None,
                use="an int that does not depend on the input's sizes",
            )
        operands = list(expr.args)
        if function in (builtins.max, builtins.min):  # n-ary and commutative: fold from the left, in a fixed order
            *rest, last = sorted(operands, key=str)
            return self._call_size(function, rest[0] if len(rest) == 1 else type(expr)(*rest), last, where)
        return self.graph.call_function(function, tuple(self.size(operand, where) for operand in operands))

    def _call_size(self, function: Callable[..., Any], left: Any, right: Any, where: Origin) -> fx.Node:
        return self.graph.call_function(function, (self.size(left, where), self.size(right, where)))

    def shape(self, sizes: Iterable[Size], where: Origin = _NOWHERE) -> list[Any]:
        """A shape as an argument: a list of ints and size nodes."""
        return [self.size(size, where) for size in sizes]


def rewrite(graph: fx.Graph, rule: Rule) -> fx.Graph:
    """Apply `rule` to every node in order and return the new graph. Placeholders and the output are copied unasked."""
    builder = Builder()
    mapped: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args = fx.node.map_arg(node.args, mapped.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, mapped.__getitem__)
        if node.op in ("placeholder", "output"):
            mapped[node] = builder.copy(node, args, kwargs)
        else:
            mapped[node] = rule(builder, node, args, kwargs)
    return builder.graph


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The shape of a tensor-valued node."""
    kind = tensor_type(node)
    assert kind is not None, f"{node.format_node()} is not a tensor"
    return kind.shape

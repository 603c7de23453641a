"""The localize pass: from the whole model's graph and a `ShardPlan` to the graph that one rank runs.

Sizes spelled in arguments become the rank's own, reshards are inserted where what a value has differs from what its user wants
(once per value and want, at the first user), ops with a `local` rewrite are replaced. Where no collective fell between a matmul and
its bias the two are fused again, which restores the user's own op bit for bit.

A parameter that the axis does not divide is held without padding (`passes.placement`): each call that reads one gets it through
`pad_shard`, but for ops with a `local` rewrite, which are told the true size.

Every tensor node keeps the whole type in `meta["tensor"]` and gets `meta["sharding"]` (axis -> placement) beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from passes.grouped_heads import group_heads
from passes.ir import (
    Size,
    TensorType,
    is_kept,
    is_state,
    is_trainable,
    output_types,
    size_expr,
    tensor_inputs,
    tensor_type,
)
from passes.local_ops import pad_shard
from passes.op_rule import Strategy
from passes.placement import Placement, Replicate, Shard, is_padded, is_whole, local_size
from passes.reshard import RESHARDS, find_reshard, take_shard
from passes.rules import CONTRACTIONS, rule_of
from passes.shard import ShardPlan
from passes.values import Value, value_of

aten = torch.ops.aten


def localize(module: fx.GraphModule, plan: ShardPlan) -> fx.GraphModule:
    """The graph of one rank of the axis. The given module is not touched."""
    return _Localizer(module, plan).run()


def sharding(node: fx.Node) -> dict[str, Placement]:
    """The placements of a tensor node of a localized graph by mesh axis (Replicate left out)."""
    return node.meta.get("sharding", {})


class _Localizer:
    def __init__(self, module: fx.GraphModule, plan: ShardPlan) -> None:
        self.module, self.plan = module, plan
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.resharded: dict[tuple[Value, Placement], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], lambda n: self._read(n, node)))  # noqa: B023
            elif node in self.plan.strategies and self.plan.axis_size > 1:
                self.copies[node] = self._call(node, self.plan.strategies[node])
            else:
                self.copies[node] = self.graph.node_copy(node, lambda n: self.copies[n])
            if node.op != "output":
                self._annotate(self.copies[node], node)
        self._loss_whole()
        fuse_biases(self.graph)
        group_heads(self.graph)
        self.graph.eliminate_dead_code(is_impure_node=is_kept)
        return fx.GraphModule(self.module, self.graph)

    def _loss_whole(self) -> None:
        """The loss leaves its rank whole: the one output that must."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        for original, copy in list(self.copies.items()):
            if original.meta.get("loss") and tensor_type(original) is not None:
                with self.graph.inserting_before(output):
                    whole = self._placed(original, Replicate(), output)
                if whole is not copy:
                    output.replace_input_with(copy, whole)
                    copy.meta.pop("loss")
                    whole.meta["loss"] = True

    def _annotate(self, copy: fx.Node, node: fx.Node) -> None:
        copy.meta = dict(node.meta)
        if output_types(node) and self.plan.axis_size > 1:
            value = value_of(node)
            placement = self.plan.placements.get(value, Replicate())
            copy.meta["sharding"] = {} if isinstance(placement, Replicate) else {self.plan.axis: placement}

    def _true_size(self, node: fx.Node, placement: Placement) -> int | None:
        """The size of the dim that a placement splits, if the axis does not divide it."""
        kind = tensor_type(node)
        if kind is None or not isinstance(placement, Shard):
            return None
        size = kind.shape[placement.dim]
        return int(size) if is_padded(size, placement, self.plan.axis_size) else None

    def _read(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The copy of a node as its users read it: a parameter's shard with its padding."""
        copy, have = self.copies[node], self.plan.placement(node)
        size = self._true_size(node, have) if is_state(node) else None
        if size is None:
            return copy
        row = next(row for row in RESHARDS if row.function is take_shard)
        arguments = row.arguments(Replicate(), have, (None, size))
        padded = self.graph.call_function(pad_shard, (copy, self.plan.axis), arguments)
        kept = {key: value for key, value in node.meta.items() if key in ("tensor", "trainable")}
        where = {key: value for key, value in user.meta.items() if key in ("origin", "owner", "frames", "segment")}
        padded.meta = {**kept, **where, "sharding": {self.plan.axis: have}, "padded": True}
        return padded

    def _placed(self, node: fx.Node, want: Placement, user: fx.Node, as_held: bool = False) -> fx.Node:
        """The copy of a tensor node in the placement a user wants; a parameter's shard `as_held`, or else with its padding."""
        have = self.plan.placement(node)
        both_whole = is_whole(have) and is_whole(want)
        if have == want or (both_whole and not is_trainable(node)):
            return self.copies[node] if as_held else self._read(node, user)
        key = (value_of(node), want)
        if key not in self.resharded:
            row = find_reshard(have, want)
            assert row is not None, f"no reshard from {have} to {want} for {node}"
            arguments = row.arguments(have, want, (self._true_size(node, have), self._true_size(node, want)))
            if not is_trainable(node):
                arguments.pop("partial_gradient", None)
            arguments = {name: self._with_sizes(value) for name, value in arguments.items()}
            placed = self.graph.call_function(row.function, (self._read(node, user), self.plan.axis), arguments)
            placed.meta = {
                **node.meta,
                "sharding": {} if isinstance(want, Replicate) else {self.plan.axis: want},
                "reshard": row,
            }
            placed.meta.pop("tensors", None)
            placed.meta.pop("loss", None)
            self.resharded[key] = placed
        return self.resharded[key]

    def _call(self, node: fx.Node, strategy: Strategy) -> fx.Node:
        wanted = iter(strategy.inputs)

        def place(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                if tensor_type(arg) is None:
                    return self.copies[arg]
                return self._placed(arg, next(wanted), node, as_held=strategy.local is not None)
            if isinstance(arg, (list, tuple)):
                return type(arg)(place(item) for item in arg)
            return arg

        args = tuple(place(arg) for arg in node.args)
        kwargs = {key: place(value) for key, value in node.kwargs.items()}
        target: Any = node.target
        if strategy.local is not None:
            target, more, kwargs = strategy.local.rewrite(node)
            kwargs = kwargs | self._padded_size(node, strategy)
            tensors = dict(
                zip(
                    tensor_inputs(node),
                    (a for a in _flat(args, kwargs) if isinstance(a, fx.Node) and tensor_type(a) is not None),
                    strict=False,
                )
            )
            args = tuple(
                self.plan.axis
                if arg == "axis"
                else tensors.get(arg, self.copies.get(arg))
                if isinstance(arg, fx.Node)
                else arg
                for arg in more
            )
        else:
            args, kwargs = self._local_sizes(node, args, kwargs, strategy)
        return self.graph.call_function(target, args, kwargs)

    def _padded_size(self, node: fx.Node, strategy: Strategy) -> dict[str, int]:
        """What a rewrite is told of the name it splits, where the axis does not divide it."""
        sizes = [self._true_size(arg, p) for arg, p in zip(tensor_inputs(node), strategy.inputs, strict=True)]
        return next(({"size": size} for size in sizes if size is not None), {})

    def _local_sizes(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], strategy: Strategy
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that spell sizes of a split dim, on one rank."""
        rule = rule_of(node.target)
        if rule is None:
            return args, kwargs
        for name in strategy.split:
            if name in rule.counts:
                args, kwargs = self._with_share(node, rule.counts[name], args, kwargs)
        if rule.sizes is None:
            return args, kwargs
        sizes = list(args[rule.sizes])
        if len(output_types(node)) > 1 or node.target is aten.split_with_sizes.default:
            dim = (args[2] if len(args) > 2 else 0) % len(output_types(node)[0].shape)
            if isinstance(strategy.inputs[0], Shard) and strategy.inputs[0].dim == dim:
                sizes = [self._divided(size, p) for size, p in zip(sizes, strategy.outputs, strict=True)]
        elif isinstance(strategy.outputs[0], Shard):
            dim = strategy.outputs[0].dim
            sizes[dim] = self._divided(sizes[dim], strategy.outputs[0])
        return (*args[: rule.sizes], sizes, *args[rule.sizes + 1 :]), kwargs

    def _with_share(
        self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with this rank's share of the number that the argument `name` gives."""
        position = [argument.name for argument in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
        if position < len(args):
            return (*args[:position], self._divided(args[position]), *args[position + 1 :]), kwargs
        return args, {**kwargs, name: self._divided(kwargs[name])}

    def _with_sizes(self, value: Any) -> Any:
        """An argument with symbolic sizes replaced by the nodes that compute them."""
        if isinstance(value, tuple):
            return tuple(self._with_sizes(item) for item in value)
        if not isinstance(value, sympy.Expr):
            return value
        if value.is_Integer:
            return int(value)
        known = next((copy for node, copy in self.copies.items() if size_expr(node) == value), None)
        if known is not None:
            return known
        assert value.is_Mul, f"no node computes {value}"
        first, *rest = (self._with_sizes(factor) for factor in value.args)
        for factor in rest:
            first = self.graph.call_function(operator.mul, (first, factor))
        first.meta = {"size": value}
        return first

    def _divided(self, size: Any, placement: Placement | None = None) -> Any:
        """A size on one rank; -1 (whatever is left) stays."""
        if isinstance(size, int) and isinstance(placement, Shard) and size > 0:
            return local_size(size, placement, placement.dim, self.plan.axis_size)
        if isinstance(size, int):
            return size // self.plan.axis_size
        divided = self.graph.call_function(operator.floordiv, (size, self.plan.axis_size))
        divided.meta = {**size.meta, "size": size.meta["size"] / self.plan.axis_size}
        return divided


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found: list[Any] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)
        else:
            found.append(arg)

    visit(args)
    visit(tuple(kwargs.values()))
    return found


_BIASED: dict[str, Sequence[Any]] = {
    "linear": (aten.linear.default,),
    "addmm": (aten.mm.default,),
    "convolution": [row.op for row in CONTRACTIONS if "g" in row.counts],
}


def fuse_biases(graph: fx.Graph) -> None:
    """Put back `linear`, `addmm` and convolutions with bias where the bias add still follows its product directly."""
    for add in list(graph.nodes):
        kind = add.meta.get("fused")
        if kind is None or add.target is not aten.add.Tensor:
            continue
        matmul, bias = add.args
        if not isinstance(matmul, fx.Node) or matmul.target not in _BIASED[kind] or len(matmul.users) != 1:
            continue  # a collective came between them
        if kind == "convolution" and (not isinstance(bias, fx.Node) or bias.target is not aten.reshape.default):
            continue
        leading = _leading_sizes(graph, add) if add.meta.get("flat") else None
        if add.meta.get("flat") and leading is None:
            continue
        with graph.inserting_before(add):
            if kind == "convolution":
                convolution: Any = matmul.target
                fused = graph.call_function(
                    convolution, (*matmul.args[:2], bias.args[0], *matmul.args[3:]), matmul.kwargs
                )
            else:
                x, weight = matmul.args
                assert isinstance(x, fx.Node)
                if leading is not None:
                    x = _with_rows(graph.call_function(aten.flatten.using_ints, (x, 0, len(leading) - 1)), x, matmul)
                if kind == "linear":
                    fused = graph.call_function(aten.linear.default, (x, weight, bias))
                else:
                    fused = graph.call_function(aten.addmm.default, (bias, x, weight))
            if leading is not None:
                fused = graph.call_function(aten.unflatten.int, (_with_rows(fused, add, matmul), 0, leading))
        fused.meta = {**add.meta, "origin": matmul.meta.get("origin", add.meta.get("origin"))}
        for mark in ("fused", "flat"):
            fused.meta.pop(mark, None)
        add.replace_all_uses_with(fused)
        graph.erase_node(add)
        graph.erase_node(matmul)


def _leading_sizes(graph: fx.Graph, node: fx.Node) -> list[Any] | None:
    """All sizes of a value but the last, as arguments; None if one of those dims is split: it has no rows to give back."""
    kind = tensor_type(node)
    assert kind is not None
    last = len(kind.shape) - 1
    if any(isinstance(placed, Shard) and placed.dim != last for placed in sharding(node).values()):
        return None
    named = {size_expr(size): size for size in graph.nodes if size.op == "placeholder" and size_expr(size) is not None}
    return [size if isinstance(size, int) else named[size] for size in kind.shape[:last]]


def _with_rows(flat: fx.Node, like: fx.Node, place: fx.Node) -> fx.Node:
    """Gives a node the type of `like` with all dims but the last made one, and the user's line of `place`."""
    kind = tensor_type(like)
    assert kind is not None
    rows: Size = 1
    for size in kind.shape[:-1]:
        rows = rows * size
    placed = {axis: replace(p, dim=1) if isinstance(p, Shard) else p for axis, p in sharding(like).items()}
    where: dict[str, Any] = {
        key: place.meta[key] for key in ("origin", "owner", "frames", "segment") if key in place.meta
    }
    rows_type = TensorType(kind.dtype, (rows, kind.shape[-1]))
    flat.meta = {"trainable": is_trainable(like), **where, "tensor": rows_type, "sharding": placed}
    return flat

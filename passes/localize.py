"""The localize pass: from the whole model's graph and a `ShardPlan` to the graph that one rank runs.

Sizes spelled in arguments become the rank's own, reshards are inserted where what a value has differs from what its user wants
(once per value and want, at the first user), ops with a `local` rewrite are replaced. Where no collective fell between a matmul and
its bias the two are fused again, which restores the user's own op bit for bit.

Every tensor node keeps the whole type in `meta["tensor"]` and gets `meta["sharding"]` (axis -> placement) beside it.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from passes.grouped_heads import group_heads
from passes.ir import is_kept, is_trainable, output_types, size_expr, tensor_inputs, tensor_type
from passes.placement import Placement, Replicate, Shard, is_whole
from passes.reshard import find_reshard
from passes.rules import RULES, Strategy
from passes.shard import ShardPlan, Value, value_of

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
                self.graph.output(fx.map_arg(node.args[0], lambda n: self.copies[n]))
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
                    whole = self._placed(original, Replicate())
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

    def _placed(self, node: fx.Node, want: Placement) -> fx.Node:
        """The copy of a tensor node in the placement a user wants."""
        have = self.plan.placement(node)
        copy = self.copies[node]
        both_whole = is_whole(have) and is_whole(want)
        if have == want or (both_whole and not is_trainable(node)):
            return copy
        key = (value_of(node), want)
        if key not in self.resharded:
            row = find_reshard(have, want)
            assert row is not None, f"no reshard from {have} to {want} for {node}"
            arguments = row.arguments(have, want)
            if not is_trainable(node):
                arguments.pop("partial_gradient", None)
            arguments = {name: self._with_sizes(value) for name, value in arguments.items()}
            placed = self.graph.call_function(row.function, (copy, self.plan.axis), arguments)
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
                return self._placed(arg, next(wanted)) if tensor_type(arg) is not None else self.copies[arg]
            if isinstance(arg, (list, tuple)):
                return type(arg)(place(item) for item in arg)
            return arg

        args = tuple(place(arg) for arg in node.args)
        kwargs = {key: place(value) for key, value in node.kwargs.items()}
        target: Any = node.target
        if strategy.local is not None:
            target, more, kwargs = strategy.local.rewrite(node)
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
            args = self._local_sizes(node, args, strategy)
        return self.graph.call_function(target, args, kwargs)

    def _local_sizes(self, node: fx.Node, args: tuple[Any, ...], strategy: Strategy) -> tuple[Any, ...]:
        """Arguments that spell sizes of a split dim, on one rank."""
        rule = RULES.get(node.target)
        if rule is None or rule.sizes is None:
            return args
        sizes = list(args[rule.sizes])
        if len(output_types(node)) > 1 or node.target is aten.split_with_sizes.default:
            dim = (args[2] if len(args) > 2 else 0) % len(output_types(node)[0].shape)
            if isinstance(strategy.inputs[0], Shard) and strategy.inputs[0].dim == dim:
                sizes = [self._divided(size) for size in sizes]
        elif isinstance(strategy.outputs[0], Shard):
            sizes[strategy.outputs[0].dim] = self._divided(sizes[strategy.outputs[0].dim])
        return (*args[: rule.sizes], sizes, *args[rule.sizes + 1 :])

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

    def _divided(self, size: Any) -> Any:
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


def fuse_biases(graph: fx.Graph) -> None:
    """Put back `linear` and `addmm` where the bias add still follows its matmul directly."""
    for add in list(graph.nodes):
        kind = add.meta.get("fused")
        if kind is None or add.target is not aten.add.Tensor:
            continue
        matmul = next(
            (a for a in add.args if isinstance(a, fx.Node) and a.target in (aten.linear.default, aten.mm.default)), None
        )
        if matmul is None or len(matmul.users) != 1 or len(matmul.args) != 2:
            continue
        bias = next(a for a in add.args if a is not matmul)
        with graph.inserting_before(add):
            if kind == "linear":
                fused = graph.call_function(aten.linear.default, (*matmul.args, bias))
            else:
                fused = graph.call_function(aten.addmm.default, (bias, *matmul.args))
        fused.meta = {**add.meta, "origin": matmul.meta.get("origin", add.meta.get("origin"))}
        del fused.meta["fused"]
        add.replace_all_uses_with(fused)
        graph.erase_node(add)
        graph.erase_node(matmul)

"""What a part of the model costs one rank, as expressions: FLOPs and bytes in batch B, sequence T and the sizes of the mesh axes.

The shapes of a localized graph's values are whole sizes and placements; with each axis size a symbol, a split dim of 3072 is
`3072/tp`, and `costmodel.ops` gives the same formulas for it as for numbers. Numbers come from these expressions alone: `at` compiles
them once (sympy.lambdify, arrays welcome) and puts sizes in.

An expression in `tp` holds the placements fixed: another tp may lead the planner to other ones, and its plan has their expressions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from inspect import signature
from typing import Any

import sympy
from torch import fx

from costmodel.cost import Amount, Cost, total
from costmodel.errors import BadArgument
from costmodel.ops import TensorShape, op_cost, op_saves
from passes.call_cost import result_sharding, typed
from passes.costs import op_name
from passes.ir import (
    Size,
    TensorType,
    calls,
    is_state,
    is_trainable,
    origin,
    output_types,
    size_symbol,
    tensor_inputs,
    tensor_type,
)
from passes.localize import sharding
from passes.placement import Copied, Placement, Shard, per_block, segment_sizes
from passes.reshard import RESHARDS
from passes.values import value_of


@dataclass(frozen=True)
class ModuleCost:
    """Costs of the ops under a module path, on one rank, of one microbatch of `B` rows; sympy expressions where they depend on sizes.

    FLOPs: a multiplication and an addition are two. read and written: memory traffic of forward and backward, one kernel an op.
    saved: what autograd keeps from forward to backward, each value once. communication: what a rank puts on the wire in collectives
    (not the sends between stages). parameters: elements that one rank holds.
    """

    path: str
    forward_flops: Amount
    backward_flops: Amount
    read_bytes: Amount
    written_bytes: Amount
    saved_bytes: Amount
    communication_bytes: Amount
    parameters: Amount
    sizes: Mapping[str, int] = field(default_factory=dict)  # the plan's own numbers: what `at()` puts in

    @property
    def expressions(self) -> dict[str, Amount]:
        """The figures by name."""
        return {name: getattr(self, name) for name in FIGURES}

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The sizes that the figures depend on, sorted."""
        found = {str(s) for value in self.expressions.values() if isinstance(value, sympy.Basic) for s in value.free_symbols}
        return tuple(sorted(found))

    @cached_property
    def _compiled(self) -> Callable[..., list[Any]]:
        return sympy.lambdify([size_symbol(name) for name in self.symbols], list(self.expressions.values()), modules="numpy")

    def at(self, **sizes: Any) -> dict[str, Any]:
        """The figures as numbers: `cost.at(B=4, tp=8)`; the plan's own sizes where none is given. A numpy array of sizes gives arrays.

        BadArgument for a size that the plan does not know.
        """
        if unknown := [name for name in sizes if name not in self.sizes]:
            raise BadArgument(f"the plan has no size {', '.join(unknown)}", use=f"any of {', '.join(self.sizes)}")
        given = {**self.sizes, **sizes}
        values = self._compiled(*(given[name] for name in self.symbols))
        return dict(zip(FIGURES, map(_exact, values), strict=True))

    def __str__(self) -> str:
        numbers = self.at()
        width = max(map(len, FIGURES))
        lines = [f"{self.path or 'the whole model'}: one rank, one microbatch, {', '.join(f'{n} = {self.sizes[n]}' for n in self.symbols)}"]
        for name, value in self.expressions.items():
            lines.append(f"  {name:<{width}}  {number_text(numbers[name]):>10}  = {sympy.sstr(value)}")
        return "\n".join(lines)


FIGURES = tuple(item.name for item in fields(ModuleCost) if item.name not in ("path", "sizes"))


# Which collectives a reshard runs forward and backward, by its function and whether its gradient is a partial sum; and how many
# times (n-1)/n of the whole value each rank sends in one (ring algorithms: Patarasuk and Yuan 2009).
_COLLECTIVES: dict[tuple[Any, bool], tuple[str, str]] = {
    (row.function, Copied in (row.have, row.want) and "partial_gradient" in signature(row.function).parameters): (row.forward, row.backward)
    for row in RESHARDS
}
_WIRE_SHARES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


def number_text(value: float) -> str:
    """Four digits with a decimal prefix: `12.58 M`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _exact(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def module_cost(graphs: Iterable[fx.Graph], path: str, axis_sizes: Mapping[str, int], sizes: Mapping[str, int]) -> ModuleCost:
    """The cost of the ops under `path` ("" for all) in localized graphs; `sizes` are numbers for the symbols, of a microbatch.

    BadArgument if no op is under the path.
    """
    costs: list[Cost] = []
    saved_terms: list[Any] = []
    communicated: list[Any] = []
    parameters: dict[str, Any] = {}
    found = False
    for graph in graphs:
        saved: set[object] = set()
        for node in calls_under(graph, path):
            found = True
            for each in tensor_inputs(node):
                kind = tensor_type(each)
                if is_state(each) and each.meta.get("kind") == "parameter" and kind is not None:
                    parameters[str(each.target)] = local_shape(kind, sharding(each), axis_sizes).numel
            collectives = _COLLECTIVES.get((node.target, bool(node.kwargs.get("partial_gradient", False))))
            if collectives is not None:
                whole, axis = TensorShape(typed(node).shape, typed(node).dtype.itemsize), size_symbol(str(node.args[1]))
                used = collectives if is_trainable(node) else collectives[:1]
                communicated += [_WIRE_SHARES[name] * (axis - 1) / axis * whole.num_bytes for name in used if name]
                continue
            if node.target is operator.getitem or not output_types(node):
                continue
            cost, kept = _call_cost(node, axis_sizes, saved)
            costs.append(cost)
            saved_terms += kept
    if not found:
        raise BadArgument(f"no op of the plan is under the module path {path!r}", use="a module's path such as the WEIGHTS table shows")
    sum_of = total(costs)
    return ModuleCost(
        path,
        forward_flops=_tidy(sum_of.forward_flops),
        backward_flops=_tidy(sum_of.backward_flops),
        read_bytes=_tidy(sum_of.read_bytes + sum_of.backward_read_bytes),
        written_bytes=_tidy(sum_of.written_bytes + sum_of.backward_written_bytes),
        saved_bytes=_tidy(_sum(saved_terms)),
        communication_bytes=_tidy(_sum(communicated)),
        parameters=_tidy(_sum(list(parameters.values()))),
        sizes={**sizes, **axis_sizes},
    )


def is_under(place: str, path: str) -> bool:
    """True if a module path is `path` or below it."""
    return not path or place == path or place.startswith(path + ".")


def calls_under(graph: fx.Graph, path: str) -> list[fx.Node]:
    """The calls of the module at `path`: written in its code or below, or reading its parameters, with what moves those calls' results.

    Graphs keep the module whose code has the line; of torch's own layers (a Linear) their parameters tell which call is theirs.
    """
    found: dict[fx.Node, None] = {}
    for node in calls(graph):
        state = [n for n in node.all_input_nodes if is_state(n) and is_under(str(n.target), path)]
        follows = _is_reshard(node) and any(n in found for n in node.all_input_nodes)
        if is_under(origin(node).path, path) or state or follows:
            found[node] = None
    return list(found)


def _is_reshard(node: fx.Node) -> bool:
    return (node.target, bool(node.kwargs.get("partial_gradient", False))) in _COLLECTIVES


def _call_cost(node: fx.Node, axis_sizes: Mapping[str, int], saved: set[object]) -> tuple[Cost, list[Any]]:
    """The cost of a call and the bytes it keeps that are not in `saved` yet; `saved` gets them."""
    inputs = tensor_inputs(node)
    shapes = [local_shape(typed(n), sharding(n), axis_sizes) for n in inputs]
    results = [local_shape(kind, result_sharding(node, k), axis_sizes) for k, kind in enumerate(output_types(node))]
    trainable = tuple(is_trainable(n) for n in inputs)
    name = op_name(node.target)
    causal = "scaled_dot_product_attention" in name and len(node.args) > 5 and bool(node.args[5])
    cost = op_cost(name, shapes, results, trainable, causal)
    kept: list[Any] = []
    if is_trainable(node):
        saves = op_saves(name, shapes, results, trainable, causal)
        kept.append(saves.extra_bytes)
        for index in saves.inputs:
            value = value_of(inputs[index])
            if value not in saved and not is_state(inputs[index]):
                saved.add(value)
                kept.append(shapes[index].num_bytes)
        for index in saves.outputs:
            if (node, index) not in saved:
                saved.add((node, index))
                kept.append(results[index].num_bytes)
    return cost, kept


def local_shape(kind: TensorType, placements: Mapping[str, Placement], axis_sizes: Mapping[str, int]) -> TensorShape:
    """One rank's shape of a value, with the size of each mesh axis as a symbol of the axis' name."""
    shape: list[Size] = list(kind.shape)
    for axis, placement in placements.items():
        if isinstance(placement, Shard):
            shape[placement.dim] = _local_size(shape[placement.dim], placement, size_symbol(axis), axis_sizes[axis])
    return TensorShape(tuple(shape), kind.dtype.itemsize, kind.is_floating)


def _local_size(size: Size, placement: Shard, axis: sympy.Symbol, axis_size: int) -> Size:
    """size / axis; where the planned axis does not divide a block, its whole units over the axis, rounded up."""
    blocks = segment_sizes(size, placement.segments) if isinstance(size, int) else None
    if blocks is None:
        return sympy.sympify(size) / axis
    units = per_block(placement.unit, len(blocks))
    pieces = []
    for block, unit in zip(map(int, blocks), units, strict=True):
        unit = unit if block % unit == 0 else 1
        count = block // unit
        pieces.append(sympy.Integer(block) / axis if count % axis_size == 0 else unit * sympy.ceiling(sympy.Integer(count) / axis))
    return sympy.Add(*pieces)


def _sum(terms: Sequence[Any]) -> Any:
    numbers = sum(term for term in terms if not isinstance(term, sympy.Basic))
    return sympy.Add(numbers, *(term for term in terms if isinstance(term, sympy.Basic)))


def _tidy(value: Any) -> Any:
    """Multiplied out, so that like terms of several ops are one."""
    return sympy.expand(value) if isinstance(value, sympy.Basic) else value

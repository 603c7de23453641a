"""From a rule to strategies: every legal way to run one call over the ranks of an axis (see `passes.rules` for what a row promises)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from passes.annotation import Binding, Cut
from passes.ir import Size, is_state, output_types, tensor_inputs
from passes.op_rule import Local, OpRule, Strategy
from passes.patterns import Call, call_of
from passes.placement import COPIED, PARTIAL, REPLICATE, Placement, Shard, divides
from passes.rules import rule_of


def _linear_strategies(kind: str, call: Call, differentiable: Sequence[bool]) -> list[Strategy]:
    inputs, after = len(call.inputs), (PARTIAL,) * len(call.outputs)
    sums = [value.is_floating for value in call.inputs]  # masks and counts are no sums
    if kind == "sum":
        return [Strategy((PARTIAL,) * inputs, after)] if inputs and all(sums) else []
    positions = {"first": range(1), "each": range(inputs), "": range(0)}[kind]
    return [
        Strategy(tuple(PARTIAL if k == at else _whole(differentiable[k]) for k in range(inputs)), after)
        for at in positions
        if sums[at]
    ]


def _whole(differentiable: bool) -> Placement:
    return COPIED if differentiable else REPLICATE


def strategies(
    rule: OpRule | None, call: Call, *, axis_size: int, differentiable: Sequence[bool], result_differentiable: bool,
    cuts: Callable[[Binding, tuple[str, ...]], Sequence[Cut]], splittable: Callable[[Size], bool], zeros: Sequence[bool] = (),
) -> list[Strategy]:  # fmt: skip
    """Every legal way to run `call` over an axis of `axis_size` ranks, the whole one first.

    `differentiable[i]`: a gradient flows into argument i. `cuts` gives the block structures to try for a split name, `splittable`
    says whether a name of that size may be split at all (batch and sequence may be reserved for other axes). `zeros[i]`: what
    argument i has in its padding is zero (see `zero_padded`).
    """
    inputs, outputs = len(call.inputs), len(call.outputs)
    found = [Strategy((REPLICATE,) * inputs, (REPLICATE,) * outputs)]
    if result_differentiable:
        found.append(Strategy(tuple(map(_whole, differentiable)), (COPIED,) * outputs))
    if rule is None:
        return found
    binding = rule.binding(call)
    for group in binding.choices:
        if not all(splittable(binding.sizes[name]) for name in group):
            continue
        local = rule.local.get(group[0])
        for cut in cuts(binding, group):
            if local is not None and (cut.segments != 1 or cut.piece):
                continue
            padded = binding.is_padded(group, cut, axis_size)
            if padded and any(name in rule.counts for name in group):
                continue
            if padded and not (local.padding if local is not None else _may_be_padded(rule, call, binding, group, zeros)):
                continue
            lacking = local.output if local is not None else REPLICATE if rule.shared_results else PARTIAL
            strategy = _split_strategy(binding, group, cut, axis_size, differentiable, lacking, local)
            if strategy is not None and strategy.is_split:
                found.append(strategy)
    linear = rule.linear if isinstance(rule.linear, str) else rule.linear(call)
    if result_differentiable:
        found += _linear_strategies(linear, call, differentiable)
    return found


def _may_be_padded(rule: OpRule, call: Call, binding: Binding, group: tuple[str, ...], zeros: Sequence[bool]) -> bool:
    """True if a call may run with a padded name, see `passes.rules`."""
    padding = rule.padding_of(call)
    if padding == "":
        return False
    inputs = [binding.concerned(*pair, group) is not None for pair in zip(binding.inputs, binding.input_shapes, strict=True)]
    outputs = [binding.concerned(*pair, group) is not None for pair in zip(binding.outputs, binding.output_shapes, strict=True)]
    if padding in ("first", "mask"):
        barred = [k > 0 if padding == "first" else value.dtype == torch.bool for k, value in enumerate(call.inputs)]
        return all(outputs) and not any(has and bar for has, bar in zip(inputs, barred, strict=True))
    return all(outputs) or (padding == "product" and any(has and zero for has, zero in zip(inputs, zeros, strict=False)))


def zero_padded(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values are zero wherever a split pads them: parameters and buffers, and what views and multiples make of them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_state(node) or (node.target is operator.getitem and node.args[0] in found):
            found.add(node)
        elif node.op == "call_function" and tensor_inputs(node) and found.issuperset(tensor_inputs(node)):
            rule = rule_of(node.target)
            if rule is not None and output_types(node) and rule.padding_of(call_of(node)) == "zeros":
                found.add(node)
    return found


def _in_blocks(size: Size, segments: Size | tuple[int, ...], axis_size: int) -> bool:
    """True if a name of that size has these blocks; symbolic ones have to be divided by the axis as well, numbers may be padded."""
    if isinstance(size, int) and isinstance(segments, (int, tuple)):
        return divides(size, segments, 1)
    return divides(size, segments, axis_size)


def _split_strategy(
    binding: Binding,
    group: tuple[str, ...],
    cut: Cut,
    axis_size: int,
    differentiable: Sequence[bool],
    lacking: Placement,
    local: Local | None,
) -> Strategy | None:
    if len(group) == 1 and not _in_blocks(binding.sizes[group[0]], cut.segments, axis_size):
        return None  # a dim made of several names may divide where this one does not
    inputs: list[Placement] = []
    for pattern, shape, needs_gradient in zip(binding.inputs, binding.input_shapes, differentiable, strict=True):
        shard = binding.shard(pattern, shape, group, cut, axis_size)
        if shard is False:
            return None
        inputs.append(shard if isinstance(shard, Shard) else _whole(needs_gradient))
    outputs: list[Placement] = []
    for pattern, shape in zip(binding.outputs, binding.output_shapes, strict=True):
        shard = binding.shard(pattern, shape, group, cut, axis_size)
        if shard is False:
            return None
        outputs.append(shard if isinstance(shard, Shard) else lacking)
    return Strategy(tuple(inputs), tuple(outputs), group, local)

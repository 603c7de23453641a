"""What one localized call costs a rank: its shapes there, and the cost that its row in `costmodel.ops` gives them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from costmodel.cost import Cost
from costmodel.op_row import Saved, TensorShape
from costmodel.ops import op_cost, op_saves
from passes.costs import Pricing, op_name
from passes.ir import TensorType, is_trainable, output_types, tensor_inputs, tensor_type
from passes.localize import sharding
from passes.placement import Placement, local_type


@dataclass(frozen=True)
class CallCost:
    """The cost of a call, with what it is made from: one rank's shapes of tensor inputs and results, and what autograd keeps."""

    cost: Cost
    inputs: tuple[TensorShape, ...]
    results: tuple[TensorShape, ...]
    saves: Saved


def call_cost(node: fx.Node, pricing: Pricing, axis_sizes: Mapping[str, int]) -> CallCost:
    """Of a localized call that is not a reshard."""
    sources = tensor_inputs(node)
    inputs = tuple(pricing.shape(local_type(typed(source), sharding(source), axis_sizes)) for source in sources)
    results = tuple(
        pricing.shape(local_type(kind, result_sharding(node, index), axis_sizes)) for index, kind in enumerate(output_types(node))
    )
    trainable = tuple(map(is_trainable, sources))
    name = op_name(node.target)
    causal = "scaled_dot_product_attention" in name and len(node.args) > 5 and bool(node.args[5])
    kept = op_saves(name, inputs, results, trainable, causal) if is_trainable(node) else Saved()
    return CallCost(op_cost(name, inputs, results, trainable, causal), inputs, results, kept)


def typed(node: fx.Node) -> TensorType:
    """The type of a node that is a tensor."""
    kind = tensor_type(node)
    assert kind is not None
    return kind


def result_sharding(node: fx.Node, index: int) -> Mapping[str, Placement]:
    """The sharding of one result of a call: of several, that of the piece taken from it."""
    if tensor_type(node) is not None:
        return sharding(node)
    user = next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)
    return sharding(user) if user is not None else {}

"""Calls on elements that share a kernel: the memory traffic that compilers and hand-written kernels save.

Eager torch runs one kernel a call: `dropout(x + bias)` writes the sum and reads it again. torch.compile, and the kernels that Megatron-LM
and Transformer Engine bring along (bias and GELU; bias, dropout and residual; scale, mask and softmax), do such a chain in one. The rule:
where a call on elements makes a value that only one other call reads, and that one is on elements too or normalises (softmax, norms), the
two are one kernel and the value never is in memory. Backward likewise: the value's gradient stays inside if the kernels on both sides make
gradients of their own, and is written but not read again if the first only hands it on. What autograd keeps is written all the same, so
memory is as without.

Sources: Chen et al., "TVM", OSDI 2018, section 3 (calls on elements fuse with each other and into reductions); Narayanan et al.,
"Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021, section 4.2, for what Megatron-LM fuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from costmodel.cost import Cost
from costmodel.ops import is_on_elements, is_view, normalises
from passes.call_cost import CallCost, call_cost
from passes.costs import Pricing, op_name
from passes.ir import calls, is_trainable, output_types, tensor_inputs


@dataclass(frozen=True)
class Joined:
    """What of a call's traffic stays inside kernels. Inputs by index: not read forward; their gradients not written backward."""

    reads: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    unwritten: bool = False  # its result
    gradient_unread: bool = False  # the gradient of its result

    def cost(self, found: CallCost) -> Cost:
        """The call's cost less that traffic."""
        cost, result = found.cost, found.results[0].num_bytes
        return replace(
            cost,
            read_bytes=_less(cost.read_bytes, sum(found.inputs[k].num_bytes for k in self.reads)),
            written_bytes=_less(cost.written_bytes, result * self.unwritten),
            backward_read_bytes=_less(cost.backward_read_bytes, result * self.gradient_unread),
            backward_written_bytes=_less(cost.backward_written_bytes, sum(found.inputs[k].num_bytes for k in self.gradients)),
        )


def _less(amount: Any, saved: Any) -> Any:
    return max(amount - saved, 0)


@dataclass
class _Open:
    reads: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    unwritten: bool = False
    gradient_unread: bool = False


def joined_calls(graph: fx.Graph, pricing: Pricing, axis_sizes: Mapping[str, int]) -> dict[fx.Node, Joined]:
    """The calls of a localized graph that share kernels with others. `pricing`: at any sizes; which calls join does not depend on them."""
    costs = {node: call_cost(node, pricing, axis_sizes) for node in calls(graph) if _joins(node)}
    found: dict[fx.Node, _Open] = {}
    for producer in costs:
        reader = _only_reader(producer)
        if reader is None or reader[0] not in costs or not is_on_elements(op_name(producer.target)):
            continue
        consumer, index = reader
        first, second = found.setdefault(producer, _Open()), found.setdefault(consumer, _Open())
        second.reads.append(index)
        first.unwritten = 0 not in costs[producer].saves.outputs and index not in costs[consumer].saves.inputs
        if is_trainable(producer) and _makes_gradients(costs[consumer]):
            first.gradient_unread = True
            if _makes_gradients(costs[producer]):
                second.gradients.append(index)
    return {
        node: Joined(tuple(one.reads), tuple(one.gradients), one.unwritten, one.gradient_unread) for node, one in found.items()
    }


def _joins(node: fx.Node) -> bool:
    if node.meta.get("reshard") or len(output_types(node)) != 1:
        return False
    name = op_name(node.target)
    return is_on_elements(name) or normalises(name)


def _only_reader(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The one call that reads a value, and as which of its inputs; views in between are looked through."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function" or user.meta.get("reshard"):
            return None
        if not is_view(op_name(user.target)):
            places = [k for k, source in enumerate(tensor_inputs(user)) if source is node]
            return (user, places[0]) if len(places) == 1 else None
        node = user
    return None


def _makes_gradients(found: CallCost) -> bool:
    """False where a gradient is handed on as it came, as a sum's are."""
    largest = max((shape.num_bytes for shape in found.inputs), default=0)
    return bool(found.cost.backward_written_bytes >= largest > 0)

"""The line: a localized graph's parametric calls in the user's order, and what the cut pass asks about a stretch of them.

Everything that does not depend on parameters (masks, positions, shifted labels) takes no place on the line: each stage that needs it
computes it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.call_cost import call_cost
from passes.costs import Pricing
from passes.fused import Joined
from passes.ir import calls, is_state, is_trainable, output_types, tensor_inputs, tensor_type
from passes.localize import sharding
from passes.placement import local_type
from passes.reshard import Reshard, collective_seconds
from passes.rules import CONTRACTIONS
from passes.values import computed_once, value_of

_CONTRACTIONS = frozenset(row.op for row in CONTRACTIONS)
NEVER = 10**30  # bytes: no cut here


@dataclass(frozen=True)
class NodeCost:
    """Local seconds of one call, the collectives' share of them, and the bytes only it keeps for backward."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    collective_seconds: float = 0.0
    saved_bytes: float = 0.0


def node_cost(
    node: fx.Node, pricing: Pricing, axis_sizes: Mapping[str, int], saved: set[object], joined: Mapping[fx.Node, Joined] | None = None
) -> NodeCost:
    """What a localized call costs one rank. `saved` holds the values already counted as kept; new ones are added. `joined`: the calls that
    share kernels (`passes.fused`); None: each has its own.
    """
    row = node.meta.get("reshard")
    kind = tensor_type(node)
    if isinstance(row, Reshard):
        assert kind is not None
        axis_size = axis_sizes[str(node.args[1])]
        link = pricing.link(axis_size)
        times = [
            collective_seconds(name, num_bytes=pricing.num_bytes(kind), axis_size=axis_size, link=link)
            for name in (row.forward, row.backward if is_trainable(node) else "")
        ]
        return NodeCost(times[0], times[1], sum(times), 0.0)
    found = call_cost(node, pricing, axis_sizes)
    inputs, weights = tensor_inputs(node), node.target in _CONTRACTIONS and any(map(is_state, tensor_inputs(node)))
    cost = joined[node].cost(found) if joined and node in joined else found.cost
    forward, backward = pricing.seconds(cost, output_types(node)[0], weights)
    num_bytes = float(found.saves.extra_bytes)
    for index in found.saves.inputs:
        value = value_of(inputs[index])
        if value not in saved and not is_state(inputs[index]):
            saved.add(value)
            num_bytes += float(found.inputs[index].num_bytes)
    for index in found.saves.outputs:
        if (node, index) not in saved:
            saved.add((node, index))
            num_bytes += float(found.results[index].num_bytes)
    return NodeCost(forward, backward, 0.0, num_bytes)


class Line:
    """The parametric calls in order, with everything the dynamic programme asks about a range of them."""

    def __init__(self, module: fx.GraphModule, pricing: Pricing, axis_sizes: Mapping[str, int]) -> None:
        graph = module.graph
        self.pricing, self.axis_sizes = pricing, axis_sizes
        self.parametric = computed_once(graph)
        self.nodes = [
            node
            for node in calls(graph)
            if (node in self.parametric
            and output_types(node))
            or (node.target is operator.getitem
            and node in self.parametric)
        ]
        self.position = {node: k for k, node in enumerate(self.nodes)}
        saved: set[object] = set()
        self.costs = [
            NodeCost() if n.target is operator.getitem else node_cost(n, pricing, axis_sizes, saved) for n in self.nodes
        ]
        count = len(self.nodes)
        self.crossing = [0] * (count + 1)  # bytes, and how many values
        self.num_crossing = [0] * (count + 1)
        values = [0] * (count + 2)
        difference = [0] * (count + 2)  # ints: exact however large
        for node in self.nodes:
            last = max((self.position[user] for user in node.users if user in self.position), default=-1)
            kind = tensor_type(node)
            if last > self.position[node] and kind is not None:
                num_bytes = pricing.num_bytes(local_type(kind, sharding(node), axis_sizes))
                difference[self.position[node] + 1] += num_bytes
                difference[last + 1] -= num_bytes
                values[self.position[node] + 1] += 1
                values[last + 1] -= 1
            elif last > self.position[node]:
                # a tuple result (split) crosses as its parts do; cutting between is never wanted
                difference[self.position[node] + 1] += NEVER
                difference[last + 1] -= NEVER
        for start, end in self._pinned(graph):
            difference[start + 1] += NEVER
            difference[end + 1] -= NEVER
        running = 0
        for k in range(count + 1):
            running += difference[k]
            self.crossing[k] = running
            self.num_crossing[k] = values[k] + (self.num_crossing[k - 1] if k else 0)
        self.first_use: list[list[tuple[int, int]]] = [
            [] for _ in range(count)
        ]  # per node: (parameter bytes' count, previous use)
        for node in graph.nodes:
            kind = tensor_type(node)
            if is_state(node) and kind is not None and node.meta.get("kind") == "parameter":
                numel = pricing.num_bytes(local_type(kind, sharding(node), axis_sizes)) // kind.dtype.itemsize
                previous = -1
                for use in sorted(self.position[user] for user in node.users if user in self.position):
                    self.first_use[use].append((numel, previous))
                    previous = use

    def _pinned(self, graph: fx.Graph) -> list[tuple[int, int]]:
        """First and last place that reads or updates a buffer whose update depends on parameters: one stage has to have them all."""
        updated = {name for node in self.nodes for name in node.meta.get("mutates", ())}
        reads: dict[fx.Node, set[str]] = {}  # which of these buffers a node off the line is computed from
        places: dict[str, list[int]] = {name: [] for name in updated}
        for node in graph.nodes:
            found = (
                {str(node.target)} & updated
                if is_state(node)
                else set().union(*(reads.get(n, set()) for n in node.all_input_nodes))
            )
            if node not in self.position:
                reads[node] = found
                continue
            for name in found:
                places[name].append(self.position[node])
        return [(min(found), max(found)) for found in places.values()]

    def first_own(self, place: int) -> fx.Node:
        """The first call from `place` on that is the user's own, not a reshard."""
        return next((node for node in self.nodes[place:] if not node.meta.get("reshard")), self.nodes[place])

    def parameters_between(self, start: int, end: int) -> int:
        """Parameters (elements on one rank) that calls start..end-1 use, each once."""
        return sum(numel for k in range(start, end) for numel, previous in self.first_use[k] if previous < start)


def running_sums(values: Sequence[float]) -> list[float]:
    total, sums = 0.0, [0.0]
    for value in values:
        total += value
        sums.append(total)
    return sums

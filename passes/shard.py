"""The shard pass: the cheapest legal placement of every value on one mesh axis, found from costs.

Each call picks one of its rule's strategies and each parameter a placement: `passes.shard_problem` builds the variables, the choices and
the objective, `passes.elimination` solves it exactly.

Activations are split by weights: a value becomes split where it meets a split weight, whole again where a sum over the split dim
is all-reduced, and a whole value is sliced only to join another that is split (replicated k and v beside the heads of q). Splitting
and gathering values between the matmuls (the rows of RESHARDS that regroup) is left to sequence parallelism, which may split the
sequence dims (symbolic sizes other than the batch) of norms, dropouts and residuals. Batch dims are other axes' to split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from costmodel.errors import NoLegalSharding
from passes.annotation import Binding
from passes.block_cuts import BlockCuts
from passes.costs import Pricing
from passes.ir import calls, is_state, tensor_inputs, tensor_type
from passes.op_rule import Strategy
from passes.patterns import Call, call_of
from passes.placement import REPLICATE, Placement
from passes.rules import rule_of
from passes.shard_problem import Infeasible, Pins, Problem, Repeats, SequenceParallel, Users
from passes.strategies import zero_padded
from passes.values import Value, depends_on_parameters, is_call, value_of


@dataclass(frozen=True)
class ShardPlan:
    """The result: a strategy for every call, a placement for every value, and what the objective came to."""

    axis: str
    axis_size: int
    strategies: Mapping[fx.Node, Strategy]
    placements: Mapping[Value, Placement]
    objective_seconds: float
    without_rule: tuple[fx.Node, ...] = field(default=())

    def placement(self, node: fx.Node) -> Placement:
        """The placement of a tensor node's value."""
        return self.placements.get(value_of(node), REPLICATE)


def shard(
    module: fx.GraphModule, *, axis: str, axis_size: int, pricing: Pricing, microbatches: int = 1, in_flight: int = 1,
    loss: fx.Node | None = None, pins: Pins | None = None, sequence_parallel: SequenceParallel = False,
    may_regroup: bool = True, repeats: Repeats = lambda node: 1,
) -> ShardPlan:  # fmt: skip
    """The cheapest assignment of strategies and placements for one axis. The graph is not touched.

    `loss` must come out whole; other results of the model may stay split. `pins(name, type, choices)` narrows a parameter's choices.
    `repeats`: of a folded graph, how many nodes of the model each stands for. `sequence_parallel`: whether values between the matmuls
    may be split over tokens: False, "auto" (where it is cheaper), True (wherever an op can be). NoLegalSharding if the pins leave no
    assignment; with `may_regroup` only after values between the matmuls may be split and gathered anywhere.
    """
    given = (module, axis, axis_size, pricing, microbatches, in_flight, loss, pins, sequence_parallel, repeats)
    try:
        return _shard(*given, regroup=False)
    except Infeasible:
        pass
    try:
        if not may_regroup:
            raise Infeasible
        return _shard(*given, regroup=True)  # what a user pins may need values split where no matmul splits them
    except Infeasible:
        raise NoLegalSharding(
            "no assignment of placements satisfies the overrides", why="two of them contradict each other or an op rule"
        ) from None


def _shard(
    module: fx.GraphModule, axis: str, axis_size: int, pricing: Pricing, microbatches: int, in_flight: int,
    loss: fx.Node | None, pins: Pins | None, sequence_parallel: SequenceParallel, repeats: Repeats, *, regroup: bool,
) -> ShardPlan:  # fmt: skip
    graph = module.graph
    nodes = {node: call_of(node) for node in calls(graph) if is_call(node)}
    if axis_size == 1:
        whole = {
            node: Strategy((REPLICATE,) * len(c.inputs), (REPLICATE,) * len(c.outputs)) for node, c in nodes.items()
        }
        return ShardPlan(axis, 1, whole, {}, 0.0)
    parametric = depends_on_parameters(graph)
    bindings = {
        node: found for node, call in nodes.items() if node in parametric and (found := _binding(call)) is not None
    }
    unruled = tuple(
        node for node in nodes if node in parametric and node not in bindings and not node.meta.get("mutates")
    )
    problem = Problem(
        pricing, axis_size, microbatches, in_flight, sequence_parallel, regroup, nodes, BlockCuts(bindings, axis_size), zero_padded(graph),
        repeats,
    )  # fmt: skip
    users: Users = {}
    for node in nodes:
        problem.add_call(node, node in parametric, node in bindings)
        slots: dict[Value, list[int]] = {}
        for slot, arg in enumerate(tensor_inputs(node)):
            slots.setdefault(value_of(arg), []).append(slot)
        for value, positions in slots.items():
            users.setdefault(value, []).append((node, tuple(positions)))
    parameters = [
        n for n in graph.nodes if is_state(n) and n.meta.get("kind") == "parameter" and tensor_type(n) is not None
    ]
    for node in parameters:
        problem.add_parameter(node, users, pins)
    priced = problem.price_memory()
    problem.prune(users)
    problem.add_own_costs(*priced)
    if loss is not None:
        problem.add_whole(value_of(loss))
    assignment, objective = problem.solve(users)
    if objective == float("inf"):
        raise Infeasible
    picked = {node: problem.choices[variable][assignment[variable]] for node, variable in problem.variables.items()}
    chosen = problem.fixed | {node: pick for node, pick in picked.items() if isinstance(pick, Strategy)}
    placements: dict[Value, Placement] = {
        (node, index): p for node, s in chosen.items() for index, p in enumerate(s.outputs)
    }
    placements |= {(node, 0): picked[node] for node in parameters}
    return ShardPlan(axis, axis_size, chosen, placements, objective, unruled)


def _binding(call: Call) -> Binding | None:
    """The call's rule bound to its shapes; None without a rule, or where the rule cannot read these shapes."""
    try:
        rule = rule_of(call.op)
        return rule.binding(call) if rule is not None else None
    except ValueError:
        return None

"""The shard pass: the cheapest legal placement of every value on one mesh axis, found from costs.

The problem. Each call picks one of its rule's strategies; each parameter picks a placement. The objective is

    seconds of a microbatch, forward and backward (roofline of each call on its local shapes)       `_call_seconds`
  + reshards between what a value has and what its users want, each distinct want paid once        `_reshard_factors`
  + (gradient sums owed once a step + the optimizer's memory traffic) / microbatches               `_state_seconds`
  + MEMORY_WEIGHT x (T / M) x bytes held: training state and activations kept for backward                         `_memory_seconds`

T and M are the seconds and bytes of the unsplit model. The last term is the linearisation of time x memory: holding one percent
less of the model's memory is worth one percent of its step, because memory is what tensor parallelism is bought for. It decides
where time alone is indifferent (a vocabulary-split embedding of an untied model costs an all_reduce and saves a table).

The problem is solved exactly by `passes.elimination`. A value with several users gets one yes/no variable for each placement that
some user might want, so that a want shared by three users (q, k and v) is paid for once.

Activations are split by weights: a value becomes split where it meets a split weight, whole again where a sum over the split dim
is all-reduced, and a whole value is sliced only to join another that is split (replicated k and v beside the heads of q). Splitting
and gathering activations elsewhere (the rows of RESHARDS that regroup), and splitting batch and sequence dims (symbolic sizes), is
sequence parallelism in the wide sense; `split_data` allows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from costmodel.errors import NoLegalSharding
from costmodel.memory import optimizer_seconds, training_state_bytes
from passes.annotation import Binding, Cut
from passes.costs import Pricing, is_number
from passes.elimination import minimise
from passes.ir import Size, TensorType, calls, is_state, is_trainable, output_types, tensor_inputs, tensor_type
from passes.placement import COPIED, PARTIAL, REPLICATE, Copied, Placement, Replicate, Shard
from passes.reshard import collective_seconds
from passes.rules import RULES, Call, Strategy, call_of, strategies

# A user who asks for tp = n asks for a device to hold 1/n of the model; time decides between the ways of doing that. Small models, whose
# steps are mostly latency, need a weight of 16 and more to be split at all; for large ones any weight from 1 to 32 gives the same plan.
MEMORY_WEIGHT = 24.0

Value = tuple[fx.Node, int]  # a tensor: the node that yields it and which of its results it is
Pins = Callable[[str, TensorType, Sequence[Placement]], Sequence[Placement]]


def value_of(node: fx.Node) -> Value:
    """The value a tensor node stands for: getitem is another name for its source's result."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        return source, index
    return node, 0


def is_call(node: fx.Node) -> bool:
    """True for a call that yields tensors (not a size, not a getitem)."""
    return node.op == "call_function" and node.target is not operator.getitem and bool(output_types(node))


def depends_on_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed from parameters. The others (masks, positions, labels) are cheap, are kept whole and recomputed anywhere."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (is_state(node) and node.meta.get("kind") == "parameter") or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


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


class _Cuts:
    """Which block structures each dim of each value may be split in: a fixpoint over the rules' dim names."""

    def __init__(self, bindings: Mapping[fx.Node, Binding]) -> None:
        self.of: dict[Value, list[dict[Any, Cut]]] = {}
        order = list(bindings)
        changed = True
        while changed:
            changed = False
            for nodes in (order, order[::-1]):
                for node in nodes:
                    changed |= self._visit(node, bindings[node])

    def dims(self, value: Value, rank: int) -> list[dict[Any, Cut]]:
        """Per dim of a value: block structure -> cut."""
        if value not in self.of:
            self.of[value] = [{1: Cut()} for _ in range(rank)]
        return self.of[value]

    def _visit(self, node: fx.Node, binding: Binding) -> bool:
        changed = False
        places = self._places(node, binding)
        for group in binding.choices:
            if not all(is_number(binding.sizes[name]) for name in group):
                continue
            found = self.group(binding, places, group)
            for value, pattern, shape in places:
                spot = binding.concerned(pattern, shape, group)
                if spot is None:
                    continue
                known = self.dims(value, len(shape))[spot[0]]
                for cut in found.values():
                    dim_cut = binding.dim_cut(spot[1], shape[spot[0]], (next(n for n in group if n in spot[1].names),), cut)
                    if dim_cut is not None and (dim_cut.segments not in known or known[dim_cut.segments].unit < dim_cut.unit):
                        known[dim_cut.segments] = dim_cut
                        changed = True
        return changed

    def group(self, binding: Binding, places: Sequence[tuple[Value, Any, Any]], group: tuple[str, ...]) -> dict[Any, Cut]:
        """The cuts of a split name that any of its dims knows."""
        found: dict[Any, Cut] = {1: Cut()}
        for value, pattern, shape in places:
            spot = binding.concerned(pattern, shape, group)
            if spot is None:
                continue
            for dim_cut in self.dims(value, len(shape))[spot[0]].values():
                cut = binding.name_cut(spot[1], (next(n for n in group if n in spot[1].names),), dim_cut)
                if cut is not None and (cut.segments not in found or found[cut.segments].unit < cut.unit):
                    found[cut.segments] = cut
        return found

    @staticmethod
    def _places(node: fx.Node, binding: Binding) -> list[tuple[Value, Any, Any]]:
        inputs = [(value_of(arg), p, s) for arg, p, s in zip(tensor_inputs(node), binding.inputs, binding.input_shapes, strict=True)]
        outputs = [((node, k), p, s) for k, (p, s) in enumerate(zip(binding.outputs, binding.output_shapes, strict=True))]
        return inputs + outputs

    def for_call(self, node: fx.Node) -> Callable[[Binding, tuple[str, ...]], Sequence[Cut]]:
        """The cuts to try for each split name of a call."""
        return lambda binding, group: list(self.group(binding, self._places(node, binding), group).values())


@dataclass(frozen=True)
class Want:
    """What a strategy wants of an argument; `joins`: it is split beside another activation that is split too (k beside q)."""

    placement: Placement
    joins: bool = False


@dataclass
class _Problem:
    """Variables (domain = list of choices) and cost tables of one sharding problem."""

    pricing: Pricing
    axis_size: int
    microbatches: int
    in_flight: int
    split_data: bool = False
    domains: list[list[Any]] = field(default_factory=list)
    factors: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    costs: dict[Any, Any] = field(default_factory=dict)

    def variable(self, choices: Sequence[Any], costs: Sequence[float] | None = None) -> int:
        self.domains.append(list(choices))
        if costs is not None:
            self.factors.append(((len(self.domains) - 1,), torch.tensor(costs, dtype=torch.float64)))
        return len(self.domains) - 1

    def call_seconds(self, call: Call, differentiable: tuple[bool, ...], strategy: Strategy) -> tuple[float, float]:
        """(seconds forward and backward, bytes kept for backward) of one call under one strategy."""
        cost = self.pricing.cost(call, differentiable, strategy, self.axis_size)
        seconds = sum(self.pricing.seconds(cost, call.outputs[0]))
        if strategy.local and strategy.local.all_reduces:
            rows = self.pricing.num_bytes(call.inputs[-1])
            link = self.pricing.link(self.axis_size)
            seconds += strategy.local.all_reduces * collective_seconds("all_reduce", num_bytes=rows, axis_size=self.axis_size, link=link)
        return seconds, float(cost.saved_bytes)

    def state_seconds(self, value: TensorType, placement: Placement) -> tuple[float, float]:
        """(seconds per microbatch, bytes) of holding and updating a trained parameter."""
        count = self.pricing.num_bytes(value) // value.dtype.itemsize
        local = count // self.axis_size if isinstance(placement, Shard) else count
        seconds = float(optimizer_seconds(local, self.pricing.hardware))
        if isinstance(placement, Copied):
            seconds += collective_seconds(
                "all_reduce", num_bytes=self.pricing.num_bytes(value), axis_size=self.axis_size, link=self.pricing.link(self.axis_size)
            )
        return seconds / self.microbatches, float(training_state_bytes(local))


def shard(
    module: fx.GraphModule, *, axis: str, axis_size: int, pricing: Pricing, microbatches: int = 1, in_flight: int = 1,
    loss: fx.Node | None = None, pins: Pins | None = None, split_data: bool = False,
) -> ShardPlan:  # fmt: skip
    """The cheapest assignment of strategies and placements for one axis. The graph is not touched.

    `loss` must come out whole; other results of the model may stay split. `pins(name, type, choices)` narrows a parameter's choices.
    NoLegalSharding if the pins leave no assignment.
    """
    graph = module.graph
    parametric = depends_on_parameters(graph)
    nodes = [node for node in calls(graph) if is_call(node)]
    call_by_node = {node: call_of(node) for node in nodes}
    bindings: dict[fx.Node, Binding] = {}
    unruled: list[fx.Node] = []
    for node in nodes:
        rule = RULES.get(node.target)
        if node not in parametric:
            continue
        if rule is None:
            unruled.append(node)
            continue
        bindings[node] = rule.binding(call_by_node[node])
    if axis_size == 1:
        chosen = {node: Strategy((REPLICATE,) * len(c.inputs), (REPLICATE,) * len(c.outputs)) for node, c in call_by_node.items()}
        return ShardPlan(axis, 1, chosen, {}, 0.0, ())
    cuts = _Cuts(bindings)
    problem = _Problem(pricing, axis_size, microbatches, in_flight, split_data)
    splittable: Callable[[Size], bool] = (lambda size: True) if split_data else is_number

    # one variable per call: its strategies, with seconds and kept bytes
    variables: dict[fx.Node, int] = {}
    fixed: dict[fx.Node, Strategy] = {}
    own: dict[int, list[tuple[float, float]]] = {}
    for node in nodes:
        call = call_by_node[node]
        if node not in parametric:
            fixed[node] = Strategy((REPLICATE,) * len(call.inputs), (REPLICATE,) * len(call.outputs))
            continue
        differentiable = tuple(is_trainable(arg) for arg in tensor_inputs(node))
        choices = strategies(
            RULES.get(node.target), call, axis_size=axis_size, differentiable=differentiable,
            result_differentiable=is_trainable(node), cuts=cuts.for_call(node), splittable=splittable,
        )  # fmt: skip
        choices = list(dict.fromkeys(choices))
        variables[node] = problem.variable(choices)
        own[variables[node]] = [_cached(problem, call, differentiable, strategy) for strategy in choices]

    # who uses each value, and what each of the user's strategies wants of it
    users: dict[Value, list[tuple[fx.Node, tuple[int, ...]]]] = {}
    for node in nodes:
        slots: dict[Value, list[int]] = {}
        for slot, arg in enumerate(tensor_inputs(node)):
            slots.setdefault(value_of(arg), []).append(slot)
        for value, positions in slots.items():
            users.setdefault(value, []).append((node, tuple(positions)))

    def wants(node: fx.Node, slots: tuple[int, ...]) -> list[tuple[Want, ...]]:
        choices = problem.domains[variables[node]] if node in variables else [fixed[node]]
        activations = [k for k, arg in enumerate(tensor_inputs(node)) if is_trainable(arg) and not is_state(arg)]
        found = []
        for strategy in choices:
            joins = sum(isinstance(strategy.inputs[k], Shard) for k in activations) > 1
            found.append(tuple(dict.fromkeys(Want(strategy.inputs[slot], joins) for slot in slots)))
        return found

    # one variable per parameter
    state: dict[fx.Node, int] = {}
    for node in graph.nodes:
        value = tensor_type(node)
        if not is_state(node) or value is None or node.meta.get("kind") != "parameter":
            continue
        wanted = [w for user, slots in users.get((node, 0), []) for option in wants(user, slots) for w in option]
        shards = [w.placement for w in wanted if isinstance(w.placement, Shard)]
        candidates = list(dict.fromkeys([REPLICATE, *([COPIED] if is_trainable(node) else []), *shards]))
        candidates = [_with_unit(c, cuts.of.get((node, 0))) for c in candidates]
        if pins is not None:
            candidates = list(pins(str(node.target), value, candidates))
        state[node] = problem.variable(candidates)
        own[state[node]] = [problem.state_seconds(value, p) if is_trainable(node) else (0.0, float(pricing.num_bytes(value))) for p in candidates]

    # time x memory, linearised at the unsplit model
    unsplit_seconds = sum(costs[0][0] for costs in own.values())
    unsplit_bytes = sum(costs[0][1] * (in_flight if k not in state.values() else 1) for k, costs in own.items())
    price = MEMORY_WEIGHT * unsplit_seconds / max(unsplit_bytes, 1.0)
    held_times = {k: (1 if k in set(state.values()) else in_flight) for k in own}
    for variable, costs in own.items():
        table = [seconds + price * num_bytes * held_times[variable] + index * 1e-9 * unsplit_seconds / len(own) for index, (seconds, num_bytes) in enumerate(costs)]
        problem.factors.append(((variable,), torch.tensor(table, dtype=torch.float64)))

    tables: dict[Any, torch.Tensor] = {}
    for value, consumers in users.items():
        producer = variables.get(value[0], state.get(value[0]))
        have = _offers(problem, value, producer)
        kind = output_types(value[0])[value[1]]
        trainable = _carries_gradient(value[0])
        _reshard_factors(problem, kind, trainable, have, producer, [(variables.get(user), wants(user, slots)) for user, slots in consumers], tables)
    if loss is not None:
        value = value_of(loss)
        producer = variables.get(value[0])
        if producer is not None:
            kind = output_types(value[0])[value[1]]
            costs = [pricing.reshard_seconds(kind, p, REPLICATE, axis_size, True) for p in _offers(problem, value, producer)]
            problem.factors.append(((producer,), torch.tensor(costs, dtype=torch.float64)))

    assignment, objective = minimise([len(choices) for choices in problem.domains], problem.factors)
    if objective == float("inf"):
        raise NoLegalSharding("no assignment of placements satisfies the overrides", why="two of them contradict each other or an op rule")
    chosen = fixed | {node: problem.domains[k][assignment[k]] for node, k in variables.items()}
    placements: dict[Value, Placement] = {(node, index): p for node, s in chosen.items() for index, p in enumerate(s.outputs)}
    placements |= {(node, 0): problem.domains[k][assignment[k]] for node, k in state.items()}
    return ShardPlan(axis, axis_size, chosen, placements, objective, tuple(unruled))


def _with_unit(placement: Placement, dims: list[dict[Any, Cut]] | None) -> Placement:
    """A parameter's shard with the finest block known for its dim, for printing."""
    if not isinstance(placement, Shard) or dims is None:
        return placement
    cut = dims[placement.dim].get(placement.segments)
    return Shard(placement.dim, placement.segments, cut.unit) if cut else placement


def _carries_gradient(node: fx.Node) -> bool:
    return is_trainable(node)


def _cached(problem: _Problem, call: Call, differentiable: tuple[bool, ...], strategy: Strategy) -> tuple[float, float]:
    key = (call.op, call.inputs, call.outputs, call.argument(5, "is_causal"), differentiable, strategy.inputs, strategy.outputs)
    if key not in problem.costs:
        problem.costs[key] = problem.call_seconds(call, differentiable, strategy)
    return problem.costs[key]


def _offers(problem: _Problem, value: Value, producer: int | None) -> list[Placement]:
    """The placement of a value under each choice of its producer."""
    if producer is None:
        return [REPLICATE]
    return [choice.outputs[value[1]] if isinstance(choice, Strategy) else choice for choice in problem.domains[producer]]


def _reshard_factors(
    problem: _Problem, kind: TensorType, trainable: bool, have: list[Placement], producer: int | None,
    consumers: list[tuple[int | None, list[tuple[Want, ...]]]], tables: dict[Any, torch.Tensor],
) -> None:  # fmt: skip
    """Cost tables of one value: each distinct placement that its users want is reached once, whoever shares it."""

    def cost(source: Placement, want: Want) -> float:
        joins = want.joins and isinstance(source, Copied)
        return problem.pricing.reshard_seconds(kind, source, want.placement, problem.axis_size, trainable, problem.split_data or joins)

    def add(variables: tuple[int | None, ...], key: Any, make: Callable[[], torch.Tensor]) -> None:
        if key not in tables:
            tables[key] = make()
        table = tables[key]
        present = tuple(v for v in variables if v is not None)
        index = tuple(slice(None) if v is not None else 0 for v in variables)
        problem.factors.append((present, table[index]))

    if len(consumers) == 1:
        user, options = consumers[0]
        key = ("pair", kind, trainable, tuple(have), tuple(options))
        add((producer, user), key, lambda: torch.tensor([[sum(cost(h, w) for w in option) for option in options] for h in have], dtype=torch.float64))
        return
    wanted = list(dict.fromkeys(w for _, options in consumers for option in options for w in option))
    for want in wanted:
        from_each = [cost(h, want) for h in have]
        if not any(from_each):
            continue
        flag = problem.variable([False, True])
        key = ("reach", kind, trainable, tuple(have), want)
        add((producer, flag), key, lambda from_each=from_each: torch.tensor([[0.0, c] for c in from_each], dtype=torch.float64))  # type: ignore[misc]
        for user, options in consumers:
            needs = [want in option for option in options]
            if any(needs):
                key = ("needs", tuple(needs))
                add((user, flag), key, lambda needs=needs: torch.tensor([[float("inf") if n else 0.0, 0.0] for n in needs], dtype=torch.float64))  # type: ignore[misc]


def partial_gradients(plan: ShardPlan, graph: fx.Graph) -> tuple[str, ...]:
    """The parameters whose gradients each rank holds a summand of: they are summed over the axis once a step."""
    return tuple(str(n.target) for n in graph.nodes if is_state(n) and isinstance(plan.placement(n), Copied) and is_trainable(n))


def is_split(placement: Placement) -> bool:
    """True for a value that no rank holds whole."""
    return not isinstance(placement, (Replicate, Copied)) or placement == PARTIAL

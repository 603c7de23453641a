"""The shard pass: the cheapest legal placement of every value on one mesh axis, found from costs.

The problem. Each call picks one of its rule's strategies; each parameter picks a placement. The objective (`_Problem`) is

    seconds of a microbatch, forward and backward: the roofline of each call on its local shapes    `_call_seconds`
  + reshards between what a value has and what its users want, each distinct want paid once          `add_reshards`
  + (gradient sums owed once a step + the optimizer's memory traffic) / microbatches                 `_state_seconds`
  + MEMORY_WEIGHT x (T / M) x bytes held: training state, and activations kept for backward          `add_own_costs`

T and M are the seconds and bytes of the unsplit model. The last term is the linearisation of time x memory ** MEMORY_WEIGHT,
because memory is what tensor parallelism is bought for. It decides where time alone is indifferent: a vocabulary-split embedding of
an untied model costs an all_reduce and saves a table.

The problem is solved exactly by `passes.elimination`. A value with several users gets one yes/no variable for each placement that
some user might want, so that a want shared by three users (q, k and v) is paid for once.

Activations are split by weights: a value becomes split where it meets a split weight, whole again where a sum over the split dim
is all-reduced, and a whole value is sliced only to join another that is split (replicated k and v beside the heads of q). Splitting
and gathering values between the matmuls (the rows of RESHARDS that regroup) is left to sequence parallelism, which may split the
sequence dims (symbolic sizes other than the batch) of norms, dropouts and residuals. Batch dims are other axes' to split.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import sympy
import torch
from torch import fx

from costmodel.errors import NoLegalSharding
from costmodel.memory import optimizer_seconds, state_bytes
from passes.annotation import Binding, Cut, Dim
from passes.costs import Pricing, is_number
from passes.elimination import minimise
from passes.ir import (
    Size,
    TensorType,
    calls,
    is_state,
    is_trainable,
    output_types,
    size_symbol,
    tensor_inputs,
    tensor_type,
)
from passes.placement import COPIED, REPLICATE, Copied, Partial, Placement, Shard
from passes.reshard import collective_seconds
from passes.rules import Call, Strategy, call_of, rule_of, strategies, zero_padded

# A user who asks for tp = n asks for a device to hold 1/n of the model; time decides between the ways of doing that. Small
# models, whose steps are mostly latency, need 16 and more to be split at all; for large ones 1 to 32 give the same plan.
MEMORY_WEIGHT = 24.0

# With sequence_parallel=True what can be split over tokens is: running it whole seems this many times as slow. It may be
# all that is left.
LAST_RESORT = 1e6

Value = tuple[fx.Node, int]  # a tensor: the node that yields it and which of its results it is
SequenceParallel = bool | Literal["auto"]
Users = dict[
    Value, list[tuple[fx.Node, tuple[int, ...]]]
]  # of each value: the calls that use it, and in which argument slots
Pins = Callable[[str, TensorType, Sequence[Placement]], Sequence[Placement]]
Repeats = Callable[[fx.Node], float]


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


def computed_once(graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed from parameters or from random numbers: one stage computes them. Drawing twice would give two values."""
    found = depends_on_parameters(graph)
    for node in graph.nodes:
        if node.meta.get("random") or any(n in found for n in node.all_input_nodes):
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


@dataclass(frozen=True)
class _Spot:
    """Where a split name is in one tensor of a call: which tensor (arguments, then results), which dim, and the dim's names."""

    place: int
    dim: int
    names: Dim


class _Cuts:
    """Which block structures each dim of each value may be split in: a fixpoint over the rules' dim names.

    A call is looked at again only if one of its values has changed, and what one dim's cut is for a name, or the other way, is worked
    out once for all calls that are bound alike: the layers of a model.
    """

    def __init__(self, bindings: Mapping[fx.Node, Binding], axis_size: int) -> None:
        self.axis_size = axis_size
        self.of: dict[Value, list[dict[Any, Cut]]] = {}
        self._spots: dict[int, tuple[Binding, dict[tuple[str, ...], list[_Spot]]]] = {}
        self._known: dict[Any, Cut | None] = {}
        values = {node: self._values(node, binding) for node, binding in bindings.items()}
        versions: dict[Value, int] = {value: 0 for found in values.values() for value, _ in found}
        seen: dict[fx.Node, list[int]] = {}
        order = list(bindings)
        changed = True
        while changed:
            changed = False
            for nodes in (order, order[::-1]):
                for node in nodes:
                    now = [versions[value] for value, _ in values[node]]
                    if seen.get(node) == now:
                        continue
                    seen[node] = now
                    for value in self._visit(bindings[node], values[node]):
                        versions[value] += 1
                        changed = True

    def dims(self, value: Value, rank: int) -> list[dict[Any, Cut]]:
        """Per dim of a value: (segments, piece) -> cut."""
        if value not in self.of:
            self.of[value] = [{(1, 0): Cut()} for _ in range(rank)]
        return self.of[value]

    def _visit(self, binding: Binding, values: Sequence[tuple[Value, int]]) -> list[Value]:
        """The values of one call that have new cuts."""
        changed = []
        for group, spots in self._spots_of(binding).items():
            if not all(is_number(binding.sizes[name]) for name in group):
                continue
            found = self._group(binding, values, group)
            for spot in spots:
                value, rank = values[spot.place]
                known = self.dims(value, rank)[spot.dim]
                for cut in found.values():
                    dim_cut = self._mapped(binding.dim_cut, binding, spot.names, group, cut)
                    if dim_cut is not None and _note(known, dim_cut):
                        changed.append(value)
        return changed

    def _group(self, binding: Binding, values: Sequence[tuple[Value, int]], group: tuple[str, ...]) -> dict[Any, Cut]:
        """The cuts of a split name that any of its dims knows."""
        found: dict[Any, Cut] = {(1, 0): Cut()}
        for spot in self._spots_of(binding)[group]:
            value, rank = values[spot.place]
            for dim_cut in self.dims(value, rank)[spot.dim].values():
                cut = self._mapped(binding.name_cut, binding, spot.names, group, dim_cut)
                if cut is not None:
                    _note(found, cut)
        return found

    def _mapped(
        self, function: Callable[..., Cut | None], binding: Binding, names: Dim, group: tuple[str, ...], cut: Cut
    ) -> Cut | None:
        """`binding.dim_cut` or `binding.name_cut`, remembered. `self._spots` keeps the binding, so that its id stays its own."""
        key = (function.__name__, id(binding), names, group, cut.segments, cut.unit, cut.piece)
        if key not in self._known:
            self._known[key] = function(names, group, cut, self.axis_size)
        return self._known[key]

    def _spots_of(self, binding: Binding) -> dict[tuple[str, ...], list[_Spot]]:
        """Per name that may be split: where it is."""
        if id(binding) not in self._spots:
            patterns = [*binding.inputs, *binding.outputs]
            shapes = [*binding.input_shapes, *binding.output_shapes]
            spots: dict[tuple[str, ...], list[_Spot]] = {group: [] for group in binding.choices}
            for group, found in spots.items():
                for place, (pattern, shape) in enumerate(zip(patterns, shapes, strict=True)):
                    spot = binding.concerned(pattern, shape, group)
                    if spot is not None:
                        found.append(_Spot(place, *spot))
            self._spots[id(binding)] = binding, spots
        return self._spots[id(binding)][1]

    @staticmethod
    def _values(node: fx.Node, binding: Binding) -> list[tuple[Value, int]]:
        """The arguments and results of a call, each with its rank."""
        inputs = [
            (value_of(arg), len(shape)) for arg, shape in zip(tensor_inputs(node), binding.input_shapes, strict=True)
        ]
        return inputs + [((node, k), len(shape)) for k, shape in enumerate(binding.output_shapes)]

    def for_call(self, node: fx.Node) -> Callable[[Binding, tuple[str, ...]], Sequence[Cut]]:
        """The cuts to try for each split name of a call."""
        return lambda binding, group: list(self._group(binding, self._values(node, binding), group).values())


def _note(known: dict[Any, Cut], cut: Cut) -> bool:
    """Keep a cut if its layout is new, or known with a smaller unit only; True if so."""
    before = known.get((cut.segments, cut.piece))
    if before is not None and not _total(before.unit) < _total(cut.unit):
        return False
    known[cut.segments, cut.piece] = cut
    return True


def _total(unit: int | tuple[int, ...]) -> int:
    return sum(unit) if isinstance(unit, tuple) else unit


@dataclass(frozen=True)
class Want:
    """What a strategy wants of an argument; `joins`: it is split beside another activation that is split too (k beside q)."""

    placement: Placement
    joins: bool = False


Options = tuple[tuple[Want, ...], ...]  # per choice of a user: what it wants of a value


class _Infeasible(Exception):
    """A node has no choice left."""


@dataclass
class _Problem:
    """Variables (each with its list of choices) and cost tables of one sharding problem, built node by node."""

    pricing: Pricing
    axis_size: int
    microbatches: int
    in_flight: int
    sequence_parallel: SequenceParallel
    regroup: bool  # may values between the matmuls be split and gathered anywhere?
    calls: dict[fx.Node, Call]
    cuts: _Cuts
    zeros: set[fx.Node]  # whose padding is zero
    repeats: Repeats = lambda node: 1  # how many nodes of the model a node stands for
    choices: list[list[Any]] = field(default_factory=list)
    factors: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    variables: dict[fx.Node, int] = field(default_factory=dict)  # of calls and of parameters
    fixed: dict[fx.Node, Strategy] = field(default_factory=dict)
    _by_tokens: set[int] = field(default_factory=set)  # the calls to split over tokens, if that can be
    _own: dict[int, list[tuple[float, float]]] = field(
        default_factory=dict
    )  # per variable and choice: seconds, bytes held
    _costs: dict[Any, tuple[float, float]] = field(default_factory=dict)
    _tables: dict[Any, torch.Tensor] = field(default_factory=dict)
    _wants: dict[fx.Node, dict[tuple[int, ...], Options]] = field(default_factory=dict)

    def _variable(self, choices: Sequence[Any]) -> int:
        self.choices.append(list(choices))
        return len(self.choices) - 1

    def _splittable(self, size: Size) -> bool:
        return is_number(size) or self._is_tokens(size)

    def _is_tokens(self, size: Size) -> bool:
        """True for a sequence dim (symbolic, not the batch) that sequence parallelism may split over the axis."""
        if (
            self.sequence_parallel is False
            or isinstance(size, int)
            or size_symbol("B") in size.free_symbols
            or is_number(size)
        ):
            return False
        return self.pricing.number(size) % self.axis_size == 0

    def _splits_tokens(self, kind: TensorType, placement: Placement) -> bool:
        """True for a shard of a sequence dim, fused with the batch or not."""
        if not isinstance(placement, Shard) or isinstance(placement.segments, tuple):
            return False
        size = sympy.sympify(kind.shape[placement.dim]) / placement.segments
        return self._is_tokens(size)

    # ---- choices and what each costs by itself ----------------------------------------------------------------------

    def add_call(self, node: fx.Node, parametric: bool, ruled: bool) -> None:
        """One variable: the strategies of a call. What does not depend on parameters stays whole."""
        call = self.calls[node]
        if not parametric:
            self.fixed[node] = Strategy((REPLICATE,) * len(call.inputs), (REPLICATE,) * len(call.outputs))
            return
        differentiable = tuple(is_trainable(arg) for arg in tensor_inputs(node))
        found = strategies(
            rule_of(node.target) if ruled else None, call, axis_size=self.axis_size, differentiable=differentiable,
            result_differentiable=is_trainable(node), cuts=self.cuts.for_call(node), splittable=self._splittable,
            zeros=tuple(arg in self.zeros for arg in tensor_inputs(node)),
        )  # fmt: skip
        found = list(dict.fromkeys(found))
        self.variables[node] = variable = self._variable(found)
        self._own[variable] = []
        outputs = [pair for strategy in found for pair in zip(call.outputs, strategy.outputs, strict=True)]
        if self.sequence_parallel is True and any(self._splits_tokens(*pair) for pair in outputs):
            self._by_tokens.add(variable)
        count = self.repeats(node)
        for strategy in found:
            seconds, num_bytes = self._call_seconds(call, differentiable, strategy)
            self._own[variable].append((seconds * count, num_bytes * self.in_flight * count))

    def _call_seconds(self, call: Call, differentiable: tuple[bool, ...], strategy: Strategy) -> tuple[float, float]:
        """(seconds forward and backward, bytes kept for backward) of one call under one strategy."""
        causal = call.argument(5, "is_causal")
        key = (call.op, call.inputs, call.outputs, causal, differentiable, strategy.inputs, strategy.outputs)
        if key not in self._costs:
            cost = self.pricing.cost(call, differentiable, strategy, self.axis_size)
            seconds = sum(self.pricing.seconds(cost, call.outputs[0]))
            if strategy.local and strategy.local.all_reduces:
                rows, link = self.pricing.num_bytes(call.inputs[-1]), self.pricing.link(self.axis_size)
                once = collective_seconds("all_reduce", num_bytes=rows, axis_size=self.axis_size, link=link)
                seconds += strategy.local.all_reduces * once
            self._costs[key] = seconds, float(cost.saved_bytes)
        return self._costs[key]

    def add_parameter(self, node: fx.Node, users: Users, pins: Pins | None) -> None:
        """One variable: whole, whole with a gradient sum owed, or split in a way that some user can take."""
        kind = tensor_type(node)
        assert kind is not None
        wanted = [
            w.placement
            for user, slots in users.get((node, 0), ())
            for option in self.wants(user, slots)
            for w in option
        ]
        whole: list[Placement] = [REPLICATE, COPIED] if is_trainable(node) else [REPLICATE]
        dims = self.cuts.of.get((node, 0))
        found = [_with_unit(p, dims) for p in dict.fromkeys([*whole, *(w for w in wanted if isinstance(w, Shard))])]
        if pins is not None:
            found = list(pins(str(node.target), kind, found))
        if not found:
            raise _Infeasible
        self.variables[node] = variable = self._variable(found)
        states = (self._state_seconds(kind, placement, is_trainable(node)) for placement in found)
        count = self.repeats(node)
        self._own[variable] = [(seconds * count, num_bytes * count) for seconds, num_bytes in states]

    def _state_seconds(self, kind: TensorType, placement: Placement, trained: bool) -> tuple[float, float]:
        """(seconds per microbatch, bytes) of holding a parameter and, if it is trained, updating it."""
        local = self.pricing.shape(kind, placement, self.axis_size).numel
        if not trained:
            return 0.0, float(local * kind.dtype.itemsize)
        seconds = float(optimizer_seconds(local, self.pricing.hardware))
        if isinstance(placement, Copied):
            # one all_reduce sums the gradients of all such parameters: each brings its bytes, none a latency
            num_bytes, link = self.pricing.num_bytes(kind), self.pricing.link(self.axis_size)
            held = (collective_seconds("all_reduce", num_bytes=n, axis_size=self.axis_size, link=link) for n in (num_bytes, 0))
            seconds += next(held) - next(held)
        return seconds / self.microbatches, float(state_bytes(local).total)

    def price_memory(self) -> tuple[float, float]:
        """(seconds of the unsplit model, seconds a byte is worth): time x memory linearised at each variable's first choice, whole."""
        seconds = sum(costs[0][0] for costs in self._own.values())
        held = sum(costs[0][1] for costs in self._own.values())
        return seconds, MEMORY_WEIGHT * seconds / max(held, 1.0)

    def add_own_costs(self, seconds: float, price: float) -> None:
        """A table per variable: seconds plus the price of the bytes held."""
        tie = 1e-9 * seconds / max(len(self._own), 1)  # between equals the first choice, a sum once a step before all
        for variable, costs in self._own.items():
            slow = [variable in self._by_tokens and not choice.is_split for choice in self.choices[variable]]
            seconds_of = [LAST_RESORT * own if s else own for s, (own, _) in zip(slow, costs, strict=True)]
            ties = [-tie if choice == COPIED else k * tie for k, choice in enumerate(self.choices[variable])]
            table = [own + price * held + first for own, (_, held), first in zip(seconds_of, costs, ties, strict=True)]
            self.factors.append(((variable,), torch.tensor(table, dtype=torch.float64)))

    def prune(self, users: Users) -> None:
        """Take out choices that nothing can lead to or use: arc consistency over the edges. Keeps the exact solution small."""
        edges: dict[Any, tuple[list[bool], list[bool]]] = {}  # equal edges, in all layers, are looked at once

        def edge(value: Value, offers: tuple[Placement, ...], options: Options) -> tuple[list[bool], list[bool]]:
            """Which of a user's options can be reached, and which of the offers can reach one."""
            kind, trainable = output_types(value[0])[value[1]], is_trainable(value[0])
            key = (kind, trainable, offers, options)
            if key not in edges:
                leads = {
                    (have, want): self._reshard_seconds(kind, trainable, have, want) < float("inf")
                    for have in offers
                    for want in {want for option in options for want in option}
                }
                reached = [[all(leads[have, want] for want in option) for have in offers] for option in options]
                edges[key] = [any(row) for row in reached], [any(column) for column in zip(*reached, strict=True)]
            return edges[key]

        changed = True
        while changed:
            changed = False
            for value, consumers in users.items():
                offers = tuple(self.offers(value))
                usable = [True] * len(offers)
                for user, slots in consumers:
                    reachable, leading = edge(value, offers, self.wants(user, slots))
                    changed |= self._keep(user, reachable)
                    usable = [before and now for before, now in zip(usable, leading, strict=True)]
                changed |= self._keep(value[0], usable)

    def _keep(self, node: fx.Node, kept: Sequence[bool]) -> bool:
        """Leave a node only some of its choices; True if that took any away. None left: the problem has no solution."""
        variable = self.variables.get(node)
        if variable is None or all(kept):
            return False
        if not any(kept):
            raise _Infeasible
        for lists in (self.choices, self._own):
            lists[variable] = [item for item, keep in zip(lists[variable], kept, strict=True) if keep]
        self._wants.pop(node, None)
        return True

    def _reshard_seconds(self, kind: TensorType, trainable: bool, source: Placement, want: Want) -> float:
        """Seconds from what a value has to what is wanted; inf where sequence parallelism does not allow the way."""
        tokens = self._splits_tokens(kind, source) or self._splits_tokens(kind, want.placement)
        whole = not isinstance(want.placement, (Partial, Shard))
        if tokens and isinstance(source, Shard) and not whole and source != want.placement:
            return float("inf")  # tokens are gathered for a split weight, not exchanged for features
        regroup = self.regroup or tokens or (want.joins and isinstance(source, Copied))
        return self.pricing.reshard_seconds(kind, source, want.placement, self.axis_size, trainable, regroup)

    # ---- what passes between them -----------------------------------------------------------------------------------

    def wants(self, node: fx.Node, slots: tuple[int, ...]) -> Options:
        """Per choice of a user: what it wants of the value in these argument slots."""
        known = self._wants.setdefault(node, {})
        if slots not in known:
            found = self.choices[self.variables[node]] if node in self.variables else [self.fixed[node]]
            activations = [k for k, arg in enumerate(tensor_inputs(node)) if is_trainable(arg) and not is_state(arg)]
            joins = [sum(isinstance(strategy.inputs[k], Shard) for k in activations) > 1 for strategy in found]
            known[slots] = tuple(
                tuple(dict.fromkeys(Want(s.inputs[slot], j) for slot in slots))
                for s, j in zip(found, joins, strict=True)
            )
        return known[slots]

    def offers(self, value: Value) -> list[Placement]:
        """The placement of a value under each choice of its producer."""
        variable = self.variables.get(value[0])
        if variable is None:
            return [REPLICATE]
        return [
            choice.outputs[value[1]] if isinstance(choice, Strategy) else choice for choice in self.choices[variable]
        ]

    def add_whole(self, value: Value) -> None:
        """The cost of making a value whole in the end (the loss)."""
        variable = self.variables.get(value[0])
        if variable is not None:
            kind = output_types(value[0])[value[1]]
            costs = [self.pricing.reshard_seconds(kind, p, REPLICATE, self.axis_size, True) for p in self.offers(value)]
            self.factors.append(((variable,), torch.tensor(costs, dtype=torch.float64)))

    def add_reshards(self, value: Value, consumers: Sequence[tuple[fx.Node, tuple[int, ...]]], shared: bool) -> None:
        """Cost tables of one value: each distinct placement that its users want is reached once, whoever shares it.

        `shared=False` charges every user by itself: an upper bound, for graphs that are too wide otherwise.
        """
        kind, trainable = output_types(value[0])[value[1]], is_trainable(value[0])
        have, producer, count = tuple(self.offers(value)), self.variables.get(value[0]), self.repeats(value[0])

        def cost(source: Placement, want: Want) -> float:
            return count * self._reshard_seconds(kind, trainable, source, want)

        wants = [(self.variables.get(user), self.wants(user, slots)) for user, slots in consumers]
        if len(wants) == 1 or not shared:
            for user, options in wants:
                self._add(
                    (producer, user), ("pair", kind, trainable, count, have, options),
                    lambda options=options: [[sum(cost(h, w) for w in option) for option in options] for h in have],  # type: ignore[misc]
                )  # fmt: skip
            return
        for want in dict.fromkeys(w for _, options in wants for option in options for w in option):
            from_each = [cost(h, want) for h in have]
            if any(from_each):
                self._add_shared(want, from_each, producer, wants)

    def solve(self, users: Users) -> tuple[list[int], float]:
        """The best choice of every variable, and the objective. Exact but for graphs too wide for shared wants (see `add_reshards`),
        and for graphs too wide even so, where some calls stay whole (see `minimise`)."""
        own, count = list(self.factors), len(self.choices)
        for shared in (True, False):
            self.factors, self.choices = list(own), self.choices[:count]
            for value, consumers in users.items():
                self.add_reshards(value, consumers, shared)
            # the first way of every call is to run whole, and a reshard that may be made is: this is always allowed
            whole = [len(choices) - 1 if choices == [False, True] else 0 for choices in self.choices]
            try:
                return minimise([len(choices) for choices in self.choices], self.factors, None if shared else whole)
            except MemoryError:
                continue
        raise AssertionError("unreachable")

    def _add_shared(
        self,
        want: Want,
        from_each: Sequence[float],
        producer: int | None,
        wants: Sequence[tuple[int | None, Options]],
    ) -> None:
        """A yes/no variable: the value is also made to be as wanted. Yes costs the reshard; a user that wants it needs a yes."""
        flag = self._variable([False, True])
        self._add((producer, flag), ("reach", tuple(from_each)), lambda: [[0.0, seconds] for seconds in from_each])
        for user, options in wants:
            needs = tuple(want in option for option in options)
            if any(needs):
                table = [[float("inf") if need else 0.0, 0.0] for need in needs]
                self._add((user, flag), ("needs", needs), partial(list, table))

    def _add(
        self, variables: tuple[int | None, ...], key: tuple[Any, ...], make: Callable[[], list[list[float]]]
    ) -> None:
        """A table over variables; None stands for something with one choice only. Equal tables are made once."""
        if key not in self._tables:
            self._tables[key] = torch.tensor(make(), dtype=torch.float64)
        index = tuple(slice(None) if v is not None else 0 for v in variables)
        self.factors.append((tuple(v for v in variables if v is not None), self._tables[key][index]))


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
    except _Infeasible:
        pass
    try:
        if not may_regroup:
            raise _Infeasible
        return _shard(*given, regroup=True)  # what a user pins may need values split where no matmul splits them
    except _Infeasible:
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
    problem = _Problem(
        pricing, axis_size, microbatches, in_flight, sequence_parallel, regroup, nodes, _Cuts(bindings, axis_size), zero_padded(graph),
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
        raise _Infeasible
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


def _with_unit(placement: Placement, dims: list[dict[Any, Cut]] | None) -> Placement:
    """A parameter's shard with the finest block known for its dim, for printing."""
    if not isinstance(placement, Shard) or dims is None:
        return placement
    cut = dims[placement.dim].get((placement.segments, placement.piece))
    return replace(placement, unit=cut.unit) if cut else placement

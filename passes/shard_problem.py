"""The sharding problem of one mesh axis: variables, their choices, and what they cost.

Each call picks one of its rule's strategies; each parameter picks a placement. The objective is

    seconds of a microbatch, forward and backward: the roofline of each call on its local shapes    `_call_seconds`
  + reshards between what a value has and what its users want, each distinct want paid once          `add_reshards`
  + (gradient sums owed once a step + the optimizer's memory traffic) / microbatches                 `_state_seconds`
  + MEMORY_WEIGHT x (T / M) x bytes held: training state, and activations kept for backward          `add_own_costs`

T and M are the seconds and bytes of the unsplit model. The last term is the linearisation of time x memory ** MEMORY_WEIGHT,
because memory is what tensor parallelism is bought for. It decides where time alone is indifferent: a vocabulary-split embedding of
an untied model costs an all_reduce and saves a table.

The problem is solved exactly by `passes.elimination`. A value with several users gets one yes/no variable for each placement that
some user might want, so that a want shared by three users (q, k and v) is paid for once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import sympy
import torch
from torch import fx

from costmodel.memory import optimizer_seconds, state_bytes
from passes.annotation import Cut
from passes.block_cuts import BlockCuts
from passes.costs import Pricing, is_number
from passes.elimination import minimise
from passes.ir import Size, TensorType, is_state, is_trainable, output_types, size_symbol, tensor_inputs, tensor_type
from passes.op_rule import Strategy
from passes.patterns import Call
from passes.placement import COPIED, REPLICATE, Copied, Partial, Placement, Shard
from passes.reshard import collective_seconds
from passes.rules import rule_of
from passes.strategies import strategies
from passes.values import Value

# A user who asks for tp = n asks for a device to hold 1/n of the model; time decides between the ways of doing that. Small
# models, whose steps are mostly latency, need 16 and more to be split at all; for large ones 1 to 32 give the same plan.
MEMORY_WEIGHT = 24.0

# With sequence_parallel=True what can be split over tokens is: running it whole seems this many times as slow. It may be
# all that is left.
LAST_RESORT = 1e6

SequenceParallel = bool | Literal["auto"]
# Of each value: the calls that use it, and in which argument slots.
Users = dict[Value, list[tuple[fx.Node, tuple[int, ...]]]]
Pins = Callable[[str, TensorType, Sequence[Placement]], Sequence[Placement]]
Repeats = Callable[[fx.Node], float]


@dataclass(frozen=True)
class Want:
    """What a strategy wants of an argument; `joins`: it is split beside another activation that is split too (k beside q)."""

    placement: Placement
    joins: bool = False


Options = tuple[tuple[Want, ...], ...]  # per choice of a user: what it wants of a value


class Infeasible(Exception):
    """A node has no choice left."""


@dataclass
class Problem:
    """Variables (each with its list of choices) and cost tables of one sharding problem, built node by node."""

    pricing: Pricing
    axis_size: int
    microbatches: int
    in_flight: int
    sequence_parallel: SequenceParallel
    regroup: bool  # may values between the matmuls be split and gathered anywhere?
    calls: dict[fx.Node, Call]
    cuts: BlockCuts
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
            raise Infeasible
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
            raise Infeasible
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


def _with_unit(placement: Placement, dims: list[dict[Any, Cut]] | None) -> Placement:
    """A parameter's shard with the finest block known for its dim, for printing."""
    if not isinstance(placement, Shard) or dims is None:
        return placement
    cut = dims[placement.dim].get((placement.segments, placement.piece))
    return replace(placement, unit=cut.unit) if cut else placement

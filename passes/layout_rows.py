"""One rank's costs of a folded, sharded model, unit by unit: what every layout with the same degrees inside a stage shares.

A `UnitCost` is what one stretch of calls (a layer, or what lies between runs of layers) costs a rank for one microbatch: seconds by
`passes.line.node_cost`, the expressions that the cut pass uses; bytes kept by `passes.saved`. The middle unit of a run stands for
`count` layers. Two things are added that plans do not have yet:

- Context parallelism. Each of `cp` ranks has 1/cp of the tokens (the size `T`). A call whose work grows faster than the number of
  tokens (a product of two activations over tokens, or what is done to its result) costs 1/cp of what it costs for the whole sequence, as
  when the causal triangle is dealt out evenly; every other one costs what it costs for T/cp tokens. Per product of activations
  the operands after the first are gathered over the ranks forward, again in backward, and their gradients are scattered back.
- How much of a backward is gradients of weights, for schedules that put them off: of a product with a weight the half (one of its two
  products), of everything else nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from passes.costs import Pricing
from passes.fold import Folded, unit_of
from passes.fused import Joined, joined_calls
from passes.ir import calls, is_state, is_trainable, output_types, tensor_inputs, tensor_type
from passes.layout_loss import LOSSES, with_fused_loss
from passes.layout_recompute import (
    RECOMPUTES,
    LineCall,
    bits_of,
    cached_calls,
    is_product,
    is_weight_product,
    kept_by,
    selective_runs,
)
from passes.layout_working import CallGradients, working_of
from passes.line import node_cost
from passes.localize import sharding
from passes.placement import local_type
from passes.recompute import Run, Saves, line_of
from passes.reshard import collective_seconds
from passes.saved import formula_saves
from passes.step_casts import casts_to_hold

TOKENS = "T"  # the size that context parallelism splits
_GROWS = 1.2  # a call whose cost grows by this much more than its tokens mixes tokens


@dataclass(frozen=True)
class UnitCost:
    """One stretch of calls on one rank, for one microbatch. Compute and collectives apart; `weight_seconds` are part of the backward.

    `kept_bytes` for the backward; `adding_bytes` and `making_bytes` of what exists besides while the unit runs (`passes.layout_working`).
    `parameters`: elements of this rank's shards used here and nowhere else. `sent_bytes`: what crosses to the next unit.
    """

    count: int
    run: int | None
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    weight_seconds: float = 0.0
    forward_tensor_seconds: float = 0.0
    backward_tensor_seconds: float = 0.0
    forward_context_seconds: float = 0.0
    backward_context_seconds: float = 0.0
    replay_seconds: float = 0.0
    replay_tensor_seconds: float = 0.0
    replay_context_seconds: float = 0.0
    kept_bytes: float = 0.0
    adding_bytes: float = 0.0
    making_bytes: float = 0.0
    parameters: int = 0
    cast_bytes: float = 0.0  # of casts that are held for a step
    sent_bytes: float = 0.0
    sent_whole_bytes: float = 0.0  # of it: what every rank of the tensor-parallel axis holds alike


@dataclass(frozen=True)
class SharedParameter:
    """A parameter that several units use: elements on this rank, and which units."""

    numel: int
    units: tuple[int, ...]


@dataclass
class RankGraph:
    """One rank's localized folded graph, with what does not depend on sizes found once."""

    module: fx.GraphModule
    folded: Folded
    axis_sizes: Mapping[str, int]
    nominal: Pricing
    holds_casts: bool = False  # of parameters, for a whole step
    casts: frozenset[fx.Node] = field(init=False)
    line: list[LineCall] = field(init=False)
    spans: list[tuple[int, int]] = field(init=False)  # per unit: first call on the line, end
    carries: int = field(init=False)  # the storages that have gradients, a bit each
    _joined: dict[fx.Node, Joined] | None = None
    _runs: dict[str, list[list[Run]]] = field(default_factory=dict)
    _saves: Saves = field(init=False)
    _sized: dict[tuple[object, ...], _Sized] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.module.graph
        self.casts = casts_to_hold(graph) if self.holds_casts else frozenset()
        self._saves = saves = formula_saves(graph, self.nominal, self.axis_sizes, self.casts)
        self.line = [
            LineCall(call.nodes[0], call.made, call.saved, call.used)
            for call in line_of(graph, saves, self.nominal, self.axis_sizes)
            if output_types(call.nodes[0])
        ]
        # a reshard belongs to the unit whose value it moves; in the line it may come after the next unit's first call
        self.line.sort(key=lambda call: unit_of(call.node))
        used = made = 0
        for call in self.line:
            used |= call.used
            made |= call.made if is_trainable(call.node) else 0
        self.carries = used & made
        self.spans = []
        place = 0
        for unit in range(len(self.folded.units)):
            end = place
            while end < len(self.line) and unit_of(self.line[end].node) == unit:
                end += 1
            self.spans.append((place, end))
            place = end

    def runs(self, recompute: str) -> list[list[Run]]:
        """Per unit: the runs of calls that are computed again. Only layers, units of runs, have any."""
        if recompute not in self._runs:
            layers = [unit.run is not None for unit in self.folded.units]
            policy = RECOMPUTES[recompute]
            if policy is None:
                found = selective_runs(self.module.graph, self._saves, self.nominal, self.axis_sizes, self.spans)
            else:
                found = [policy(self.line[start:end]) for start, end in self.spans]
            self._runs[recompute] = [runs if layer else [] for runs, layer in zip(found, layers, strict=True)]
        return self._runs[recompute]

    def joined(self) -> dict[fx.Node, Joined]:
        """The calls that share kernels where a job fuses calls on elements."""
        if self._joined is None:
            self._joined = joined_calls(self.module.graph, self.nominal, self.axis_sizes)
        return self._joined

    def sized(self, pricing: Pricing, fused: bool, cp: int, context_link: object) -> _Sized:
        """What calls and storages cost at the sizes of `pricing`: the same whatever is computed again."""
        key = (pricing.hardware, tuple(pricing.sizes.items()), pricing.product_dtype, fused, cp, context_link)
        if key not in self._sized:
            joined = self.joined() if fused else None
            part = pricing
            if cp > 1:
                part = replace(pricing, sizes={**pricing.sizes, TOKENS: -(-pricing.sizes[TOKENS] // cp)}, _numbers={})
            self._sized[key] = _Sized(
                [_priced(call.node, pricing, part, self.axis_sizes, joined, cp, context_link) for call in self.line],
                _storage_bytes(self, pricing, part, cp), _crossing(self, part),
            )  # fmt: skip
        return self._sized[key]

    def shared(self) -> list[SharedParameter]:
        """Parameters that several units use."""
        return [
            SharedParameter(self._numel(node), units) for node in self._parameters() if len(units := self._users(node)) > 1
        ]

    def _parameters(self) -> list[fx.Node]:
        return [
            n for n in self.module.graph.nodes if is_state(n) and n.meta.get("kind") == "parameter" and tensor_type(n) is not None
        ]

    def _users(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(sorted({unit_of(user) for user in node.users}))

    def _numel(self, node: fx.Node) -> int:
        kind = tensor_type(node)
        assert kind is not None
        return self.nominal.num_bytes(local_type(kind, sharding(node), self.axis_sizes)) // kind.dtype.itemsize

    @cached_property
    def weight_bytes(self) -> list[float]:
        """Per call: of the gradients of the parameters that it uses."""
        return [
            float(sum(
                self.nominal.num_bytes(local_type(kind, sharding(source), self.axis_sizes))
                for source in dict.fromkeys(call.node.all_input_nodes)
                if is_state(source) and is_trainable(source) and (kind := tensor_type(source)) is not None
            ))
            for call in self.line
        ]  # fmt: skip

    @cached_property
    def own_parameters(self) -> list[int]:
        """Per unit: elements of the parameters that only it uses, of one layer."""
        found = [0.0] * len(self.folded.units)
        for node in self._parameters():
            units = self._users(node)
            if len(units) == 1:
                found[units[0]] += self._numel(node) * self.folded.count(node) / self.folded.units[units[0]].count
        return [round(count) for count in found]

    @cached_property
    def cast_bytes(self) -> list[float]:
        """Per unit: of the casts that are held for a step, of one layer."""
        found = [0.0] * len(self.folded.units)
        for node in self.casts:
            kind = tensor_type(node)
            assert kind is not None
            found[unit_of(node)] += self.nominal.num_bytes(local_type(kind, sharding(node), self.axis_sizes))
        return found


def unit_costs(
    rank: RankGraph, pricing: Pricing, *, recompute: str = "none", replay_all: bool = False, gather_again: bool = False,
    fused: bool = False, fused_loss: bool = False, cp: int = 1, context_link: object = None,
) -> list[UnitCost]:
    """What each unit costs at the sizes of `pricing` (of one microbatch, whole sequence). `fused`: calls on elements share kernels.
    `context_link`: of the cp axis.
    """
    sized = rank.sized(pricing, fused, cp, context_link)
    priced, num_bytes, parameters = sized.priced, sized.num_bytes, rank.own_parameters
    line = with_fused_loss(rank.line) if fused_loss else rank.line
    owned = [
        CallGradients(
            weight_bytes, sum(num_bytes[k] for k in bits_of(call.made & call.saved)) if call.node.target in LOSSES else 0.0, cost.hands_on
        )
        for call, weight_bytes, cost in zip(line, rank.weight_bytes, priced, strict=True)
    ]
    seen = 0
    found: list[UnitCost] = []
    for index, unit in enumerate(rank.folded.units):
        start, end = rank.spans[index]
        listed = line[start:end]
        cached = cached_calls(recompute, listed) if unit.run is not None else frozenset()
        kept = kept_by(listed, rank.runs(recompute)[index], replay_all=replay_all, cached=cached, gather_again=gather_again)
        working = working_of(listed, replace(kept, kept=kept.kept & ~seen), num_bytes, owned[start:end], rank.carries)
        mine = kept.kept & ~seen
        seen |= mine
        times = priced[start:end]
        replays = [times[k] for k in kept.replayed]
        found.append(
            UnitCost(
                unit.count, unit.run,
                sum(t.forward for t in times), sum(t.backward for t in times), sum(t.weight for t in times),
                sum(t.tensor_forward for t in times), sum(t.tensor_backward for t in times),
                sum(t.context_forward for t in times), sum(t.context_backward for t in times),
                sum(t.forward for t in replays), sum(t.tensor_forward for t in replays), sum(t.context_forward for t in replays),
                float(sum(num_bytes[k] for k in bits_of(mine))), working.adding_bytes, working.making_bytes,
                parameters[index], rank.cast_bytes[index], *sized.crossing[index],
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class _Sized:
    """A rank's calls and storages at some sizes: per call its seconds, per storage its bytes, per unit what crosses to later ones."""

    priced: list[_Priced]
    num_bytes: list[float]
    crossing: list[tuple[float, float]]


@dataclass(frozen=True)
class _Priced:
    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0
    hands_on: bool = False


def _priced(
    node: fx.Node, pricing: Pricing, part: Pricing, axis_sizes: Mapping[str, int], joined: Mapping[fx.Node, Joined] | None, cp: int,
    context_link: object,
) -> _Priced:
    cost = node_cost(node, part, axis_sizes, set(), joined)
    if node.meta.get("reshard"):
        return _Priced(tensor_forward=cost.forward_seconds, tensor_backward=cost.backward_seconds)
    forward, backward = cost.forward_seconds, cost.backward_seconds
    gathers = scatters = 0.0
    if cp > 1:
        whole = node_cost(node, pricing, axis_sizes, set(), joined)
        if whole.forward_seconds > _GROWS * cp * forward or (is_product(node) and _grows(node, pricing, part, axis_sizes, cp)):
            forward, backward = whole.forward_seconds / cp, whole.backward_seconds / cp
        if is_product(node):
            moved = sum(
                pricing.num_bytes(local_type(kind, sharding(source), axis_sizes))
                for source in tensor_inputs(node)[1:]
                if is_trainable(source) and (kind := tensor_type(source)) is not None
            )
            gathers = collective_seconds("all_gather", num_bytes=moved, axis_size=cp, link=context_link)  # type: ignore[arg-type]
            scatters = collective_seconds("reduce_scatter", num_bytes=moved, axis_size=cp, link=context_link)  # type: ignore[arg-type]
    weight = 0.0
    if is_weight_product(node):
        trained = [source for source in tensor_inputs(node) if is_trainable(source)]
        products = [source for source in trained if len(getattr(tensor_type(source), "shape", ())) > 1]
        weight = backward * sum(map(is_state, products)) / max(len(products), 1)
    alone = cost if joined is None else node_cost(node, part, axis_sizes, set())
    return _Priced(
        forward, backward, weight, context_forward=gathers, context_backward=gathers + scatters, hands_on=not alone.backward_seconds
    )


def _grows(node: fx.Node, pricing: Pricing, part: Pricing, axis_sizes: Mapping[str, int], cp: int) -> bool:
    """True if a product's result, or what it contracts, has more elements than its share of tokens."""

    def size(at: Pricing) -> int:
        kinds = [tensor_type(source) for source in tensor_inputs(node)]
        tokens = 1
        for kind in kinds:
            if kind is not None:
                tokens *= max(at.num_bytes(kind), 1)
        return tokens

    return size(pricing) > _GROWS * cp * size(part)


def _storage_bytes(rank: RankGraph, pricing: Pricing, part: Pricing, cp: int) -> list[float]:
    graph, axes = rank.module.graph, rank.axis_sizes
    parts = formula_saves(graph, part, axes, rank.casts).num_bytes
    if cp == 1:
        return [float(parts[k]) for k in range(len(parts))]
    wholes = formula_saves(graph, pricing, axes, rank.casts).num_bytes
    return [
        wholes[k] / cp if wholes[k] > _GROWS * cp * parts[k] else float(parts[k]) for k in range(len(parts))
    ]


def _crossing(rank: RankGraph, part: Pricing) -> list[tuple[float, float]]:
    """Per unit: bytes of the values that it or an earlier unit made and a later one uses; and of those, whole on every rank."""
    sums = [[0.0, 0.0] for _ in rank.folded.units]
    for node in calls(rank.module.graph):
        kind = tensor_type(node)
        if kind is None or not is_trainable(node) or node.meta.get("reshard"):
            continue
        last = max((unit_of(user) for user in _final_users(node)), default=-1)
        num_bytes = part.num_bytes(local_type(kind, sharding(node), rank.axis_sizes))
        for unit in range(unit_of(node), min(last, len(sums))):
            sums[unit][0] += num_bytes
            sums[unit][1] += num_bytes * (not sharding(node))
    return [(total, whole) for total, whole in sums]


def _final_users(node: fx.Node) -> Sequence[fx.Node]:
    """Users, looking through the reshards of the value."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.op == "output":
            continue
        found += [u for u in user.users if u.op != "output"] if user.meta.get("reshard") else [user]
    return found

"""The cut pass: contiguous pipeline stages with the least maximum time within memory.

The localized graph's parametric calls are a line of nodes in the user's order; a cut is a place between two of them. Everything that
does not depend on parameters (masks, positions, shifted labels) takes no place on the line: each stage that needs it computes it.

- Candidates are the places where fewest bytes cross: no place whose neighbours both need less is one, so a layer is never split in
  a way that sends more than needed (`_candidates`).
- A stage's time is the roofline forward + backward of its calls, collectives included, plus sending its results on (`_Line`).
- Its memory is its parameters' training state plus what backward keeps times the microbatches in flight there (`_Line`).
- Dynamic programming over candidates and stages finds the least possible maximum time; a second pass takes, among the cuts within
  one percent of it, the one that sends least, then the most even one (`cut`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from costmodel.collectives import send_seconds
from costmodel.errors import BadArgument, TooManyStages
from costmodel.memory import training_state_bytes
from costmodel.ops import op_cost, op_saves
from passes.costs import Pricing, op_name
from passes.ir import calls, is_state, is_trainable, origin, output_types, tensor_inputs, tensor_type
from passes.localize import sharding
from passes.placement import Placement, local_type
from passes.reshard import Reshard, collective_seconds
from passes.shard import computed_once, value_of

MOST_EXPLAINED = 6  # boundaries that get a note each
NEVER = 10**30  # bytes: no cut here
Held = Mapping[str, tuple[int, ...]]  # parameter name -> the stages that hold it
NEAR = 0.005  # of the whole time: places this close to each other compete on bytes alone
SLACK = 1.01  # cuts within one percent of the best maximum compete on bytes sent and evenness


@dataclass(frozen=True)
class NodeCost:
    """Local seconds of one call, the collectives' share of them, and the bytes only it keeps for backward."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    collective_seconds: float = 0.0
    saved_bytes: float = 0.0


@dataclass(frozen=True)
class StageCost:
    """Predictions for one stage, per microbatch and rank."""

    forward_seconds: float
    backward_seconds: float
    collective_seconds: float
    send_seconds: float
    parameter_count: int
    state_bytes: float
    saved_bytes: float
    in_flight: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds + self.send_seconds

    @property
    def peak_bytes(self) -> float:
        return self.state_bytes + self.saved_bytes * self.in_flight


@dataclass(frozen=True)
class CutPlan:
    """`stage_of` every parametric node, the stages' predicted costs, and per boundary why it is there."""

    stage_of: Mapping[fx.Node, int]
    costs: tuple[StageCost, ...]
    boundaries: tuple[str, ...]
    notes: tuple[str, ...]


def local_types(node: fx.Node, axis_sizes: Mapping[str, int]) -> tuple[torch.dtype, tuple[object, ...]] | None:
    """dtype and local symbolic shape of a localized tensor node."""
    kind = tensor_type(node)
    if kind is None:
        return None
    local = local_type(kind, sharding(node), axis_sizes)
    return local.dtype, local.shape


def node_cost(node: fx.Node, pricing: Pricing, axis_sizes: Mapping[str, int], saved: set[object]) -> NodeCost:
    """What a localized call costs one rank. `saved` holds the values already counted as kept; new ones are added."""
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
    inputs = [n for n in tensor_inputs(node)]
    shapes = [pricing.shape(local_type(_type(n), sharding(n), axis_sizes)) for n in inputs]
    results = [pricing.shape(local_type(value, _result_sharding(node, k), axis_sizes)) for k, value in enumerate(output_types(node))]
    trainable = tuple(is_trainable(n) for n in inputs)
    name = op_name(node.target)
    causal = "scaled_dot_product_attention" in name and len(node.args) > 5 and bool(node.args[5])
    cost = op_cost(name, shapes, results, trainable, causal)
    forward, backward = pricing.seconds(cost, output_types(node)[0])
    num_bytes = 0.0
    if is_trainable(node):
        kept = op_saves(name, shapes, results, trainable, causal)
        num_bytes += float(kept.extra_bytes)
        for index in kept.inputs:
            value = value_of(inputs[index])
            if value not in saved and not is_state(inputs[index]):
                saved.add(value)
                num_bytes += float(shapes[index].num_bytes)
        for index in kept.outputs:
            if (node, index) not in saved:
                saved.add((node, index))
                num_bytes += float(results[index].num_bytes)
    return NodeCost(forward, backward, 0.0, num_bytes)


def _type(node: fx.Node):  # type: ignore[no-untyped-def]
    kind = tensor_type(node)
    assert kind is not None
    return kind


def _result_sharding(node: fx.Node, index: int) -> Mapping[str, Placement]:
    if tensor_type(node) is not None:
        return sharding(node)
    user = next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)
    return sharding(user) if user is not None else {}


class _Line:
    """The parametric calls in order, with everything the dynamic programme asks about a range of them."""

    def __init__(self, module: fx.GraphModule, pricing: Pricing, axis_sizes: Mapping[str, int]) -> None:
        graph = module.graph
        self.pricing, self.axis_sizes = pricing, axis_sizes
        self.parametric = computed_once(graph)
        self.nodes = [node for node in calls(graph) if node in self.parametric and output_types(node) or node.target is operator.getitem and node in self.parametric]
        self.position = {node: k for k, node in enumerate(self.nodes)}
        saved: set[object] = set()
        self.costs = [NodeCost() if n.target is operator.getitem else node_cost(n, pricing, axis_sizes, saved) for n in self.nodes]
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
        self.first_use: list[list[tuple[int, int]]] = [[] for _ in range(count)]  # per node: (parameter bytes' count, previous use)
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
            found = {str(node.target)} & updated if is_state(node) else set().union(*(reads.get(n, set()) for n in node.all_input_nodes))
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


def _prefix(values: Sequence[float]) -> list[float]:
    total, sums = 0.0, [0.0]
    for value in values:
        total += value
        sums.append(total)
    return sums


def _candidates(line: _Line, least: int, most: int = 700) -> list[int]:
    """Places to cut: where fewer bytes cross than on both sides of it (of the run of places with as many)."""
    count = len(line.nodes)
    found: list[int] = []
    start = 1
    while start < count:
        end = start
        while end + 1 < count and line.crossing[end + 1] == line.crossing[start]:
            end += 1
        before = line.crossing[start - 1] if start > 1 else float("inf")
        after = line.crossing[end + 1] if end + 1 < count else float("inf")
        if before >= line.crossing[start] <= after and line.crossing[start] < NEVER:
            found += range(start, end + 1)
        start = end + 1
    bounds = range(1, count)
    found = _worth_it(line, found)
    if len(found) < least:
        found = [k for k in bounds if line.crossing[k] < NEVER]
    if len(found) > most:
        cheapest = sorted(found, key=lambda k: line.crossing[k])[:most]
        found = sorted(cheapest)
    return found


def _worth_it(line: _Line, found: list[int]) -> list[int]:
    """Without the places next to which (within NEAR of the whole time) there is one that fewer bytes cross."""
    total = _prefix([c.forward_seconds + c.backward_seconds for c in line.costs])
    near = NEAR * total[-1]
    kept = []
    for index, k in enumerate(found):
        around = []
        for step in (-1, 1):
            other = index + step
            while 0 <= other < len(found) and abs(total[found[other]] - total[k]) <= near:
                around.append(found[other])
                other += step
        if not any(line.crossing[j] < line.crossing[k] for j in around):
            kept.append(k)
    return kept


def cut(
    module: fx.GraphModule, num_stages: int, *, pricing: Pricing, axis_sizes: Mapping[str, int],
    in_flight: Callable[[int, int], int] = lambda stage, num_stages: num_stages - stage, forced: Sequence[str] | Held | None = None,
) -> CutPlan:  # fmt: skip
    """Assign every parametric node to a stage. TooManyStages if there are not enough places to cut.

    `in_flight(stage, num_stages)`: microbatches whose activations a stage holds at once. `forced`: module paths, each cut falling right
    before the first call of its path; or for each parameter the stages that hold it, as in an earlier plan of the model.
    """
    line = _Line(module, pricing, axis_sizes)
    if not line.nodes:
        raise TooManyStages("the model has no calls that depend on parameters: there is nothing to cut or to train")
    candidates = _candidates(line, num_stages - 1)
    if len(candidates) < num_stages - 1:
        raise TooManyStages(
            f"cannot cut the model into {num_stages} pipeline stages", why=f"its graph has {len(candidates)} places to cut",
            use=f"pp <= {len(candidates) + 1}",
        )  # fmt: skip
    forward = _prefix([c.forward_seconds for c in line.costs])
    backward = _prefix([c.backward_seconds for c in line.costs])
    collectives = _prefix([c.collective_seconds for c in line.costs])
    saved = _prefix([c.saved_bytes for c in line.costs])
    points = [0, *candidates, len(line.nodes)]
    if forced:
        places_given = _held_places(line, forced, num_stages) if isinstance(forced, Mapping) else _forced_places(line, forced, num_stages)
        points = [0, *places_given, len(line.nodes)]
    last = len(points) - 1
    links = pricing.link(1 if num_stages * max(axis_sizes.values(), default=1) <= pricing.hardware.devices_per_node else 10**9)

    def crossing_seconds(point: int) -> float:
        if point == last:
            return 0.0
        place = points[point]
        messages = max(line.num_crossing[place] - 1, 0) * links.latency_seconds  # each further value is a message of its own
        return 2 * (float(send_seconds(num_bytes=line.crossing[place], link=links)) + messages)  # activation there, gradient back

    sums = torch.tensor([forward[p] + backward[p] for p in points], dtype=torch.float64)
    sends = torch.tensor([crossing_seconds(k) for k in range(len(points))], dtype=torch.float64)
    kept = torch.tensor([saved[p] for p in points], dtype=torch.float64)
    # counted at the first use of each parameter; tied parameters used again later are a second copy of little weight here
    states = torch.tensor(_prefix([training_state_bytes(sum(n for n, previous in uses if previous < 0)) for uses in line.first_use]), dtype=torch.float64)
    held = states[torch.tensor(points)]
    seconds = sums.unsqueeze(0) - sums.unsqueeze(1) + sends.unsqueeze(0)  # [start, end]
    allowed = torch.ones_like(seconds, dtype=torch.bool).triu(1)
    infinite = torch.tensor(float("inf"), dtype=torch.float64)
    capacity = float(pricing.hardware.memory_bytes)

    def stage_seconds(stage: int, limit_memory: bool) -> torch.Tensor:
        table = torch.where(allowed, seconds, infinite)
        if limit_memory:
            memory = (held.unsqueeze(0) - held.unsqueeze(1)) + (kept.unsqueeze(0) - kept.unsqueeze(1)) * in_flight(stage, num_stages)
            table = torch.where(memory <= capacity, table, infinite)
        return table

    notes: list[str] = []
    for limit_memory in (True, False):
        tables = [stage_seconds(stage, limit_memory) for stage in range(num_stages)]
        best = tables[0][0]
        for table in tables[1:]:
            best = torch.maximum(best.unsqueeze(1), table).amin(0)
        if torch.isfinite(best[last]):
            break
        notes.append(f"no cut into {num_stages} stages fits {capacity / 2**30:.0f} GiB a device: the stages below are balanced by time alone")
    bottleneck = float(best[last])
    # among the cuts within the slack: least sent, then most even
    even = sums[-1] / num_stages
    choice: list[torch.Tensor] = []
    total = torch.full((len(points),), float("inf"), dtype=torch.float64)
    total[0] = 0.0
    for table in tables:
        price = torch.where(table <= bottleneck * SLACK, sends.unsqueeze(0) + (table - even) ** 2 / (1e3 * even), infinite)
        combined = total.unsqueeze(1) + price
        total, pick = combined.min(0)
        choice.append(pick)
    ends = [last]
    for pick in reversed(choice):
        ends.append(int(pick[ends[-1]]))
    ends.reverse()
    places = [points[k] for k in ends]
    stage_of = {node: stage for stage in range(num_stages) for node in line.nodes[places[stage] : places[stage + 1]]}
    costs = []
    for stage in range(num_stages):
        start, end = places[stage], places[stage + 1]
        count = line.parameters_between(start, end)
        costs.append(
            StageCost(
                forward[end] - forward[start], backward[end] - backward[start], collectives[end] - collectives[start],
                float(sends[ends[stage + 1]]), count, float(training_state_bytes(count)), saved[end] - saved[start], in_flight(stage, num_stages),
            )  # fmt: skip
        )
    boundaries = tuple(str(origin(line.first_own(place))) for place in places[1:-1])
    if not forced:
        explained = min(num_stages - 1, MOST_EXPLAINED)
        notes += [_why(stage, ends, points, line, seconds) for stage in range(explained)]
        notes += [f"the other {num_stages - 1 - explained} boundaries likewise"] if explained < num_stages - 1 else []
    return CutPlan(stage_of, tuple(costs), boundaries, tuple(notes))


def _forced_places(line: _Line, forced: Sequence[str], num_stages: int) -> list[int]:
    if len(forced) != num_stages - 1:
        raise BadArgument(f"{len(forced)} cuts were given for {num_stages} stages", use=f"{num_stages - 1} module paths")
    places = []
    for path in forced:
        place = next((k for k, n in enumerate(line.nodes) if origin(n).path == path or origin(n).path.startswith(path + ".")), None)
        if place is None:
            known = sorted({origin(n).path.rsplit(".", 1)[0] for n in line.nodes if origin(n).path})
            raise BadArgument(f"cannot cut before {path!r}: no call comes from that module", use=", ".join(known[:12]))
        places.append(place)
        if line.crossing[place] >= NEVER:
            raise BadArgument(f"cannot cut before {path!r}: it would part an op's results, or the readers of a buffer that forward updates")
    if sorted(set(places)) != places or places[0] == 0:
        raise BadArgument(f"the cuts {', '.join(forced)} are not in the model's order, or leave a stage empty")
    return places


def _held_places(line: _Line, held: Held, num_stages: int) -> list[int]:
    """Where to cut so that every stage uses only parameters that it holds: of the places that do, the one where least crosses."""
    places: list[int] = []
    for stage in range(1, num_stages):
        low, high = (places[-1] if places else 0) + 1, len(line.nodes) - (num_stages - stage)
        for k, node in enumerate(line.nodes):
            for source in node.all_input_nodes:
                stages = held.get(str(source.target), ()) if is_state(source) else ()
                if stages and max(stages) < stage:
                    low = max(low, k + 1)
                elif stages and min(stages) >= stage:
                    high = min(high, k)
        if low > high:
            raise BadArgument(f"this call of the model uses parameters in another order: it cannot be cut before stage {stage} as planned")
        places.append(min(range(low, high + 1), key=lambda k: (line.crossing[k], k)))
    return places


def _bytes_text(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def _why(stage: int, ends: Sequence[int], points: Sequence[int], line: _Line, seconds: torch.Tensor) -> str:
    """Why a boundary is where it is: what moving it to the neighbouring places would do to the two stages it separates."""
    place = ends[stage + 1]
    here = max(float(seconds[ends[stage], place]), float(seconds[place, ends[stage + 2]]))
    other = []
    for neighbour, direction in ((place - 1, "one place earlier"), (place + 1, "one place later")):
        if ends[stage] < neighbour < ends[stage + 2]:
            there = max(float(seconds[ends[stage], neighbour]), float(seconds[neighbour, ends[stage + 2]]))
            other.append(f"{direction} {there * 1e3:.3g} ms")
    first = line.first_own(points[place])
    label = origin(first)
    sent = line.crossing[points[place]]
    text = f"stage {stage + 1} begins at {label.path or label.source or first.name}: {_bytes_text(sent)} cross; the slower side takes {here * 1e3:.3g} ms"
    return text + (f" ({', '.join(other)})" if other else "")

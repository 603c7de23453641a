"""The recompute pass: which calls of a stage run again in backward, so that what they save need not be kept.

What is known. A stage's graph is a list of calls. Of each call: its seconds, the storages that it makes, and those that autograd keeps
for it (`Saves`, found by running the emitted stage without values; storages, not tensors: a view costs nothing). A *run* is a stretch
of calls that backward computes again (`autopar.recompute`): it keeps the storages of its inputs instead of what is saved inside it. It
costs the seconds of its calls up to the last that saves something, that one excluded if it saves only what it is given. So a run of a
norm and the matmul after it costs the norm; the matmul's result is what the run gives.

The problem. In each *unit* (a layer) choose runs that do not overlap, with the least

    price x bytes kept + seconds run again,                                   (`_Unit.solve`)

where the bytes kept are those of the union of what calls outside of runs save and of the inputs of runs. `price` is in seconds per byte:
what a byte is worth. "selective" has one price: SELECTIVE_PASSES times the time in which the device's memory moves a byte, launches
left out. Element-wise work and norms cost a few such passes a byte, attention scores that are spelled out about ten, a matmul of a wide
model twenty and more. "full" takes each layer as one run. A budget in bytes has no price of its own: it goes through the solutions for
PRICES, cheapest first, until the rank fits (autopar.memory_plan). Runs are tried one after the other, those first that free most for
their seconds; a run takes the place of those that it overlaps if that lowers the objective. Not always the least, and never worse than
keeping everything.

Units. A layer is a module whose calls are those of another module, by kind and order (`units`): the outermost such modules. What lies
between them is a unit that "full" leaves alone. In a model without layers, the calls fall into about sqrt(n) pieces, parted where least
crosses.

What stays out. Calls that do not depend on parameters, received values or random numbers (masks, positions) are computed once, before a
run that needs them; casts of parameters that are made once a step are there (`passes.step_casts`). Calls that update a buffer, or read one
that is updated, are in no run: they would do it twice. Random calls may be in a run: the numbers are replayed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import fx

from passes.canonical_rewrite import is_random
from passes.costs import Pricing
from passes.ir import calls, is_state, origin, size_expr, tensor_type
from passes.line import node_cost
from passes.reshard import RESHARDS, collective_seconds
from passes.step_casts import is_held, is_leaf

SELECTIVE_PASSES = (
    12.0  # a byte kept is worth this many times the seconds that the device's memory takes to move a byte
)
PRICES = (1.0, 4.0, SELECTIVE_PASSES, 48.0, 192.0, math.inf)  # in the same unit; inf is "full"
_MOST_WINDOWS = 4000  # of a unit
_NO_LAUNCH_SECONDS = 1e-12
_COLLECTIVES = {row.function.__name__: row.forward for row in RESHARDS}
_FUNCTIONS = {row.function for row in RESHARDS}


# ---- what is in a stage's graph ---------------------------------------------------------------------------------------


def segment_of(node: fx.Node) -> str:
    """The segment that a node of a stage's graph belongs to; "" for what is kept as autograd keeps it."""
    return node.meta.get("segment", "")


def segments_of(graph: fx.Graph) -> list[str]:
    """The segments of a graph, in order."""
    return list(dict.fromkeys(segment_of(node) for node in graph.nodes if segment_of(node)))


def segment_inputs(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a segment is computed from beside parameters: values, and sizes."""
    inside = set(nodes)
    values: dict[fx.Node, None] = {}
    sizes: dict[fx.Node, None] = {}
    for node in nodes:
        stack = list(reversed(node.all_input_nodes))
        while stack:
            source = stack.pop()
            if size_expr(source) is not None:
                if source.op == "placeholder":
                    sizes[source] = None
                stack.extend(reversed(source.all_input_nodes))
            elif source not in inside and not is_state(source) and not (is_held(source) and is_leaf(source)):
                values[source] = None
    return list(values), list(sizes)


def segment_results(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values of a segment that others use."""
    inside = set(nodes)
    return [node for node in nodes if tensor_type(node) is not None and any(user not in inside for user in node.users)]


@dataclass(frozen=True)
class Saves:
    """What a stage's forward makes and autograd keeps, by storages: numbers that stand for one storage each.

    `num_bytes` of each storage; by the name of a value, `storage` it lies in, and by the name of a call (its first result), the storages
    it `made` and the ones that were `saved` while it ran. Parameters, inputs and received values have no storage here: they are there
    anyway.
    """

    num_bytes: Mapping[int, int]
    storage: Mapping[str, int]
    made: Mapping[str, frozenset[int]]
    saved: Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class _Call:
    """One call on the line of a stage. The masks have a bit per storage."""

    nodes: tuple[fx.Node, ...]  # the call and the pieces of its result
    seconds: float
    work_seconds: float  # without the launch of kernels
    made: int
    saved: int
    used: int
    fixed: bool  # in no run

    @property
    def path(self) -> str:
        return origin(self.nodes[0]).path

    @property
    def kind(self) -> str:
        return str(self.nodes[0].target)


def _forward_seconds(node: fx.Node, pricing: Pricing, axis_sizes: Mapping[str, int]) -> float:
    if node.target in _FUNCTIONS:
        kind, axis_size = tensor_type(node), axis_sizes[str(node.args[1])]
        assert kind is not None
        whole = pricing.num_bytes(kind)
        return collective_seconds(
            _COLLECTIVES[node.target.__name__], num_bytes=whole, axis_size=axis_size, link=pricing.link(axis_size)
        )  # fmt: skip
    return node_cost(node, pricing, axis_sizes, set()).forward_seconds


def _mask(storages: Iterable[int]) -> int:
    mask = 0
    for storage in storages:
        mask |= 1 << storage
    return mask


def line_of(graph: fx.Graph, saves: Saves, pricing: Pricing, axis_sizes: Mapping[str, int]) -> list[_Call]:
    """The calls of a stage that depend on parameters, received values or random numbers, in order."""
    work = Pricing(replace(pricing.hardware, launch_seconds=_NO_LAUNCH_SECONDS), pricing.sizes)
    updated = {name for node in graph.nodes for name in node.meta.get("mutates", ())}
    on_line: set[fx.Node] = set()
    read: dict[fx.Node, bool] = {}  # whether a node is computed from a buffer that is updated, outside of the line
    found: list[_Call] = []
    for node in graph.nodes:
        read[node] = (is_state(node) and str(node.target) in updated) or any(
            read[n] for n in node.all_input_nodes if n not in on_line
        )
        if (
            (is_state(node) and node.meta.get("kind") == "parameter")
            or "received" in node.meta
            or is_random(node)
            or any(source in on_line for source in node.all_input_nodes)
        ):
            on_line.add(node)
    for node in calls(graph):
        if node not in on_line or size_expr(node) is not None or node.target is operator.getitem or is_held(node):
            continue
        pieces = (
            [user for user in node.users if user.op == "call_function" and user.target is operator.getitem]
            if tensor_type(node) is None
            else []
        )
        key = node.name if not pieces else min(pieces, key=lambda piece: piece.args[1]).name  # type: ignore[arg-type, return-value]
        has_cost = bool(pieces) or tensor_type(node) is not None
        found.append(
            _Call(
                (node, *pieces),
                _forward_seconds(node, pricing, axis_sizes) if has_cost else 0.0,
                _forward_seconds(node, work, axis_sizes) if has_cost else 0.0,
                _mask(saves.made.get(key, ())), _mask(saves.saved.get(key, ())),
                _mask(saves.storage[n.name] for n in node.all_input_nodes if n.name in saves.storage),
                bool(node.meta.get("mutates")) or read[node],
            )
        )  # fmt: skip
    return found


# ---- units --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Calls `start` .. `end` - 1 of a stage's line. `layer`: one of several alike, or a piece of a model that has none."""

    name: str
    start: int
    end: int
    layer: bool


def _groups(line: Sequence[_Call], start: int, end: int, depth: int) -> list[tuple[str, int, int]]:
    """The stretches of start .. end - 1 by the first `depth` parts of the module path; "" for calls of modules further out."""
    found: list[tuple[str, int, int]] = []
    for index in range(start, end):
        parts = line[index].path.split(".")
        name = ".".join(parts[:depth]) if len(parts) >= depth and line[index].path else ""
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], index + 1)
        else:
            found.append((name, index, index + 1))
    return found


def _kinds(line: Sequence[_Call], start: int, end: int) -> tuple[str, ...]:
    return tuple(call.kind for call in line[start:end])


def units(lines: Sequence[Sequence[_Call]]) -> list[list[Unit]]:
    """The units of each stage's line; layers are found over all stages."""
    deepest = max((call.path.count(".") + 1 for line in lines for call in line), default=1)
    known: list[dict[tuple[str, ...], set[str]]] = []  # by depth: the modules that make the same calls
    for depth in range(1, deepest + 1):
        alike: dict[tuple[str, ...], set[str]] = {}
        for line in lines:
            for name, start, end in _groups(line, 0, len(line), depth):
                if name and _saving(line, start, end) > 1:
                    alike.setdefault(_kinds(line, start, end), set()).add(name)
        known.append(alike)

    def split(line: Sequence[_Call], start: int, end: int, depth: int) -> list[Unit]:
        if depth > deepest:
            return [Unit("", start, end, False)]
        found: list[Unit] = []
        for name, first, last in _groups(line, start, end, depth):
            if name and len(known[depth - 1].get(_kinds(line, first, last), ())) > 1:
                found.append(Unit(name, first, last, True))
            elif name:
                found += split(line, first, last, depth + 1)
            else:
                found.append(Unit("", first, last, False))
        return found

    parted = [split(line, 0, len(line), 1) for line in lines]
    if not any(unit.layer for stage in parted for unit in stage):
        parted = [_pieces(line) for line in lines]
    return [_without_fixed(line, _joined(line, stage)) for line, stage in zip(lines, parted, strict=True)]


def _saving(line: Sequence[_Call], start: int, end: int) -> int:
    return sum(1 for call in line[start:end] if call.saved)


def _joined(line: Sequence[_Call], found: Sequence[Unit]) -> list[Unit]:
    """Neighbours that are no layers are one unit."""
    joined: list[Unit] = []
    for unit in found:
        if joined and not unit.layer and not joined[-1].layer:
            joined[-1] = replace(joined[-1], end=unit.end)
        else:
            joined.append(unit)
    return [
        unit
        if unit.name
        else replace(unit, name=next((call.path for call in line[unit.start : unit.end] if call.path), ""))
        for unit in joined
    ]


def _pieces(line: Sequence[_Call]) -> list[Unit]:
    """About sqrt(n) pieces of n saving calls, each ending near its place where the fewest storages cross."""
    count = max(1, round(math.sqrt(_saving(line, 0, len(line)))))
    crossing = []
    for place in range(len(line) + 1):
        made = used = 0
        for call in line[:place]:
            made |= call.made
        for call in line[place:]:
            used |= call.used
        crossing.append((made & used).bit_count())
    width = len(line) / count
    ends = [0]
    for piece in range(1, count):
        low, high = int((piece - 0.5) * width) + 1, int((piece + 0.5) * width)
        places = [place for place in range(low, high + 1) if ends[-1] < place < len(line)]
        if places:
            ends.append(min(places, key=lambda place: (crossing[place], abs(place - piece * width))))
    ends.append(len(line))
    return [Unit(line[a].path, a, b, True) for a, b in pairwise(ends) if b > a]


def _without_fixed(line: Sequence[_Call], found: Sequence[Unit]) -> list[Unit]:
    """Units end at calls that are in no run."""
    parts: list[Unit] = []
    for unit in found:
        start = unit.start
        for index in range(unit.start, unit.end + 1):
            if index == unit.end or line[index].fixed:
                if index > start:
                    parts.append(replace(unit, start=start, end=index))
                start = index + 1
    return parts


# ---- choices ------------------------------------------------------------------------------------------------------------

Run = tuple[int, int]  # first call and last call, both in


@dataclass(frozen=True)
class Choice:
    """What is run again in a unit: runs of calls (first, last), what they cost, and the bytes that are kept then."""

    runs: tuple[Run, ...] = ()
    seconds: float = 0.0
    kept_bytes: int = 0


@dataclass
class _Unit:
    """The choices of one unit. Calls are counted from its start."""

    line: Sequence[_Call]
    num_bytes: Mapping[int, int]
    _sums: dict[int, int] = field(default_factory=dict)

    def bytes_of(self, mask: int) -> int:
        if mask not in self._sums:
            total, rest = 0, mask
            while rest:
                low = rest & -rest
                total += self.num_bytes[low.bit_length() - 1]
                rest ^= low
            self._sums[mask] = total
        return self._sums[mask]

    def trimmed(self, run: Run) -> Run | None:
        """The run up to its last call that saves anything; one more call, or all, where that takes no further input."""
        first, last = run
        end = last
        while end >= first and not self.line[end].saved:
            end -= 1
        if end < first:
            return None
        made, inputs = 0, 0
        for call in self.line[first : end + 1]:
            inputs |= call.used & ~made
            made |= call.made
        known = made | inputs
        further = 0
        for call in self.line[end + 1 : last + 1]:
            further |= call.used & ~known
            known |= call.made
        return (first, last) if not further else (first, end)

    def price_of(self, run: Run, work: bool) -> tuple[float, int]:
        """(seconds of running it again, the storages it keeps)."""
        first, last = run
        end = last
        while not self.line[end].saved:
            end -= 1
        seconds = sum(call.work_seconds if work else call.seconds for call in self.line[first:end])
        call = self.line[end]
        if call.saved & call.made:
            seconds += call.work_seconds if work else call.seconds
        made = inputs = 0
        for call in self.line[first : last + 1]:
            inputs |= call.used & ~made
            made |= call.made
        return seconds, inputs

    def choice(self, runs: Sequence[Run], work: bool = False) -> Choice:
        """What these runs come to."""
        seconds, kept = 0.0, 0
        inside: set[int] = set()
        for run in runs:
            more, inputs = self.price_of(run, work)
            seconds += more
            kept |= inputs
            inside.update(range(run[0], run[1] + 1))
        for index, call in enumerate(self.line):
            if index not in inside:
                kept |= call.saved
        return Choice(tuple(sorted(runs)), seconds, self.bytes_of(kept))

    def windows(self) -> list[Run]:
        """Stretches that make something which is saved inside them."""
        saving = [index for index, call in enumerate(self.line) if call.saved]
        found: dict[Run, None] = {}
        for first in range(len(self.line)):
            made = 0
            for last in range(first, len(self.line)):
                made |= self.line[last].made
                if last in saving and self.line[last].saved & made and self.line[first].made:
                    run = self.trimmed((first, last))
                    if run is not None:
                        found[run] = None
        return sorted(found, key=lambda run: run[1] - run[0])[:_MOST_WINDOWS]

    def solve(self, seconds_per_byte: float, work: bool) -> Choice:
        """The runs for a price."""

        def objective(choice: Choice) -> float:
            return choice.kept_bytes * seconds_per_byte + choice.seconds

        best = self.choice((), work)
        candidates = []
        for run in self.windows():
            alone = self.choice((run,), work)
            if objective(alone) < objective(best):
                candidates.append((alone.seconds / (best.kept_bytes - alone.kept_bytes), run))
        for _ in range(3):
            before = best
            for _, run in sorted(candidates):
                others = [other for other in best.runs if other[1] < run[0] or other[0] > run[1]]
                trial = self.choice((*others, run), work)
                if objective(trial) < objective(best) * (1 - 1e-9):
                    best = trial
            if best == before:
                break
        return self.choice(best.runs)

    def whole(self) -> Choice:
        """All of it as one run."""
        run = self.trimmed((0, len(self.line) - 1))
        return self.choice((run,) if run is not None and _gains(self, run) else ())


def _gains(unit: _Unit, run: Run) -> bool:
    return unit.choice((run,)).kept_bytes < unit.choice(()).kept_bytes


class Choices:
    """The choices of every unit of a stage, by price: `at(price)`. Units alike in calls and bytes are solved once (`solved`)."""

    def __init__(
        self, line: Sequence[_Call], found: Sequence[Unit], saves: Saves, pricing: Pricing,
        solved: dict[object, Choice],
    ) -> None:  # fmt: skip
        self.line, self.units, self._saves, self._solved = line, found, saves, solved
        hardware = pricing.hardware
        self._byte_seconds = 1 / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)

    def at(self, unit: Unit, price: float, *, work: bool = False) -> Choice:
        """The choice for a unit. A price of inf: a layer as one run, what is no layer as for the highest finite price."""
        inner = _Unit(self.line[unit.start : unit.end], self._saves.num_bytes)
        key = (self._alike(inner), unit.layer, price, work)
        if key not in self._solved:
            if price == 0:
                self._solved[key] = inner.choice(())
            elif price == math.inf:
                self._solved[key] = inner.whole() if unit.layer else inner.choice(())
            else:
                self._solved[key] = inner.solve(price * self._byte_seconds, work)
        return self._solved[key]

    @staticmethod
    def _alike(inner: _Unit) -> object:
        numbers: dict[int, int] = {}

        def plain(mask: int) -> tuple[tuple[int, int], ...]:
            listed = []
            while mask:
                low = mask & -mask
                storage = low.bit_length() - 1
                listed.append((numbers.setdefault(storage, len(numbers)), inner.num_bytes[storage]))
                mask ^= low
            return tuple(sorted(listed))

        return tuple(
            (call.kind, call.seconds, plain(call.made), plain(call.saved), plain(call.used)) for call in inner.line
        )


def segment_names(chosen: Sequence[tuple[Unit, Choice]], taken: Collection[str]) -> list[tuple[str, int, int]]:
    """(name, first call, last call) of every run: after its unit's module path, numbered where there are several."""
    used = set(taken)
    found: list[tuple[str, int, int]] = []
    for unit, choice in chosen:
        base = re.sub(r"\W+", "_", unit.name).strip("_") or "part"
        base = base if not base[0].isdigit() else f"part_{base}"
        for number, (first, last) in enumerate(choice.runs, 1):
            name = base if len(choice.runs) == 1 else f"{base}_{number}"
            count = 1
            while name in used:
                count += 1
                name = f"{base}_part_{count}"
            used.add(name)
            found.append((name, unit.start + first, unit.start + last))
    return found

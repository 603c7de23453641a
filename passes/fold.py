"""The fold pass: a deep model's graph with each run of equal blocks cut down to its first, a middle and its last one.

What is found. The calls that depend on parameters (`passes.shard.computed_once`), in order, are words: the op, its literal arguments, the
types of what goes in and comes out. A *run* is a stretch of words that repeats with a period: layers, pairs of a dense and an expert
layer, an encoder's and then a decoder's. The longest saving is taken first (`_best_run`), then what lies on both sides of it is looked
at in the same way. Words say nothing of where values come from; that is checked afterwards (`_linked_alike`): a block reads its own
values and the previous block's at the same places as every other block, and what lies before the run is the same node for all.

What is left. The first, the second and the last block of a run; the second stands for `count` blocks. A removed block's values are
replaced by the second's: what follows the run (a list of all router scores, say) keeps its types. Within a run's freedom to begin
earlier or later its blocks are parted where fewest values cross. Calls off the line (masks, positions) stay as they are while anything
uses them.

Every node of the folded graph has `meta["unit"]`, an index into `Folded.units`, so that totals of the whole model are sums over
units times their counts. Whatever is linear in the number of layers costs what it costs for three of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.ir import calls, is_kept, is_state, is_trainable, output_types, tensor_type
from passes.values import computed_once

_LEAST_REPEATS = 4  # three are kept
_LAGS = 4  # a block may hold up to so many of its rarest word
_MOST_PERIODS = 24  # tried a stretch


@dataclass(frozen=True)
class FoldedUnit:
    """A stretch of calls that stands for `count` such stretches in a row. `run`: which run of blocks it is of; None: between runs."""

    count: int
    run: int | None


@dataclass(frozen=True)
class Folded:
    """`module`: the folded graph; its nodes' `meta["unit"]` index `units`, which are in the order of the model.

    `copies`: per state node of the folded graph, how many of the model's parameters it stands for.
    """

    module: fx.GraphModule
    units: tuple[FoldedUnit, ...]
    copies: Mapping[str, int]

    def count(self, node: fx.Node) -> int:
        """How many nodes of the model a node of the folded graph (or of a pass's copy of it) stands for."""
        if is_state(node):
            return self.copies.get(str(node.target), 1)
        return self.units[unit_of(node)].count

    def weight(self, node: fx.Node) -> float:
        """`count`, dealt out evenly over a run's kept blocks: what the shard pass goes by. With the counts themselves it could let the few
        blocks that count once pay for reshards of the many.
        """
        unit = self.units[unit_of(node)]
        if unit.run is None or (is_state(node) and self.copies.get(str(node.target), 1) != unit.count):
            return float(self.count(node))
        return sum(each.count for each in self.units if each.run == unit.run) / sum(each.run == unit.run for each in self.units)

    @property
    def num_blocks(self) -> int:
        """How many units the whole model has, blocks of runs and what lies between them: the most stages that whole blocks give."""
        return sum(unit.count for unit in self.units)


def unit_of(node: fx.Node) -> int:
    """The unit of a node of a folded graph; 0 for what a later pass added without one."""
    return int(node.meta.get("unit", 0))


@dataclass(frozen=True)
class _Run:
    start: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.repeats


def fold(module: fx.GraphModule) -> Folded:
    """The folded form of a canonical graph. The given module is not touched; a model without repetition comes back as one unit."""
    parametric = computed_once(module.graph)
    line = [node for node in calls(module.graph) if node in parametric]
    runs = _runs(line)
    return _folded(module, line, runs)


def block_starts(module: fx.GraphModule) -> list[fx.Node]:
    """The calls that blocks of runs, and what lies between runs, begin with, in order: the units of the whole model."""
    parametric = computed_once(module.graph)
    line = [node for node in calls(module.graph) if node in parametric]
    starts = {0} | {place for run in _runs(line) for place in (*range(run.start, run.end, run.period), run.end)}
    return [line[place] for place in sorted(starts) if place < len(line)]


# ---- finding runs -----------------------------------------------------------------------------------------------------


def _words(line: Sequence[fx.Node]) -> list[int]:
    """A number per call, equal for calls that are alike by themselves."""
    known: dict[Any, int] = {}

    def plain(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            kind = tensor_type(arg)
            if kind is not None:
                return "tensor", str(kind.dtype), kind.shape, is_trainable(arg), is_state(arg)
            return "node", str(arg.meta.get("size"))
        if isinstance(arg, (list, tuple)):
            return tuple(plain(item) for item in arg)
        if isinstance(arg, dict):
            return tuple((key, plain(value)) for key, value in sorted(arg.items()))
        return str(arg)

    words = []
    for node in line:
        kinds = tuple((str(kind.dtype), kind.shape) for kind in output_types(node))
        key = (str(node.target), plain(node.args), plain(node.kwargs), kinds, is_trainable(node), bool(node.meta.get("loss")))
        words.append(known.setdefault(key, len(known)))
    return words


def _runs(line: Sequence[fx.Node]) -> list[_Run]:
    words = torch.tensor(_words(line), dtype=torch.long)
    position = {node: k for k, node in enumerate(line)}
    found: list[_Run] = []
    stretches = [(0, len(line))]
    while stretches:
        low, high = stretches.pop()
        run = _best_run(line, position, words, low, high)
        if run is not None:
            found.append(run)
            stretches += [(low, run.start), (run.end, high)]
    return sorted(found, key=lambda run: run.start)


def _periods(words: torch.Tensor) -> list[int]:
    """Distances between equal words, those first that most calls agree on."""
    places: dict[int, list[int]] = {}
    for place, word in enumerate(words.tolist()):
        places.setdefault(word, []).append(place)
    votes: Counter[int] = Counter()
    for found in places.values():
        for lag in range(1, _LAGS + 1):
            votes.update(b - a for a, b in zip(found, found[lag:], strict=False))
    return [period for period, _ in votes.most_common(_MOST_PERIODS)]


def _best_run(
    line: Sequence[fx.Node], position: Mapping[fx.Node, int], words: torch.Tensor, low: int, high: int
) -> _Run | None:
    """The run within [low, high) that leaves most calls out; of equals the one of the shortest period."""
    inside = words[low:high]
    best: tuple[int, int, int, int] | None = None  # calls left out, -period, start, length of the stretch
    for period in _periods(inside):
        if period * _LEAST_REPEATS > len(inside):
            continue
        same = inside[period:] == inside[:-period]
        edges = torch.cat([torch.tensor([False]), same, torch.tensor([False])]).int().diff()
        starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        lengths = stops - starts + period
        left_out = (lengths // period - 3) * period
        if not len(left_out) or int(left_out.max()) <= 0:
            continue
        k = int(left_out.argmax())
        candidate = (int(left_out[k]), -period, low + int(starts[k]), int(lengths[k]))
        best = candidate if best is None or candidate > best else best
    if best is None:
        return None
    _, negative, start, length = best
    period = -negative
    freedom = length % period
    begins: int = min(range(start, start + freedom + 1), key=lambda place: (_crossing(line, position, place), place))
    repeats = (start + length - begins) // period
    return _linked_alike(line, position, _Run(begins, period, repeats))


def _crossing(line: Sequence[fx.Node], position: Mapping[fx.Node, int], place: int) -> int:
    """How many values made shortly before a place are used from there on."""
    return sum(
        any(position.get(user, -1) >= place for user in node.users) for node in line[max(0, place - 400) : place]
    )


def _linked_alike(line: Sequence[fx.Node], position: Mapping[fx.Node, int], run: _Run) -> _Run | None:
    """The run as far as its blocks, from the second on, read values from the same places; None if that is too few."""

    def links(block: int) -> list[Any]:
        begin = run.start + block * run.period
        found: list[Any] = []
        for node in line[begin : begin + run.period]:
            for source in node.all_input_nodes:
                place = position.get(source)
                if place is None:
                    found.append(source if source.op == "placeholder" else None)
                else:
                    found.append(source if place < run.start else place - begin)
        return found

    if run.repeats < _LEAST_REPEATS:
        return None
    wanted = links(1)
    repeats = next((block for block in range(2, run.repeats) if links(block) != wanted), run.repeats)
    return _Run(run.start, run.period, repeats) if repeats >= _LEAST_REPEATS else None


# ---- the folded graph -------------------------------------------------------------------------------------------------


def _folded(module: fx.GraphModule, line: Sequence[fx.Node], runs: Sequence[_Run]) -> Folded:
    units: list[FoldedUnit] = []
    unit: dict[fx.Node, int] = {}
    stands_for: dict[fx.Node, fx.Node] = {}  # a removed node, and the one kept in its place
    copies: dict[str, set[str]] = {}
    place = 0
    for index, run in enumerate([*runs, None]):
        until = run.start if run is not None else len(line)
        if until > place or (run is None and not units):
            unit |= {node: len(units) for node in line[place:until]}
            units.append(FoldedUnit(1, None))
        if run is None:
            break
        second = line[run.start + run.period : run.start + 2 * run.period]
        for block in range(run.repeats):
            begin = run.start + block * run.period
            nodes = line[begin : begin + run.period]
            if block in (0, 1, run.repeats - 1):
                unit |= {node: len(units) for node in nodes}
                units.append(FoldedUnit(run.repeats - 2 if block == 1 else 1, index))
                continue
            for node, kept in zip(nodes, second, strict=True):
                stands_for[node] = kept
                for own, other in zip(_states(node), _states(kept), strict=True):
                    copies.setdefault(str(other.target), {str(other.target)}).add(str(own.target))
        place = run.end
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    latest = 0
    for node in module.graph.nodes:
        if node in stands_for:
            continue
        made[node] = graph.node_copy(node, lambda source: made[stands_for.get(source, source)])
        latest = unit.get(node, latest)
        made[node].meta = {**node.meta, "unit": latest}
    for node in graph.nodes:
        if is_state(node):
            node.meta["unit"] = min((user.meta["unit"] for user in node.users if user.op != "output"), default=0)
    graph.eliminate_dead_code(is_impure_node=is_kept)
    for node in [node for node in graph.nodes if is_state(node) and not node.users]:
        graph.erase_node(node)
    return Folded(fx.GraphModule(module, graph), tuple(units), {name: len(names) for name, names in copies.items()})


def _states(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if is_state(source)]

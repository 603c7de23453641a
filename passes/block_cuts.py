"""Block structures: in which blocks each dim of each value may be split.

A dim that fuses several things (q, k and v in one linear, the halves of a gate, heads of some length) is split block by block. What
the blocks are shows where views, slices and chunks meet the value, which may be many calls away: a fixpoint over the dim names of the
op rules carries them through the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.annotation import Binding, Cut, Dim
from passes.costs import is_number
from passes.ir import tensor_inputs
from passes.values import Value, value_of


@dataclass(frozen=True)
class _Spot:
    """Where a split name is in one tensor of a call: which tensor (arguments, then results), which dim, and the dim's names."""

    place: int
    dim: int
    names: Dim


class BlockCuts:
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

"""A layout's stages, priced: the cut, the seconds of every stage, and the sums over the stages of a rank.

Each quantity is kept by what it depends on, so that a search pays for it once:

- the cut and its stages (`_Cut`): units, number of stages and, since whole parameters are gathered for every microbatch, the replicas
  of ZeRO 3;
- what ranks sum up (`Stages`): that, where the schedule places stages, and what adding up gradients takes. Ranks with equal stages
  are one `RankGroup`.

Overlap. Traffic of an axis in `Layout.overlap` runs beside compute: of a tensor-parallel collective what its unit's compute
cannot hide is exposed, and always the first of its `tp` pieces; of ZeRO 3's gathers what the unit before cannot hide. Compute is slowed
meanwhile (`Kernels.overlap_slowdown`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from costmodel.hardware import Hardware
from costmodel.memory import STATE_PRECISIONS
from costmodel.replicas import RankLoad, ReplicaAxis, beside, gathered_seconds
from passes.layout import Layout
from passes.layout_memory import HeldStages
from passes.layout_rows import SharedParameter, UnitCost
from passes.layout_stages import StageSums, even_cut, expanded, stage_sums
from passes.schedules import Schedule


@dataclass(frozen=True)
class RankGroup:
    """Pipeline ranks with equal stages: sums over the stages of one, seconds of one microbatch."""

    ranks: tuple[int, ...]
    stages: tuple[int, ...]  # of the first rank
    forward: float
    backward: float  # replays in
    weight: float  # of the backward: gradients of weights
    replay: float
    parameters: int
    gather: float  # ZeRO 3's traffic; of it exposed
    gather_wait: float

    @property
    def load(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Stages:
    """A cut, priced: stages, groups of ranks, and the sums that every layout with this cut shares."""

    stages: tuple[StageSums, ...]
    groups: tuple[RankGroup, ...]
    held: tuple[HeldStages, ...]  # by group
    blocks: tuple[int, ...]
    stage_ranks: tuple[int, ...]
    alike: tuple[tuple[float, ...], ...]  # by stage: seconds of the parts in PARTS
    added: float  # seconds a parameter of adding up gradients
    element_bytes: tuple[float, float]  # of a gradient as it is summed, of a parameter as it is gathered

    @cached_property
    def forward(self) -> tuple[float, ...]:
        """Seconds by stage, exposed collectives in."""
        return tuple(parts[0] for parts in self.alike)

    @cached_property
    def backward(self) -> tuple[float, ...]:
        """Seconds by stage, replays in."""
        return tuple(parts[1] + stage.parameters * self.added for parts, stage in zip(self.alike, self.stages, strict=True))

    @cached_property
    def weight(self) -> tuple[float, ...]:
        """Seconds by stage, part of the backward."""
        return tuple(parts[2] + stage.parameters * self.added for parts, stage in zip(self.alike, self.stages, strict=True))

    @cached_property
    def busiest(self) -> RankGroup:
        return max(self.groups, key=lambda group: (group.load, -group.ranks[0]))

    @cached_property
    def mean_load(self) -> float:
        return sum(group.load * len(group.ranks) for group in self.groups) / self.num_ranks

    @cached_property
    def num_ranks(self) -> int:
        return sum(len(group.ranks) for group in self.groups)

    @cached_property
    def others(self) -> tuple[float, float, float]:
        """(forward, backward, weight) seconds of a rank other than the busiest one, on average; there is one."""
        counts = [(group, len(group.ranks) - (group is self.busiest)) for group in self.groups]
        return (
            sum(group.forward * count for group, count in counts) / (self.num_ranks - 1),
            sum(group.backward * count for group, count in counts) / (self.num_ranks - 1),
            sum(group.weight * count for group, count in counts) / (self.num_ranks - 1),
        )

    @cached_property
    def sender(self) -> StageSums:
        """The stage that sends most to the next one."""
        return max(self.stages, key=lambda stage: stage.sent_bytes)

    @cached_property
    def loads(self) -> tuple[RankLoad, ...]:
        """Of the ranks, as their replicas see them."""
        gradient, parameter = self.element_bytes
        found: list[RankLoad] = [RankLoad(0.0, 0.0, 0.0, 0.0)] * self.num_ranks
        for group in self.groups:
            load = RankLoad(
                group.parameters * gradient, group.parameters * parameter, group.forward, group.backward, group.gather, group.gather_wait
            )
            for rank in group.ranks:
                found[rank] = load
        return tuple(found)

    @cached_property
    def most_parameters(self) -> int:
        return max(group.parameters for group in self.groups)

    @cached_property
    def most_replay(self) -> float:
        return max(group.replay for group in self.groups)

    @cached_property
    def traffic(self) -> tuple[float, float, float, float]:
        """Seconds of the busiest rank, a microbatch: tensor-parallel traffic, of it exposed, context-parallel traffic, of it exposed."""
        mine = [(self.stages[k], self.alike[k]) for k in self.busiest.stages]
        return (
            sum(stage.forward_tensor_seconds + stage.backward_tensor_seconds + stage.replay_tensor_seconds for stage, _ in mine),
            sum(parts[3] for _, parts in mine),
            sum(stage.forward_context_seconds + stage.backward_context_seconds + stage.replay_context_seconds for stage, _ in mine),
            sum(parts[4] for _, parts in mine),
        )


# Seconds of a unit or a stage: forward, backward with replays, weight gradients of it, exposed tensor-parallel, exposed context-parallel,
# ZeRO 3's traffic, what of it is exposed.
PARTS = 7
Parts = tuple[float, float, float, float, float, float, float]


@dataclass(frozen=True)
class _Cut:
    blocks: tuple[int, ...]
    stages: tuple[StageSums, ...]
    seconds: tuple[tuple[float, ...], ...]  # by stage: PARTS


class Cutter:
    """The stages of layouts on one kind of device."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._cuts: dict[tuple[object, ...], _Cut] = {}
        self._stages: dict[tuple[object, ...], Stages] = {}

    def stages(
        self, layout: Layout, row: Schedule, units: Sequence[UnitCost], shared: Sequence[SharedParameter], units_key: tuple[object, ...]
    ) -> Stages:
        """Of a layout whose model has these units: its own cut or the most even one. `units_key`: what the units depend on."""
        sharded = layout.zero == 3 and layout.dp * layout.cp > 1
        cut_key = (
            units_key, layout.num_stages, layout.blocks, layout.overlap, layout.gradient_bytes,
            (layout.dp, layout.sums_each_microbatch) if sharded else None,
        )  # fmt: skip
        added = accumulate_seconds(layout, self.hardware)
        key = (cut_key, row.placement, layout.pp, added)
        found = self._stages.get(key)
        if found is None:
            cut = self._cuts.get(cut_key)
            if cut is None:
                cut = self._cuts[cut_key] = self._cut(layout, units, shared)
            found = self._stages[key] = _stages(cut, row, layout, added)
        return found

    def _cut(self, layout: Layout, units: Sequence[UnitCost], shared: Sequence[SharedParameter]) -> _Cut:
        tied = [sum(each.numel for each in shared if k in each.units) for k in range(len(units))]
        times = [unit_seconds(unit, numel, layout, self.hardware) for unit, numel in zip(units, tied, strict=True)]
        whole = [forward + backward for forward, backward, *_ in times]
        blocks = layout.blocks or even_cut([whole[unit] for unit in expanded(units)], layout.num_stages)
        stages = stage_sums(units, shared, blocks)
        alike: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}
        for stage in stages:
            if stage.block_counts not in alike:
                alike[stage.block_counts] = tuple(
                    sum(times[unit][part] * count for unit, count in stage.block_counts) for part in range(PARTS)
                )
        return _Cut(tuple(blocks), tuple(stages), tuple(alike[stage.block_counts] for stage in stages))


def _stages(cut: _Cut, row: Schedule, layout: Layout, added: float) -> Stages:
    stage_ranks, owned = _owned(row, layout.pp, layout.virtual_stages)
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank, mine in enumerate(owned):
        alike.setdefault(tuple(id(cut.stages[k]) for k in mine), []).append(rank)
    groups = []
    for ranks in alike.values():
        mine = owned[ranks[0]]
        parameters = sum(cut.stages[k].parameters for k in mine)
        forward, backward, weight, _, _, gather, wait = (sum(cut.seconds[k][part] for k in mine) for part in range(PARTS))
        groups.append(
            RankGroup(
                tuple(ranks), mine, forward, backward + added * parameters, weight + added * parameters,
                sum(cut.stages[k].replay_seconds for k in mine), parameters, gather, wait,
            )
        )  # fmt: skip
    held = []
    for group in groups:
        own = tuple(cut.stages[k] for k in group.stages)
        held.append(HeldStages(own, group.parameters, sum(stage.kept_bytes for stage in own), group.ranks))
    element_bytes = gradient_bytes(layout), STATE_PRECISIONS[layout.precision].parameter_bytes
    return Stages(cut.stages, tuple(groups), tuple(held), cut.blocks, stage_ranks, cut.seconds, added, element_bytes)


@lru_cache(maxsize=1024)
def _owned(row: Schedule, pp: int, virtual_stages: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(the rank of each stage, the stages of each rank)."""
    stage_ranks = row.stage_ranks(pp, virtual_stages)
    owned: list[list[int]] = [[] for _ in range(pp)]
    for stage, rank in enumerate(stage_ranks):
        owned[rank].append(stage)
    return stage_ranks, tuple(map(tuple, owned))


def unit_seconds(unit: UnitCost, tied: int, layout: Layout, hardware: Hardware) -> Parts:
    """(forward, backward with replays, weight gradients of it, exposed tensor-parallel, exposed context-parallel, ZeRO 3's traffic, what of
    it is exposed) seconds of a unit that uses `tied` parameters which others use too.
    """
    phases = (
        (unit.forward_seconds, unit.forward_tensor_seconds, unit.forward_context_seconds),
        (unit.backward_seconds, unit.backward_tensor_seconds, unit.backward_context_seconds),
        (unit.replay_seconds, unit.replay_tensor_seconds, unit.replay_context_seconds),
    )
    seconds, tensor_exposed, context_exposed = [], 0.0, 0.0
    slowdown = hardware.kernels.overlap_slowdown
    for compute, tensor, context in phases:
        total, exposed = beside(compute, tensor, overlaps="tp" in layout.overlap, slowdown=slowdown, first=tensor / layout.tp)
        tensor_exposed += exposed
        total, exposed = beside(total, context, overlaps="cp" in layout.overlap, slowdown=slowdown, first=context / layout.cp)
        context_exposed += exposed
        seconds.append(total)
    forward, backward, gathers = seconds[0], seconds[1] + seconds[2], 0.0
    if layout.zero == 3 and layout.dp * layout.cp > 1:
        row, numel = STATE_PRECISIONS[layout.precision], unit.parameters + tied
        forward, backward, gathers = gathered_seconds(
            forward, backward, parameter_bytes=numel * row.parameter_bytes, gradient_bytes=numel * row.gradient_bytes,
            axis=replica_axis(layout, hardware),
        )  # fmt: skip
    waits = forward + backward - sum(seconds)
    return forward, backward, unit.weight_seconds, tensor_exposed, context_exposed, gathers, waits


def accumulate_seconds(layout: Layout, hardware: Hardware) -> float:
    """Seconds a parameter of adding a microbatch's gradients to the step's sum: read both, write one. Under ZeRO 3 only a shard's, where
    replicas sum in each microbatch.
    """
    if layout.microbatches == 1:
        return 0.0
    count = layout.dp * layout.cp if layout.zero == 3 and layout.sums_each_microbatch else 1
    rate = hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency
    return (STATE_PRECISIONS[layout.precision].parameter_bytes + 2 * gradient_bytes(layout)) / rate / count


def gradient_bytes(layout: Layout) -> float:
    """Of an element that is summed over replicas and microbatches: the layout's own, else the precision's."""
    return STATE_PRECISIONS[layout.precision].gradient_bytes if layout.gradient_bytes is None else layout.gradient_bytes


def replica_axis(layout: Layout, hardware: Hardware) -> ReplicaAxis:
    """The ranks that hold the same parameters (dp and cp)."""
    count = layout.dp * layout.cp
    return ReplicaAxis(
        count, hardware.axis_link(count, layout.tp), layout.zero, "dp" in layout.overlap, hardware.kernels.overlap_slowdown,
        layout.sums_each_microbatch,
    )  # fmt: skip

"""The evaluator: step time and memory of any `Layout` of one model on one kind of device, thousands a second.

What is solved once. The model is folded (`passes.fold`); for each (tp, sequence parallel) the folded graph is sharded and localized,
for each (microbatch rows, cp, recompute) its units are priced (`passes.layout_rows`), for each cut the stages are summed. A layout then
is sums of a few numbers (`predict`), so that ordering a space costs what its distinct stages cost.

The step, from the last rank to stop:

    microbatches x (forward + backward of the busiest rank) + the schedule's idle time     `_pipeline_seconds`
  + gradient sums and parameter gathers that compute does not hide                         `costmodel.replicas`
  + the optimizer's memory traffic                                                         `costmodel.memory.optimizer_seconds`

`exact=True` plays the schedule's instructions with every stage's own times (`passes.step_time`, what the cut pass minimises and plans
predict); otherwise the idle time is the schedule's published formula for equal stages, plus for each microbatch what a transfer adds, and
`Layout.barrier` plays no part: the formulas for zero-bubble schedules are without one, the others with it.

Overlap. Traffic of an axis in `Layout.overlap` runs beside compute: of a tensor-parallel collective what its unit's compute
cannot hide is exposed, and always the first of its `tp` pieces; of a data-parallel sum what the last microbatch's backward cannot; of
ZeRO 3's gathers what the unit before cannot. Compute is slowed meanwhile (`Kernels.overlap_slowdown`).

Memory is `passes.layout_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import fx

from costmodel.collectives import send_seconds
from costmodel.hardware import AxisLink, Hardware
from costmodel.machine import UNCERTAINTY
from costmodel.memory import STATE_PRECISIONS, optimizer_seconds
from costmodel.replicas import RankLoad, ReplicaAxis, ReplicaTraffic, beside, gathered_seconds, replica_traffic
from passes.costs import Pricing
from passes.fold import Folded, fold
from passes.ir import DTYPE_NAMES, is_state, is_trainable, tensor_inputs, tensor_type
from passes.layout import Layout, LayoutMemory, LayoutPrediction
from passes.layout_memory import HeldStages, held_stages, layout_memory
from passes.layout_rows import TOKENS, RankGraph, SharedParameter, UnitCost, unit_costs
from passes.layout_stages import StageSums, even_cut, expanded, stage_sums
from passes.localize import localize
from passes.patterns import call_of
from passes.reshard import collective_seconds
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named
from passes.shard import shard
from passes.step_time import StepTimes
from passes.values import is_call

# The dtype whose peak rate a layout is measured against, by precision; for others that of most parameters.
_PEAK_DTYPES = {"bf16": "bf16", "bf16-mixed": "bf16", "fp16": "f16", "fp16-mixed": "f16", "fp8": "fp8", "tf32": "tf32"}


@dataclass(frozen=True)
class Facts:
    """What a search needs to know of a model: which degrees make sense.

    `rows`: of the example batch; `tokens`: of one row; `num_blocks`: the most stages of whole blocks; `num_layers`: blocks that repeat;
    `parameters`: of the whole model; `parameter_bytes` as traced; `sequence_splits`: whether there is a token dim to split.
    """

    rows: int
    tokens: int
    num_blocks: int
    num_layers: int
    parameters: int
    parameter_bytes: int
    sequence_splits: bool


@dataclass(frozen=True)
class _Rank:
    """A rank of the pipeline: its stages summed."""

    forward: float
    backward: float
    weight: float
    replay: float
    parameters: int


@dataclass(frozen=True)
class _Stages:
    """A cut, priced: stages, ranks, and the sums that every layout with this cut shares."""

    stages: tuple[StageSums, ...]
    ranks: tuple[_Rank, ...]
    held: tuple[HeldStages, ...]  # by rank
    blocks: tuple[int, ...]
    stage_ranks: tuple[int, ...]
    forward: tuple[float, ...]  # seconds by stage, exposed collectives in
    backward: tuple[float, ...]  # replays in
    weight: tuple[float, ...]
    tensor: float  # seconds of the busiest rank's tensor-parallel traffic, a microbatch; of it exposed
    tensor_exposed: float
    context: float
    context_exposed: float
    loads: tuple[RankLoad, ...]  # of the ranks, as their replicas see them


class Evaluator:
    """Predictions for one model on one kind of device. `module` is a canonical graph whose loss is marked; `sizes` those of its example."""

    def __init__(
        self, module: fx.GraphModule | Folded, sizes: Mapping[str, int], hardware: Hardware, *, uncertainty: float | None = None
    ) -> None:
        self.folded = module if isinstance(module, Folded) else fold(module)
        self.sizes, self.hardware = dict(sizes), hardware
        self.uncertainty = UNCERTAINTY.get(hardware.basis) if uncertainty is None else uncertainty
        self._graphs: dict[tuple[int, bool], RankGraph] = {}
        self._units: dict[tuple[object, ...], list[UnitCost]] = {}
        self._stages: dict[tuple[object, ...], _Stages] = {}
        self._shared: dict[tuple[int, bool], list[SharedParameter]] = {}
        self._flops: dict[int, float] = {}
        self._play = lru_cache(maxsize=64)(StepTimes)
        self._dtype = self._compute_dtype()

    def on(self, hardware: Hardware) -> Evaluator:
        """The same model on another device, sharded as on this one: for comparing devices, and constants of one."""
        other = Evaluator(self.folded, self.sizes, hardware)
        other._graphs, other._shared, other._play = self._graphs, self._shared, self._play
        return other

    # ---- the model ----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """What a search over layouts needs to know of the model."""
        count = num_bytes = 0
        pricing = Pricing(self.hardware, self.sizes)
        for node in self.folded.module.graph.nodes:
            kind = tensor_type(node)
            if is_state(node) and node.meta.get("kind") == "parameter" and kind is not None:
                each = pricing.num_bytes(kind) * self.folded.count(node)
                count, num_bytes = count + each // kind.dtype.itemsize, num_bytes + each
        return Facts(
            self.sizes.get("B", 1), self.sizes.get(TOKENS, 1), self.folded.num_blocks,
            sum(unit.count for unit in self.folded.units if unit.run is not None), count, num_bytes, TOKENS in self.sizes,
        )  # fmt: skip

    def _compute_dtype(self) -> str:
        """The dtype of most parameters."""
        counts: dict[str, int] = {}
        for node in self.folded.module.graph.nodes:
            kind = tensor_type(node)
            if is_state(node) and is_trainable(node) and kind is not None:
                name = DTYPE_NAMES.get(kind.dtype, "f32")
                counts[name] = counts.get(name, 0) + self.folded.count(node)
        return max(counts, key=lambda name: counts[name], default="f32")

    def _pricing(self, rows: int, precision: str = "") -> Pricing:
        """`precision` "fp8" and "tf32" run products with weights in another dtype than the graph's."""
        dtype = precision if precision in ("fp8", "tf32") else None
        return Pricing(self.hardware, {**self.sizes, **({"B": rows} if "B" in self.sizes else {})}, dtype)

    def model_flops(self, rows: int) -> float:
        """FLOPs of a forward and backward of so many rows on the whole model, nothing computed twice."""
        if rows not in self._flops:
            pricing, total = self._pricing(rows), 0.0
            for node in self.folded.module.graph.nodes:
                if is_call(node) and is_trainable(node):
                    cost = pricing.cost(call_of(node), tuple(map(is_trainable, tensor_inputs(node))))
                    total += (cost.forward_flops + cost.backward_flops) * self.folded.count(node)
            self._flops[rows] = total
        return self._flops[rows]

    # ---- what layouts share -------------------------------------------------------------------------------------------

    def graph(self, tp: int, sequence_parallel: bool) -> RankGraph:
        """The folded graph sharded over tp. NoLegalSharding or UnevenShard where it cannot be."""
        key = _graph_key(tp, sequence_parallel)
        if key not in self._graphs:
            nominal = self._pricing(1)
            module = self.folded.module
            loss = next((node for node in module.graph.nodes if node.meta.get("loss")), None)
            plan = shard(
                module, axis="tp", axis_size=tp, pricing=nominal, microbatches=8, loss=loss, sequence_parallel=key[1],
                repeats=self.folded.weight,
            )  # fmt: skip
            self._graphs[key] = RankGraph(localize(module, plan), self.folded, {"tp": tp}, nominal)
            self._shared[key] = self._graphs[key].shared()
        return self._graphs[key]

    def units(self, layout: Layout) -> list[UnitCost]:
        """The model's units on one rank of the layout."""
        key = (
            *_graph_key(layout.tp, layout.sequence_parallel), layout.cp, layout.stride("cp"), layout.microbatch_rows, layout.recompute,
            layout.replay_all, layout.fused, layout.precision in ("fp8", "tf32") and layout.precision,
        )  # fmt: skip
        if key not in self._units:
            self._units[key] = unit_costs(
                self.graph(layout.tp, layout.sequence_parallel), self._pricing(layout.microbatch_rows, layout.precision),
                recompute=layout.recompute, replay_all=layout.replay_all, fused=layout.fused, cp=layout.cp,
                context_link=self._link(layout, "cp"),
            )  # fmt: skip
        return self._units[key]

    def stages(self, layout: Layout) -> _Stages:
        """The layout's stages: its own cut or the most even one."""
        key = (
            *_graph_key(layout.tp, layout.sequence_parallel), layout.cp, layout.microbatch_rows, layout.recompute, layout.replay_all,
            layout.fused, layout.pp, layout.virtual_stages, layout.schedule, layout.blocks, layout.overlap, layout.zero == 3,
            layout.dp if layout.zero == 3 else 0, layout.precision, layout.microbatches > 1, layout.gradient_bytes,
            layout.sums_each_microbatch,
        )  # fmt: skip
        if key not in self._stages:
            self._stages[key] = self._cut(layout)
        return self._stages[key]

    def _cut(self, layout: Layout) -> _Stages:
        units = self.units(layout)
        shared = self._shared[_graph_key(layout.tp, layout.sequence_parallel)]
        tied = [sum(each.numel for each in shared if k in each.units) for k in range(len(units))]
        times = [self._unit_seconds(unit, numel, layout) for unit, numel in zip(units, tied, strict=True)]
        whole = [sum(each[:2]) for each in times]
        blocks = layout.blocks or even_cut([whole[unit] for unit in expanded(units)], layout.num_stages)
        stages = stage_sums(units, shared, blocks)
        row = schedule_named(layout.schedule)
        stage_ranks = row.stage_ranks(layout.pp, layout.virtual_stages)
        alike: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}
        for stage in stages:
            if stage.block_counts not in alike:
                alike[stage.block_counts] = tuple(
                    sum(times[unit][part] * count for unit, count in stage.block_counts) for part in range(7)
                )
        by_part = zip(*(alike[stage.block_counts] for stage in stages), strict=True)
        forward, backward, weight, tensor_exposed, context_exposed, gathers, waits = map(list, by_part)
        for k, stage in enumerate(stages):
            added = self._accumulate_seconds(stage.parameters, layout)
            backward[k], weight[k] = backward[k] + added, weight[k] + added
        ranks, loads = [], []
        gradient, parameter = _gradient_bytes(layout), STATE_PRECISIONS[layout.precision].parameter_bytes
        owned: list[list[int]] = [[] for _ in range(layout.pp)]
        for k, owner in enumerate(stage_ranks):
            owned[owner].append(k)
        for held in owned:
            ranks.append(
                _Rank(
                    sum(forward[k] for k in held), sum(backward[k] for k in held), sum(weight[k] for k in held),
                    sum(stages[k].replay_seconds for k in held), sum(stages[k].parameters for k in held),
                )
            )  # fmt: skip
            rank = ranks[-1]
            gathered, waited = (sum(listed[k] for k in held) for listed in (gathers, waits))
            loads.append(
                RankLoad(rank.parameters * gradient, rank.parameters * parameter, rank.forward, rank.backward, gathered, waited)
            )
        busiest = max(range(layout.pp), key=lambda rank: ranks[rank].forward + ranks[rank].backward)
        mine = [k for k, owner in enumerate(stage_ranks) if owner == busiest]
        return _Stages(
            tuple(stages), tuple(ranks), held_stages(stages, stage_ranks), tuple(blocks), stage_ranks,
            tuple(forward), tuple(backward), tuple(weight),
            sum(stages[k].forward_tensor_seconds + stages[k].backward_tensor_seconds + stages[k].replay_tensor_seconds for k in mine),
            sum(tensor_exposed[k] for k in mine),
            sum(stages[k].forward_context_seconds + stages[k].backward_context_seconds + stages[k].replay_context_seconds for k in mine),
            sum(context_exposed[k] for k in mine),
            tuple(loads),
        )  # fmt: skip

    def _unit_seconds(self, unit: UnitCost, tied: int, layout: Layout) -> tuple[float, ...]:
        """(forward, backward with replays, weight gradients of it, exposed tensor-parallel, exposed context-parallel, ZeRO 3's traffic,
        what of it is exposed) seconds of a unit that uses `tied` parameters which others use too.
        """
        phases = (
            (unit.forward_seconds, unit.forward_tensor_seconds, unit.forward_context_seconds),
            (unit.backward_seconds, unit.backward_tensor_seconds, unit.backward_context_seconds),
            (unit.replay_seconds, unit.replay_tensor_seconds, unit.replay_context_seconds),
        )
        seconds, tensor_exposed, context_exposed = [], 0.0, 0.0
        slowdown = self.hardware.kernels.overlap_slowdown
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
                axis=self._replicas(layout),
            )  # fmt: skip
        waits = forward + backward - sum(seconds)
        return forward, backward, unit.weight_seconds, tensor_exposed, context_exposed, gathers, waits

    def _accumulate_seconds(self, numel: int, layout: Layout) -> float:
        """Of adding a microbatch's gradients of `numel` parameters to the step's sum: read both, write one. Under ZeRO 3 only a
        shard's, where replicas sum in each microbatch.
        """
        if layout.microbatches == 1:
            return 0.0
        row = STATE_PRECISIONS[layout.precision]
        each = _gradient_bytes(layout)
        count = layout.dp * layout.cp if layout.zero == 3 and layout.sums_each_microbatch else 1
        rate = self.hardware.memory_bandwidth_bytes_per_second * self.hardware.memory_efficiency
        return numel / count * (row.parameter_bytes + 2 * each) / rate

    def _link(self, layout: Layout, axis: str, size: int | None = None) -> AxisLink:
        return self.hardware.axis_link(size or getattr(layout, axis), layout.stride(axis))

    def _replicas(self, layout: Layout) -> ReplicaAxis:
        """The ranks that hold the same parameters (dp and cp)."""
        count = layout.dp * layout.cp
        return ReplicaAxis(
            count, self.hardware.axis_link(count, layout.tp), layout.zero, "dp" in layout.overlap, self.hardware.kernels.overlap_slowdown,
            layout.sums_each_microbatch,
        )  # fmt: skip

    # ---- one layout ---------------------------------------------------------------------------------------------------

    def predict(self, layout: Layout, *, exact: bool = False) -> LayoutPrediction:
        """Step time and memory. NoLegalSharding, TooManyStages or BadArgument where the layout cannot be.

        `exact`: play the schedule with each stage's own times.
        """
        row = schedule_named(layout.schedule) if layout.pp > 1 else _ALONE
        cut = self.stages(layout if layout.pp > 1 else replace(layout, schedule="1f1b", virtual_stages=1))
        send = self._send_seconds(layout, cut)
        pipeline = self._pipeline_seconds(layout, cut, row, send, exact)
        busy = layout.microbatches * max(rank.forward + rank.backward for rank in cut.ranks)
        replicas = self._replica_traffic(layout, cut)
        update = self._optimizer_seconds(layout, cut)
        step = pipeline + replicas.tail_seconds + update
        sends = 2 * layout.microbatches * send * layout.virtual_stages if layout.pp > 1 else 0.0
        idle = pipeline - layout.microbatches * sum(rank.forward + rank.backward for rank in cut.ranks) / len(cut.ranks)
        rows = layout.global_rows
        return LayoutPrediction(
            layout, step, self._memory(layout, cut), float(self.hardware.memory_bytes), max(idle, 0.0) / step if step else 0.0,
            {
                "tp": layout.microbatches * cut.tensor, "cp": layout.microbatches * cut.context, "dp": replicas.seconds, "pp": sends,
            },
            {
                "tp": layout.microbatches * cut.tensor_exposed, "cp": layout.microbatches * cut.context_exposed,
                "dp": replicas.exposed_seconds, "pp": max(pipeline - busy, 0.0) if layout.pp > 1 else 0.0,
            },
            update, layout.microbatches * max(rank.replay for rank in cut.ranks),
            self.model_flops(layout.microbatch_rows) * rows / layout.microbatch_rows,
            self._peak_flops(layout), rows * self.sizes.get(TOKENS, 1), self.hardware.basis, self.uncertainty, cut.blocks, replicas,
        )  # fmt: skip

    def _memory(self, layout: Layout, cut: _Stages) -> LayoutMemory:
        return layout_memory(layout, cut.held, on_cpu=self.hardware.device_type == "cpu")

    def _peak_flops(self, layout: Layout) -> float:
        name = _PEAK_DTYPES.get(layout.precision, self._dtype)
        rates = self.hardware.peak_flops
        return rates.get(name, rates["f32"])

    def _send_seconds(self, layout: Layout, cut: _Stages) -> float:
        """Of the largest value that a stage sends to the next, one way."""
        if layout.pp == 1:
            return 0.0
        stage = max(cut.stages, key=lambda each: each.sent_bytes)
        num_bytes = stage.sent_bytes
        link = self.hardware.axis_link(layout.pp, layout.stride("pp"))
        slowest = link.inside if link.num_nodes == 1 else link.across
        gather = 0.0
        if layout.split_sends and layout.tp > 1 and stage.sent_whole_bytes:
            whole = stage.sent_whole_bytes
            num_bytes += whole / layout.tp - whole
            gather = collective_seconds("all_gather", num_bytes=whole, axis_size=layout.tp, link=self._link(layout, "tp"))
        return float(send_seconds(num_bytes=num_bytes, link=slowest)) + gather

    def _pipeline_seconds(self, layout: Layout, cut: _Stages, row: Schedule, send: float, exact: bool) -> float:
        if layout.pp == 1:
            return layout.microbatches * (cut.ranks[0].forward + cut.ranks[0].backward)
        if exact:
            played = self._play(row, layout.pp, layout.microbatches, layout.virtual_stages)
            count = len(cut.stages)
            sends = torch.zeros(1, count, count, dtype=torch.float64)
            for stage in range(count - 1):
                if cut.stage_ranks[stage] != cut.stage_ranks[stage + 1]:
                    sends[0, stage, stage + 1] = send
            times = [torch.tensor([values], dtype=torch.float64) for values in (cut.forward, cut.backward, cut.weight)]
            return float(played(times[0], times[1], sends, None, times[2], layout.barrier))
        loads = [rank.forward + rank.backward for rank in cut.ranks]
        most = max(range(len(loads)), key=loads.__getitem__)
        others = [rank for k, rank in enumerate(cut.ranks) if k != most]
        count = len(others)
        forward, backward, weight = (sum(getattr(rank, part) for rank in others) / count for part in ("forward", "backward", "weight"))
        weight = weight if row.splits_backward else backward / 2
        idle = None
        if row.bubble_seconds is not None:
            idle = row.bubble_seconds(layout.pp, layout.microbatches, layout.virtual_stages, forward, backward - weight, weight)
        if idle is None:
            idle = (layout.pp - 1) * (forward + backward) / layout.virtual_stages
        slack = loads[most] - sum(loads[k] for k in range(len(loads)) if k != most) / count  # hides transfers
        waits = max(send * layout.virtual_stages - slack, 0.0)
        return layout.microbatches * (loads[most] + waits) + max(idle, 0.0) + 2 * (layout.pp - 1) * send

    def _replica_traffic(self, layout: Layout, cut: _Stages) -> ReplicaTraffic:
        return replica_traffic(
            cut.loads, self._replicas(layout), microbatches=layout.microbatches, virtual_stages=layout.virtual_stages
        )

    def _optimizer_seconds(self, layout: Layout, cut: _Stages) -> float:
        count = layout.dp * layout.cp if layout.zero else 1
        numel = -(-max(rank.parameters for rank in cut.ranks) // count)
        return float(
            optimizer_seconds(
                numel, self.hardware, precision=layout.precision, optimizer=layout.optimizer, gradient_bytes=layout.gradient_bytes
            )
        )


def _graph_key(tp: int, sequence_parallel: bool) -> tuple[int, bool]:
    """Layouts alike in this have one sharded graph: with one rank there is nothing for sequence parallelism to split."""
    return tp, sequence_parallel and tp > 1


def _gradient_bytes(layout: Layout) -> float:
    """Of an element that is summed over replicas and microbatches: the layout's own, else the precision's."""
    return STATE_PRECISIONS[layout.precision].gradient_bytes if layout.gradient_bytes is None else layout.gradient_bytes


_ALONE = schedule_named("1f1b")

"""The evaluator: step time and memory of any `Layout` of one model on one kind of device, thousands a second.

What is solved once. The model is folded (`passes.fold`); for each (tp, sequence parallel) the folded graph is sharded and localized,
for each (microbatch rows, cp, recompute) its units are priced (`passes.layout_rows`), for each cut the stages are summed. A layout then
is sums of a few numbers (`predict`), so that ordering a space costs what its distinct stages cost.

The step, from the last rank to stop:

    microbatches x (forward + backward of the busiest rank) + the schedule's idle time     `_pipeline_seconds`
  + gradient sums and parameter gathers that compute does not hide                         `_data_seconds`
  + the optimizer's memory traffic                                                         `costmodel.memory.optimizer_seconds`

`exact=True` plays the schedule's instructions with every stage's own times (`passes.step_time`, what the cut pass minimises and plans
predict); otherwise the idle time is the schedule's published formula for equal stages, plus for each microbatch what a transfer adds.

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

BUCKET_BYTES = 40e6  # of gradients that are summed while the next ones are made: what is left over after the last backward
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
            layout.replay_all, layout.precision in ("fp8", "tf32") and layout.precision,
        )  # fmt: skip
        if key not in self._units:
            self._units[key] = unit_costs(
                self.graph(layout.tp, layout.sequence_parallel), self._pricing(layout.microbatch_rows, layout.precision),
                recompute=layout.recompute, replay_all=layout.replay_all, cp=layout.cp, context_link=self._link(layout, "cp"),
            )  # fmt: skip
        return self._units[key]

    def stages(self, layout: Layout) -> _Stages:
        """The layout's stages: its own cut or the most even one."""
        key = (
            *_graph_key(layout.tp, layout.sequence_parallel), layout.cp, layout.microbatch_rows, layout.recompute, layout.replay_all,
            layout.pp, layout.virtual_stages, layout.schedule, layout.blocks, layout.overlap, layout.zero == 3,
            layout.dp if layout.zero == 3 else 0, layout.precision, layout.microbatches > 1, layout.gradient_bytes,
        )  # fmt: skip
        if key not in self._stages:
            self._stages[key] = self._cut(layout)
        return self._stages[key]

    def _cut(self, layout: Layout) -> _Stages:
        units = self.units(layout)
        times = [self._unit_seconds(unit, layout) for unit in units]
        whole = [sum(each[:2]) for each in times]
        blocks = layout.blocks or even_cut([whole[unit] for unit in expanded(units)], layout.num_stages)
        shared = self._shared[_graph_key(layout.tp, layout.sequence_parallel)]
        stages = stage_sums(units, shared, blocks)
        row = schedule_named(layout.schedule)
        stage_ranks = row.stage_ranks(layout.pp, layout.virtual_stages)
        alike: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}
        for stage in stages:
            if stage.block_counts not in alike:
                alike[stage.block_counts] = tuple(
                    sum(times[unit][part] * count for unit, count in stage.block_counts) for part in range(5)
                )
        by_part = zip(*(alike[stage.block_counts] for stage in stages), strict=True)
        forward, backward, weight, tensor_exposed, context_exposed = map(list, by_part)
        for k, stage in enumerate(stages):
            added = self._accumulate_seconds(stage.parameters, layout)
            backward[k], weight[k] = backward[k] + added, weight[k] + added
        ranks = []
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
        busiest = max(range(layout.pp), key=lambda rank: ranks[rank].forward + ranks[rank].backward)
        mine = [k for k, owner in enumerate(stage_ranks) if owner == busiest]
        return _Stages(
            tuple(stages), tuple(ranks), held_stages(stages, stage_ranks), tuple(blocks), stage_ranks,
            tuple(forward), tuple(backward), tuple(weight),
            sum(stages[k].forward_tensor_seconds + stages[k].backward_tensor_seconds + stages[k].replay_tensor_seconds for k in mine),
            sum(tensor_exposed[k] for k in mine),
            sum(stages[k].forward_context_seconds + stages[k].backward_context_seconds + stages[k].replay_context_seconds for k in mine),
            sum(context_exposed[k] for k in mine),
        )  # fmt: skip

    def _unit_seconds(self, unit: UnitCost, layout: Layout) -> tuple[float, float, float, float, float]:
        """(forward, backward with replays, weight gradients of it, exposed tensor-parallel, exposed context-parallel) seconds."""
        phases = (
            (unit.forward_seconds, unit.forward_tensor_seconds, unit.forward_context_seconds),
            (unit.backward_seconds, unit.backward_tensor_seconds, unit.backward_context_seconds),
            (unit.replay_seconds, unit.replay_tensor_seconds, unit.replay_context_seconds),
        )
        seconds, tensor_exposed, context_exposed = [], 0.0, 0.0
        for compute, tensor, context in phases:
            total, exposed = self._beside(compute, tensor, "tp" in layout.overlap, tensor / layout.tp)
            tensor_exposed += exposed
            total, exposed = self._beside(total, context, "cp" in layout.overlap, context / layout.cp)
            context_exposed += exposed
            seconds.append(total)
        if layout.zero == 3 and layout.dp * layout.cp > 1:
            gather, scatter = self._shard_seconds(unit.parameters, layout)
            hidden = "dp" in layout.overlap
            seconds[0], _ = self._beside(seconds[0], gather, hidden, 0.0)
            back, _ = self._beside(seconds[1] + seconds[2], gather + scatter, hidden, 0.0)
            seconds[1] = back - seconds[2]
        return seconds[0], seconds[1] + seconds[2], unit.weight_seconds, tensor_exposed, context_exposed

    def _accumulate_seconds(self, numel: int, layout: Layout) -> float:
        """Of adding a microbatch's gradients of `numel` parameters to the step's sum: read both, write one. Under ZeRO 2 and 3 only a
        shard's.
        """
        if layout.microbatches == 1:
            return 0.0
        row = STATE_PRECISIONS[layout.precision]
        each = _gradient_bytes(layout)
        count = self._replicas(layout)[0] if layout.zero > 1 else 1
        rate = self.hardware.memory_bandwidth_bytes_per_second * self.hardware.memory_efficiency
        return numel / count * (row.parameter_bytes + 2 * each) / rate

    def _beside(self, compute: float, traffic: float, overlaps: bool, first: float) -> tuple[float, float]:
        """(seconds of compute with traffic beside or after it, what of the traffic is exposed). `first`: seconds nothing can hide."""
        if not traffic:
            return compute, 0.0
        if not overlaps:
            return compute + traffic, traffic
        hidden = min(traffic - first, compute)
        slowed = compute + hidden * (self.hardware.kernels.overlap_slowdown - 1)
        total = max(slowed, traffic - first) + first
        return total, total - compute

    def _link(self, layout: Layout, axis: str, size: int | None = None) -> AxisLink:
        return self.hardware.axis_link(size or getattr(layout, axis), layout.stride(axis))

    def _replicas(self, layout: Layout) -> tuple[int, AxisLink]:
        """How many ranks hold the same parameters (dp and cp), and their links."""
        count = layout.dp * layout.cp
        return count, self.hardware.axis_link(count, layout.tp)

    def _shard_seconds(self, numel: int, layout: Layout) -> tuple[float, float]:
        """(all_gather of parameters, reduce_scatter of gradients) of a layer under ZeRO 3."""
        count, link = self._replicas(layout)
        row = STATE_PRECISIONS[layout.precision]
        gradient = row.gradient_bytes
        return (
            collective_seconds("all_gather", num_bytes=numel * row.parameter_bytes, axis_size=count, link=link),
            collective_seconds("reduce_scatter", num_bytes=numel * gradient, axis_size=count, link=link),
        )

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
        traffic, exposed = self._data_seconds(layout, cut)
        update = self._optimizer_seconds(layout, cut)
        step = pipeline + exposed + update
        sends = 2 * layout.microbatches * send * layout.virtual_stages if layout.pp > 1 else 0.0
        idle = pipeline - layout.microbatches * sum(rank.forward + rank.backward for rank in cut.ranks) / len(cut.ranks)
        rows = layout.global_rows
        return LayoutPrediction(
            layout, step, self._memory(layout, cut), float(self.hardware.memory_bytes), max(idle, 0.0) / step if step else 0.0,
            {
                "tp": layout.microbatches * cut.tensor, "cp": layout.microbatches * cut.context, "dp": traffic, "pp": sends,
            },
            {
                "tp": layout.microbatches * cut.tensor_exposed, "cp": layout.microbatches * cut.context_exposed, "dp": exposed,
                "pp": max(pipeline - busy, 0.0) if layout.pp > 1 else 0.0,
            },
            update, layout.microbatches * max(rank.replay for rank in cut.ranks),
            self.model_flops(layout.microbatch_rows) * rows / layout.microbatch_rows,
            self._peak_flops(layout), rows * self.sizes.get(TOKENS, 1), self.hardware.basis, self.uncertainty, cut.blocks,
        )  # fmt: skip

    def _memory(self, layout: Layout, cut: _Stages) -> LayoutMemory:
        return layout_memory(layout, cut.held, on_cpu=self.hardware.name == "cpu")

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
            return float(played(times[0], times[1], sends, None, times[2]))
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

    def _data_seconds(self, layout: Layout, cut: _Stages) -> tuple[float, float]:
        """(traffic of the fullest rank a step, what of it the step waits for): gradient sums, and gathers of updated parameters."""
        count, link = self._replicas(layout)
        row = STATE_PRECISIONS[layout.precision]
        each = _gradient_bytes(layout)
        if count == 1:
            return 0.0, 0.0
        if layout.zero == 3:
            gather, scatter = self._shard_seconds(max(rank.parameters for rank in cut.ranks), layout)
            return layout.microbatches * (2 * gather + scatter), 0.0  # exposed with the units: `_unit_seconds`
        traffic, exposed = 0.0, 0.0
        later = 0.0  # how much longer the ranks before this one run
        known: dict[int, tuple[float, float]] = {}  # (sums, gathers) of so many parameters
        for rank in cut.ranks:
            if rank.parameters not in known:
                kind = "all_reduce" if layout.zero == 0 else "reduce_scatter"
                known[rank.parameters] = (
                    collective_seconds(kind, num_bytes=rank.parameters * each, axis_size=count, link=link),
                    collective_seconds("all_gather", num_bytes=rank.parameters * row.parameter_bytes, axis_size=count, link=link)
                    if layout.zero else 0.0,
                )  # fmt: skip
            sums, gathers = known[rank.parameters]
            left = sums + gathers
            if "dp" in layout.overlap:
                bucket = min(1.0, BUCKET_BYTES / max(rank.parameters * each, 1))
                left = max(sums * bucket, sums - rank.backward) + max(gathers * bucket, gathers - rank.forward)
                slowed = self.hardware.kernels.overlap_slowdown - 1
                left += slowed * (min(sums, rank.backward) + min(gathers, rank.forward))
            traffic, exposed = max(traffic, sums + gathers), max(exposed, left - later)
            later += rank.backward / layout.virtual_stages
        return traffic, exposed

    def _optimizer_seconds(self, layout: Layout, cut: _Stages) -> float:
        count = self._replicas(layout)[0] if layout.zero else 1
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

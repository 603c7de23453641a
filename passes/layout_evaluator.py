"""The evaluator: step time and memory of any `Layout` of one model on one kind of device, thousands a second.

What is solved once. The model is folded (`passes.fold`); for each (tp, sequence parallel) the folded graph is sharded and localized,
for each (microbatch rows, cp, recompute) its units are priced (`passes.layout_rows`), for each cut the stages are summed. A layout then
is sums of a few numbers (`predict`), so that ordering a space costs what its distinct stages cost.

The step, from the last rank to stop:

    microbatches x (forward + backward of the busiest rank) + the schedule's idle time     `_pipeline_seconds`
  + gradient sums and parameter gathers that compute does not hide                         `costmodel.replicas`
  + the optimizer's memory traffic                                                         `costmodel.memory.optimizer_seconds`

`exact=True` plays the schedule's instructions with every stage's own times (`passes.step_time`, what the cut pass minimises and plans
predict); otherwise the idle time is that of the schedule for equal stages (`Schedule.idle`), plus for each microbatch what a transfer
adds.

Overlap. Traffic of an axis in `Layout.overlap` runs beside compute: of a tensor-parallel collective what its unit's compute
cannot hide is exposed, and always the first of its `tp` pieces; of a data-parallel sum what the last microbatch's backward cannot; of
ZeRO 3's gathers what the unit before cannot. Compute is slowed meanwhile (`Kernels.overlap_slowdown`).

Memory is `passes.layout_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import fx

from costmodel.collectives import send_seconds
from costmodel.hardware import AxisLink, Hardware
from costmodel.memory import optimizer_seconds
from costmodel.replicas import replica_traffic
from passes.costs import Pricing
from passes.fold import Folded, fold
from passes.ir import DTYPE_NAMES, is_state, is_trainable, tensor_inputs, tensor_type
from passes.layout import Layout, LayoutMemory, LayoutPrediction
from passes.layout_cut import Cutter, Stages, replica_axis
from passes.layout_memory import fullest, memory_by_rank
from passes.layout_rows import TOKENS, RankGraph, SharedParameter, UnitCost, unit_costs
from passes.localize import localize
from passes.patterns import call_of
from passes.reshard import collective_seconds
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named
from passes.shard import shard
from passes.step_time import StepTimes
from passes.values import is_call

# The dtype whose peak rate a layout is measured against, by precision; for others that of most parameters.
_PEAK_DTYPES = {
    "bf16": "bf16", "bf16-master": "bf16", "bf16-mixed": "bf16", "fp16": "f16", "fp16-mixed": "f16", "fp8": "fp8", "tf32": "tf32",
}  # fmt: skip


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


class Evaluator:
    """Predictions for one model on one kind of device. `module` is a canonical graph whose loss is marked; `sizes` those of its example."""

    def __init__(
        self, module: fx.GraphModule | Folded, sizes: Mapping[str, int], hardware: Hardware, *, uncertainty: float | None = None
    ) -> None:
        self.folded = module if isinstance(module, Folded) else fold(module)
        self.sizes, self.hardware = dict(sizes), hardware
        self.uncertainty = hardware.uncertainty if uncertainty is None else uncertainty
        self._graphs: dict[tuple[int, bool, bool], RankGraph] = {}
        self._units: dict[tuple[object, ...], list[UnitCost]] = {}
        self._cutter = Cutter(hardware)
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

    def pricing(self, rows: int, precision: str = "") -> Pricing:
        """Prices of microbatches of so many rows. `precision` "fp8" and "tf32" run products with weights in another dtype."""
        dtype = precision if precision in ("fp8", "tf32") else None
        return Pricing(self.hardware, {**self.sizes, **({"B": rows} if "B" in self.sizes else {})}, dtype)

    def model_flops(self, rows: int) -> float:
        """FLOPs of a forward and backward of so many rows on the whole model, nothing computed twice."""
        if rows not in self._flops:
            pricing, total = self.pricing(rows), 0.0
            for node in self.folded.module.graph.nodes:
                if is_call(node) and is_trainable(node):
                    cost = pricing.cost(call_of(node), tuple(map(is_trainable, tensor_inputs(node))))
                    total += (cost.forward_flops + cost.backward_flops) * self.folded.count(node)
            self._flops[rows] = total
        return self._flops[rows]

    # ---- what layouts share -------------------------------------------------------------------------------------------

    def graph(self, tp: int, sequence_parallel: bool, holds_casts: bool = False) -> RankGraph:
        """The folded graph sharded over tp. NoLegalSharding or UnevenShard where it cannot be."""
        key = (*_graph_key(tp, sequence_parallel), holds_casts)
        if key not in self._graphs:
            nominal = self.pricing(1)
            module = self.folded.module
            loss = next((node for node in module.graph.nodes if node.meta.get("loss")), None)
            plan = shard(
                module, axis="tp", axis_size=tp, pricing=nominal, microbatches=8, loss=loss, sequence_parallel=key[1],
                repeats=self.folded.weight,
            )  # fmt: skip
            self._graphs[key] = RankGraph(localize(module, plan), self.folded, {"tp": tp}, nominal, holds_casts)
            self._shared[key[:2]] = self._graphs[key].shared()
        return self._graphs[key]

    def units(self, layout: Layout) -> list[UnitCost]:
        """The model's units on one rank of the layout."""
        key = self._units_key(layout)
        if key not in self._units:
            self._units[key] = unit_costs(
                self.graph(layout.tp, layout.sequence_parallel, _holds_casts(layout)),
                self.pricing(layout.microbatch_rows, layout.precision),
                recompute=layout.recompute, replay_all=layout.replay_all, gather_again=layout.gather_again, fused=layout.fused,
                fused_loss=layout.fused_loss, cp=layout.cp, context_link=self._link(layout, "cp"),
            )  # fmt: skip
        return self._units[key]

    def _units_key(self, layout: Layout) -> tuple[object, ...]:
        return (
            *_graph_key(layout.tp, layout.sequence_parallel), layout.cp, layout.microbatch_rows, layout.recompute, layout.replay_all,
            layout.gather_again, layout.fused, layout.fused_loss, layout.precision, _holds_casts(layout),
        )  # fmt: skip

    def stages(self, layout: Layout) -> Stages:
        """The layout's stages: its own cut or the most even one."""
        units = self.units(layout)
        shared = self._shared[_graph_key(layout.tp, layout.sequence_parallel)]
        return self._cutter.stages(layout, _schedule(layout), units, shared, self._units_key(layout))

    def _link(self, layout: Layout, axis: str) -> AxisLink:
        return self.hardware.axis_link(getattr(layout, axis), layout.stride(axis))

    # ---- one layout ---------------------------------------------------------------------------------------------------

    def predict(self, layout: Layout, *, exact: bool = False) -> LayoutPrediction:
        """Step time and memory. NoLegalSharding, TooManyStages or BadArgument where the layout cannot be.

        `exact`: play the schedule with each stage's own times.
        """
        cut = self.stages(layout if layout.pp > 1 or layout.virtual_stages == 1 else replace(layout, virtual_stages=1))
        send = self._send_seconds(layout, cut)
        pipeline = self._pipeline_seconds(layout, cut, send, exact)
        count, busiest = layout.microbatches, cut.busiest
        replicas = replica_traffic(
            cut.loads, replica_axis(layout, self.hardware), microbatches=count, virtual_stages=layout.virtual_stages
        )
        update = self._optimizer_seconds(layout, cut)
        step = pipeline + replicas.tail_seconds + update
        idle = pipeline - count * cut.mean_load
        tensor, tensor_exposed, context, context_exposed = cut.traffic
        waits = max(pipeline - count * busiest.load, 0.0) if layout.pp > 1 else 0.0
        sends = 2 * count * send * layout.virtual_stages
        rows = layout.global_rows
        return LayoutPrediction(
            layout, step, fullest(layout, cut.held, on_cpu=self.hardware.device_type == "cpu"), float(self.hardware.memory_bytes),
            max(idle, 0.0) / step if step else 0.0,
            {"tp": count * tensor, "cp": count * context, "dp": replicas.seconds, "pp": sends},
            {"tp": count * tensor_exposed, "cp": count * context_exposed, "dp": replicas.exposed_seconds, "pp": waits},
            update, count * cut.most_replay, self.model_flops(layout.microbatch_rows) * rows / layout.microbatch_rows,
            self._peak_flops(layout), rows * self.sizes.get(TOKENS, 1), self.hardware.basis, self.uncertainty, cut.blocks, replicas,
        )  # fmt: skip

    def memory_by_rank(self, layout: Layout) -> tuple[LayoutMemory, ...]:
        """What each pipeline rank holds at its peak; a prediction's memory is the largest."""
        return memory_by_rank(layout, self.stages(layout).held, on_cpu=self.hardware.device_type == "cpu")

    def _peak_flops(self, layout: Layout) -> float:
        name = _PEAK_DTYPES.get(layout.precision, self._dtype)
        rates = self.hardware.peak_flops
        return rates.get(name, rates["f32"])

    def _send_seconds(self, layout: Layout, cut: Stages) -> float:
        """Of the largest value that a stage sends to the next, one way."""
        if layout.pp == 1:
            return 0.0
        num_bytes, whole = cut.sender.sent_bytes, cut.sender.sent_whole_bytes
        link = self._link(layout, "pp")
        slowest = link.inside if link.num_nodes == 1 else link.across
        gather = 0.0
        if layout.split_sends and layout.tp > 1 and whole:
            num_bytes += whole / layout.tp - whole
            gather = collective_seconds("all_gather", num_bytes=whole, axis_size=layout.tp, link=self._link(layout, "tp"))
        return float(send_seconds(num_bytes=num_bytes, link=slowest)) + gather

    def _pipeline_seconds(self, layout: Layout, cut: Stages, send: float, exact: bool) -> float:
        pp, count, busiest = layout.pp, layout.microbatches, cut.busiest
        if pp == 1:
            return count * busiest.load
        row = schedule_named(layout.schedule)
        if exact:
            played = self._play(row, pp, count, layout.virtual_stages)
            sends = torch.zeros(1, len(cut.stages), len(cut.stages), dtype=torch.float64)
            for stage, (rank, following) in enumerate(pairwise(cut.stage_ranks)):
                if rank != following:
                    sends[0, stage, stage + 1] = send
            times = [torch.tensor([values], dtype=torch.float64) for values in (cut.forward, cut.backward, cut.weight)]
            return float(played(times[0], times[1], sends, None, times[2], layout.barrier))
        forward, backward, weight = cut.others
        virtual = layout.virtual_stages
        idle = row.idle_seconds(pp, count, virtual, forward / virtual, (backward - weight) / virtual, weight / virtual)
        if idle is None:
            idle = (pp - 1) * (forward + backward) / virtual
        slack = busiest.load - forward - backward  # hides transfers
        waits = max(send * virtual - slack, 0.0)
        return count * (busiest.load + waits) + max(idle, 0.0) + 2 * (pp - 1) * send

    def _optimizer_seconds(self, layout: Layout, cut: Stages) -> float:
        count = layout.dp * layout.cp if layout.zero else 1
        return float(
            optimizer_seconds(
                -(-cut.most_parameters // count), self.hardware, precision=layout.precision, optimizer=layout.optimizer,
                gradient_bytes=layout.gradient_bytes,
            )
        )  # fmt: skip


def _graph_key(tp: int, sequence_parallel: bool) -> tuple[int, bool]:
    """Layouts alike in this have one sharded graph: with one rank there is nothing for sequence parallelism to split."""
    return tp, sequence_parallel and tp > 1


def _holds_casts(layout: Layout) -> bool:
    """Whether casts of parameters are made once a step, as plans make them (`autopar.cast_plan`)."""
    return layout.microbatches > 1 and layout.zero < 3 and layout.recompute != "full"


def _schedule(layout: Layout) -> Schedule:
    """The schedule's row; with one rank they are all the same."""
    return schedule_named(layout.schedule if layout.pp > 1 else "1f1b")

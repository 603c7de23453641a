"""The memory of a finished plan: each rank's peak, from its own programs and instructions, and what backward computes again to
lower it.

Each stage is measured once per size of microbatch (`autopar.measure_memory`), and stages of one structure only once; then every
pipeline rank's instruction list is walked (`passes.memory_walk`). What is computed again is chosen by `passes.recompute`; for a
budget, rank by rank: all units at the lowest price that fits, then as many of them as can be at the price below, each try measured
as the plan itself is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autopar.cast_plan import cast_bytes, with_held_casts
from autopar.measure_memory import NEEDS_VALUES, measure, saves
from autopar.program import StageModule
from autopar.runtime.transfers import MOST_SENDS
from costmodel.errors import BadArgument, DoesNotFit
from costmodel.memory import OPTIMIZERS, MicrobatchBytes, PeakMemory
from passes.costs import Pricing
from passes.ir import is_state, is_trainable, tensor_type
from passes.localize import sharding
from passes.memory_walk import StageUse, walk
from passes.placement import local_shape, local_type
from passes.recompute import (
    PRICES,
    SELECTIVE_PASSES,
    Choice,
    Choices,
    Saves,
    Unit,
    line_of,
    segment_names,
    segments_of,
    units,
)

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan

Measured = dict[tuple[str, tuple[int, ...]], MicrobatchBytes]
Sizes = Mapping[str, int]
Recompute = str | int  # "none", "selective", "full", or the most bytes that a rank may hold

MOST_NAMED = 8  # segments that a note lists
MOST_NOTES = 6  # stages that get a note
RESERVED = frozenset(dir(StageModule)) | {"device", "training", "p", "deferred", "forward"}


def microbatch_sizes(plan: Plan) -> list[dict[str, int]]:
    """The sizes of each microbatch, as the runtime splits the batch: the larger first."""
    rows = plan.sizes.get("B")
    if rows is None:
        return [dict(plan.sizes)] * plan.microbatches
    each, larger = divmod(rows, plan.microbatches)
    return [{**plan.sizes, "B": each + (index < larger)} for index in range(plan.microbatches)]


def structure(stage: StagePlan) -> str:
    """A digest that stages share which are the same but for names and source lines."""
    numbers: dict[str, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers[item] if key == "node" else plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    lines: list[Any] = []
    segments: dict[str, int] = {}
    for record in stage.records:
        numbers[record["name"]] = len(numbers)
        kept = {
            key: plain(value)
            for key, value in record.items()
            if key not in ("name", "origin", "target", "segment", "received")
        }
        target = record.get("target") if record["op"] == "call_function" else None
        inside = record.get("segment")
        lines.append([kept, target, segments.setdefault(inside, len(segments)) if inside else None])
    lines.append([[value.type, value.gradient] for value in stage.receives.values()])
    lines.append([[value.type, value.gradient, len(value.to)] for value in stage.sends.values()])
    lines.append([list(stage.outputs.values()), [numbers.get(name, -1) for name in stage.tied]])
    return hashlib.blake2b(json.dumps(lines, default=str).encode(), digest_size=12).hexdigest()


def _state(stage: StagePlan, plan: Plan, held: set[str]) -> tuple[int, int, dict[str, int]]:
    """(bytes of parameters and buffers, bytes of optimizer state, gradient bytes by name) on one rank.

    `held` are the names that earlier stages of the rank have already brought; this stage's are added.
    """
    total = optimizer = 0
    gradients: dict[str, int] = {}
    for node in stage.graph_module.graph.nodes:
        kind = tensor_type(node)
        if is_state(node) and kind is not None:
            count = 1
            for size in local_type(kind, sharding(node), plan.mesh).shape:
                count *= int(size)
            first = str(node.target) not in held
            held.add(str(node.target))
            is_parameter = node.meta.get("kind") == "parameter"
            part = -(-count // plan.mesh.get("dp", 1))  # a replica's, in ZeRO
            total += (part if is_parameter and plan.zero >= 3 else count) * kind.dtype.itemsize * first
            if is_parameter and is_trainable(node):
                optimizer += (part if plan.zero else count) * OPTIMIZERS["adamw"] * kind.dtype.itemsize * first
                gradients[str(node.target)] = count * kind.dtype.itemsize
    return total, optimizer, gradients


def _value_bytes(text: str, sizes: Sizes, plan: Plan) -> int:
    dtype, shape = local_shape(text, sizes, plan.mesh)
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return num_bytes


def _arrivals(stage: StagePlan, plan: Plan, sizes: Sizes) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes of the activations, and of the gradients, that a microbatch brings, by the stage they come from."""
    received: dict[int, int] = {}
    gradients: dict[int, int] = {}
    for value in stage.receives.values():
        received[value.source] = received.get(value.source, 0) + _value_bytes(value.type, sizes, plan)
    for sent in stage.sends.values():
        for to in sent.to if sent.gradient else ():
            gradients[to] = gradients.get(to, 0) + _value_bytes(sent.type, sizes, plan)
    return received, gradients


def _tied_inside(stage: StagePlan, plan: Plan) -> int:
    """How many stages of this rank share the tied parameters that no other rank holds."""
    return max(
        (len(held) for held in stage.tied.values() if len({plan.stage_ranks[other] for other in held}) == 1), default=0
    )


def _sum_bytes(stage: StagePlan, plan: Plan, gradients: Mapping[str, int]) -> int:
    """The most that the sums at the end of a step take besides the gradients (runtime/gradients.py)."""
    count = plan.microbatches if plan.tied_exact else 1
    most = 0
    for name, stages in stage.tied.items():
        if name in gradients and len({plan.stage_ranks[other] for other in stages}) > 1:
            each = gradients[
                name
            ]  # all its microbatches stacked, as many from each other stage, the sum, and a summand
            most = max(most, count * each, (len(stages) - 1) * count * each + 2 * each)
    partial = sum(gradients.get(name, 0) for name in stage.partial_gradients)
    return max(most, 2 * partial if plan.mesh.get("tp", 1) > 1 else 0)


def pipeline_ranks(plan: Plan) -> list[list[StagePlan]]:
    """The stages of each pipeline rank, in order of chunks."""
    return [
        [stage for stage in plan.stages if plan.stage_ranks[stage.index] == rank]
        for rank in range(len(plan.instructions))
    ]


def rank_memory(plan: Plan, rank: int, measured: Measured) -> PeakMemory:
    """The peak of a pipeline rank. `measured` is read, and gains what is measured now."""
    stages = pipeline_ranks(plan)[rank]
    sizes = microbatch_sizes(plan)
    held: set[str] = set()
    uses = []
    for stage in stages:
        key = structure(stage)
        parameters, optimizer, gradients = _state(stage, plan, held)
        by_size: dict[tuple[int, ...], tuple[MicrobatchBytes, dict[int, int], dict[int, int]]] = {}
        for each in sizes:
            numbers = tuple(each.values())
            if numbers not in by_size:
                if (key, numbers) not in measured:
                    measured[key, numbers] = measure(stage, plan, each)
                by_size[numbers] = (measured[key, numbers], *_arrivals(stage, plan, each))
        listed = [by_size[tuple(each.values())] for each in sizes]
        uses.append(
            StageUse(
                stage.index, parameters, optimizer, [each for each, _, _ in listed], [each for _, each, _ in listed],
                [each for _, _, each in listed], _sum_bytes(stage, plan, gradients), _tied_inside(stage, plan),
                cast_bytes(stage),
            )
        )  # fmt: skip
    return walk(plan.instructions[rank], uses, plan.stage_ranks, sends_held=MOST_SENDS)


def with_memory(plan: Plan, pricing: Pricing, recompute: Recompute = "none") -> Plan:
    """The plan with what is computed again and what is cast once a step, and with the memory of every rank.

    `recompute`: "none", "selective", "full", or the most bytes a rank may hold. DoesNotFit if no choice keeps within them.
    """
    held = plan if recompute == "full" else with_held_casts(plan, pricing)
    try:
        try:
            return _with_memory(held, pricing, recompute)
        except DoesNotFit:
            if held is plan:
                raise
            return _with_memory(plan, pricing, recompute)
    except NEEDS_VALUES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if recompute != "none":
            raise BadArgument(
                f"recompute = {recompute!r} cannot be planned", why=f"a stage cannot be run without values: {reason}",
                use='recompute="none"',
            ) from error  # fmt: skip
        return replace(
            held, notes=(*held.notes, f"memory is from formulas: a stage cannot be run without values: {reason}")
        )


def _with_memory(plan: Plan, pricing: Pricing, recompute: Recompute) -> Plan:
    measured: Measured = {}
    if recompute == "none":
        return _finished(plan, plan, measured, pricing, recompute)
    decided = _Decision(plan, pricing, measured)
    if isinstance(recompute, str):
        price = SELECTIVE_PASSES if recompute == "selective" else math.inf
        chosen = [
            decided.everywhere(rank, price, work=recompute == "selective") for rank in range(len(plan.instructions))
        ]
    else:
        chosen = decided.all_within(recompute)
    stages = list(plan.stages)
    for choices in chosen:
        for stage in decided.applied(choices):
            stages[stage.index] = stage
    return _finished(plan, replace(plan, stages=tuple(stages), recompute=recompute), measured, pricing, recompute)


def _finished(before: Plan, plan: Plan, measured: Measured, pricing: Pricing, recompute: Recompute) -> Plan:
    """The plan with its memory, its time with what is computed again, and notes on both."""
    plan = _with_peaks(plan, measured)
    plan = replace(plan, notes=(*plan.notes, *_misfits(plan, pricing)))
    if recompute == "none":
        return plan
    before = _with_peaks(before, measured)
    earlier, now = before.simulated(), plan.simulated()
    seconds = plan.predicted.step_seconds - earlier.step_seconds + now.step_seconds
    rate = plan.predicted.step_seconds / seconds if seconds else 1.0
    predicted = replace(
        plan.predicted, step_seconds=seconds, bubble_fraction=now.bubble_fraction,
        tflops_per_gpu=plan.predicted.tflops_per_gpu * rate, mfu=plan.predicted.mfu * rate,
    )  # fmt: skip
    notes = [
        _note(stage, old)
        for stage, old in zip(plan.stages, before.stages, strict=True)
        if segments_of(stage.graph_module.graph)
    ]
    if len(notes) > MOST_NOTES:
        notes = [*notes[:MOST_NOTES], f"the other {len(notes) - MOST_NOTES} stages likewise"]
    if not notes:
        notes = ["nothing is computed again in backward: " + (
            "everything fits" if isinstance(recompute, int) else "no stretch of calls frees enough for its time"
        )]  # fmt: skip
    return replace(plan, predicted=predicted, notes=(*plan.notes, *notes))


def _with_peaks(plan: Plan, measured: Measured) -> Plan:
    stages: list[StagePlan] = list(plan.stages)
    peaks = [rank_memory(plan, rank, measured) for rank in range(len(plan.instructions))]
    for held, peak in zip(pipeline_ranks(plan), peaks, strict=True):
        for stage in held:
            stages[stage.index] = replace(stage, cost=replace(stage.cost, memory=peak))
    predicted = replace(plan.predicted, peak_bytes=float(max(peak.peak_bytes for peak in peaks)))
    return replace(plan, stages=tuple(stages), predicted=predicted)


def _misfits(plan: Plan, pricing: Pricing) -> list[str]:
    """One note per pipeline rank that the device cannot hold."""
    capacity, name = pricing.hardware.memory_bytes, pricing.hardware.name
    return [
        f"stage {', '.join(str(stage.index) for stage in held)}: a rank needs {_bytes(held[0].cost.peak_bytes)}, more than the "
        f"{_bytes(capacity)} that {name} has"
        for held in pipeline_ranks(plan)
        if held[0].cost.peak_bytes > capacity
    ]


def _note(stage: StagePlan, before: StagePlan) -> str:
    names = segments_of(stage.graph_module.graph)
    listed = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    again = stage.cost.recompute_seconds
    return (
        f"stage {stage.index} computes {listed} again in backward: {_seconds(again)} a microbatch more "
        f"({again / (before.cost.forward_seconds + before.cost.backward_seconds):.0%} of its time), which lowers the peak of its "
        f"rank from {_bytes(before.cost.peak_bytes)} to {_bytes(stage.cost.peak_bytes)}"
    )


def _bytes(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


Chosen = list[tuple[int, Unit, Choice]]  # (stage, unit, what of it is computed again)


class _Decision:
    """What may be computed again on each stage, and the search for what fits."""

    def __init__(self, plan: Plan, pricing: Pricing, measured: Measured) -> None:
        self.plan, self.measured = plan, measured
        sizes = microbatch_sizes(plan)[0]
        known: dict[str, Saves] = {}
        lines, found = [], []
        for stage in plan.stages:
            key = structure(stage)
            if key not in known:
                known[key] = saves(stage, plan, sizes)
            own = _renamed(known[key], stage, next(s for s in plan.stages if structure(s) == key))
            found.append(own)
            lines.append(line_of(stage.graph_module.graph, own, pricing, plan.mesh))
        solved: dict[object, Choice] = {}
        self.lines = lines
        self.choices = [
            Choices(line, listed, own, pricing, solved)
            for line, listed, own in zip(lines, units(lines), found, strict=True)
        ]
        self.ranks = pipeline_ranks(plan)

    def everywhere(self, rank: int, price: float, *, work: bool = False) -> Chosen:
        """The choices of all units of a rank at one price."""
        return [
            (stage.index, unit, self.choices[stage.index].at(unit, price, work=work))
            for stage in self.ranks[rank]
            for unit in self.choices[stage.index].units
        ]

    def peak(self, rank: int, chosen: Chosen) -> int:
        stages = list(self.plan.stages)
        for stage in self.applied(chosen):
            stages[stage.index] = stage
        return rank_memory(replace(self.plan, stages=tuple(stages)), rank, self.measured).peak_bytes

    def within(self, rank: int, budget_bytes: int) -> Chosen | int:
        """The least that makes a rank fit: all units at one price, and the cheapest of the next price that are needed. Where nothing
        does, the least peak there is.
        """
        levels = [self.everywhere(rank, price) for price in (0.0, *PRICES)]
        levels = [level for index, level in enumerate(levels) if index == 0 or level != levels[index - 1]]
        least: float = math.inf
        for index, level in enumerate(levels):
            peak = self.peak(rank, level)
            least = min(least, peak)
            if peak <= budget_bytes:
                return level if index == 0 else self._between(rank, levels[index - 1], level, budget_bytes)
        return int(least)

    def all_within(self, budget_bytes: int) -> list[Chosen]:
        """`within` for every pipeline rank. DoesNotFit names those that cannot, and what would do for all."""
        found = [self.within(rank, budget_bytes) for rank in range(len(self.ranks))]
        least = {rank: result for rank, result in enumerate(found) if isinstance(result, int)}
        if least:
            stages = [str(stage.index) for rank in least for stage in self.ranks[rank]]
            raise DoesNotFit(
                f"recompute = {budget_bytes}: stage{'s' if len(stages) > 1 else ''} {', '.join(stages)} "
                f"cannot be run within {_bytes(budget_bytes)} a rank",
                why=f"with everything computed again that can be, the peak is {_bytes(max(least.values()))}",
                use=f"recompute >= {max(least.values())}, a larger tp or pp, or more microbatches",
            )
        return [result for result in found if not isinstance(result, int)]

    def _between(self, rank: int, below: Chosen, above: Chosen, budget_bytes: int) -> Chosen:
        """Bisection: as few units at the higher level as fit, those first that free most for their time."""

        def ratio(index: int) -> float:
            freed = below[index][2].kept_bytes - above[index][2].kept_bytes
            return (above[index][2].seconds - below[index][2].seconds) / freed if freed > 0 else math.inf

        order = sorted((k for k in range(len(below)) if below[k][2] != above[k][2]), key=lambda k: (ratio(k), k))

        def mixed(count: int) -> Chosen:
            raised = set(order[:count])
            return [above[k] if k in raised else below[k] for k in range(len(below))]

        low, high = 0, len(order)  # low does not fit, high does
        while high - low > 1:
            middle = (low + high) // 2
            if self.peak(rank, mixed(middle)) <= budget_bytes:
                high = middle
            else:
                low = middle
        return mixed(high)

    def applied(self, chosen: Chosen) -> list[StagePlan]:
        """The stages with their runs as segments, and the time those take."""
        stages = []
        for index in dict.fromkeys(stage for stage, _, _ in chosen):
            own = [(unit, choice) for stage, unit, choice in chosen if stage == index]
            stage, line = self.plan.stages[index], self.lines[index]
            inside: dict[str, str] = {}
            for name, first, last in segment_names(own, (*RESERVED, *self.plan.mesh)):
                for call in line[first : last + 1]:
                    inside |= {node.name: name for node in call.nodes}
            records = [
                {**record, "segment": inside[record["name"]]} if record["name"] in inside else record
                for record in stage.records
            ]
            again = sum(choice.seconds for _, choice in own)
            cost = replace(stage.cost, backward_seconds=stage.cost.backward_seconds + again, recompute_seconds=again)
            stages.append(replace(stage, records=records, cost=cost))
        return stages


def _renamed(known: Saves, stage: StagePlan, of: StagePlan) -> Saves:
    """What is known of one stage, in the names of another of the same structure."""
    if stage is of:
        return known
    names = {old["name"]: new["name"] for old, new in zip(of.records, stage.records, strict=True)}

    def rekeyed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    return Saves(known.num_bytes, rekeyed(known.storage), rekeyed(known.made), rekeyed(known.saved))

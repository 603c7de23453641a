"""The memory of a layout: what its fullest rank holds at its peak.

`costmodel.memory.state_bytes` of the rank's parameters, what is kept for the microbatches in flight, the working set of one layer, and
buffers: of transfers, of gathered parameters, of gradients on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from costmodel.buckets import HELD_GROUPS, gradient_bucket_bytes, mean_group_bytes, under_way
from costmodel.memory import STATE_PRECISIONS, TIED_EXACT_BYTES, state_bytes
from passes.layout import Layout, LayoutMemory
from passes.layout_stages import StageSums
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named

# What a GPU holds besides tensors in use: of what stays (state and buffers) and of what comes and goes, what the caching allocator keeps
# while nobody needs it, flat copies and f32 gradients of an optimizer's step among it; and the driver's context, libraries' workspaces and
# communicators. Fitted to published peaks that nvidia-smi and torch report (tests/benchmarks/published.csv), one set for all. A bare
# context takes 1.2e9 bytes of a V100. Source of that: bigscience-workshop/bigscience, experiments/tr3m-1B3.md.
RESERVE_STAYING = 0.31
RESERVE_PASSING = 0.08
CONTEXT_BYTES = 1.5e9
# What a GPU must have beyond tensors and its context, so that no published job that ran out of memory seems to fit and those that ran do
# (0.28 to 1.03 of the working set would do). Blocks that come and go with every layer leave gaps that no tensor fits into; state and kept
# activations lie still.
FRAGMENTATION = 0.5  # of the working set
SLACK = 0.02  # of what is allocated, for what the prediction leaves out


@dataclass(frozen=True)
class HeldStages:
    """The stages of one rank: `parameters` in elements and `kept_bytes` of a microbatch are their sums. `ranks`: which hold such stages."""

    stages: tuple[StageSums, ...]
    parameters: int
    kept_bytes: float
    ranks: tuple[int, ...]


def fullest(layout: Layout, groups: Sequence[HeldStages], *, on_cpu: bool) -> LayoutMemory:
    """Of the fullest rank; `on_cpu`: no allocator and no driver hold anything besides."""
    flights, transfers = _flights(layout), _transfer_bytes(layout, groups)
    found = [_memory(layout, held, max(flights[rank] for rank in held.ranks), transfers, on_cpu) for held in groups]
    return max(found, key=lambda memory: memory.needed_bytes)


def memory_by_rank(layout: Layout, groups: Sequence[HeldStages], *, on_cpu: bool) -> tuple[LayoutMemory, ...]:
    """Of every pipeline rank, in order."""
    flights, transfers = _flights(layout), _transfer_bytes(layout, groups)
    owned = {rank: held for held in groups for rank in held.ranks}
    return tuple(_memory(layout, owned[rank], flights[rank], transfers, on_cpu) for rank in range(layout.pp))


def _flights(layout: Layout) -> tuple[int, ...]:
    schedule = schedule_named(layout.schedule if layout.pp > 1 else "1f1b")
    return in_flight(schedule, layout.pp, layout.microbatches, layout.virtual_stages)


def _transfer_bytes(layout: Layout, groups: Sequence[HeldStages]) -> float:
    return max(stage.sent_bytes for held in groups for stage in held.stages) * 2 if layout.pp > 1 else 0.0


def _memory(layout: Layout, held: HeldStages, flight: int, transfers: float, on_cpu: bool) -> LayoutMemory:
    """Of a rank with `flight` microbatches in flight, whose transfers take so many bytes."""
    count = layout.dp * layout.cp
    state = state_bytes(
        held.parameters, precision=layout.precision, zero=layout.zero, dp_size=count, optimizer=layout.optimizer,
        gradient_bytes=layout.gradient_bytes,
    )  # fmt: skip
    kept = held.kept_bytes / len(held.stages) * flight
    if layout.offload:
        kept = min(kept, 2 * max(stage.kept_bytes / sum(n for _, n in stage.block_counts) for stage in held.stages))
    working, gradients = max(stage.working_bytes for stage in held.stages), state.gradients
    summed = count > 1 and not layout.sums_each_microbatch  # once a step, by this runtime
    if summed:
        gradients = held.parameters * _gradient_bytes(layout)
    if flight == layout.microbatches * len(held.stages) and not layout.offload:
        gradients, kept, working = _first_backward(layout, held, kept, gradients)
    buffers = transfers + _zero_buffers(layout, held) + sum(stage.cast_bytes for stage in held.stages)
    if summed:
        gradients, kept, working = max((gradients, kept, working), _last_backward(layout, held, count, on_cpu), key=sum)
    if layout.pp > 1 and not layout.sums_each_microbatch:
        gradients, kept, working = _with_tied(layout, held, flight, (gradients, kept, working))
    kept, working = kept + min(working, 0.0), max(working, 0.0)
    memory = LayoutMemory(state.parameters, gradients, state.master, state.optimizer, kept, working, buffers)
    if on_cpu:
        return memory
    staying, passing = memory.state_bytes + memory.buffer_bytes, memory.activation_bytes + memory.working_bytes
    return replace(
        memory, reserve_bytes=RESERVE_STAYING * staying + RESERVE_PASSING * passing, context_bytes=CONTEXT_BYTES,
        spare_bytes=SLACK * memory.allocated_bytes + FRAGMENTATION * memory.working_bytes,
    )  # fmt: skip


def _gradient_bytes(layout: Layout) -> float:
    return STATE_PRECISIONS[layout.precision].gradient_bytes if layout.gradient_bytes is None else layout.gradient_bytes


def _zero_buffers(layout: Layout, held: HeldStages) -> float:
    """Bytes of flat buffers and of gathered parameters."""
    count, row = layout.dp * layout.cp, STATE_PRECISIONS[layout.precision]
    if count == 1 or layout.zero == 0:
        return 0.0
    if layout.zero < 3:
        if layout.zero_bucket_elements is None:
            return 0.0  # with the gradients: `_last_backward`
        return min(layout.zero_bucket_elements, held.parameters) * (row.parameter_bytes + row.gradient_bytes)
    if layout.sums_each_microbatch:
        return max(stage.largest_block_parameters for stage in held.stages) * (2 * row.parameter_bytes + row.gradient_bytes)
    whole = [stage.parameters * row.parameter_bytes for stage in held.stages]
    groups = HELD_GROUPS + 1 + (layout.recompute == "full")  # a layer that is computed again reads its own from first to last
    return sum(min(groups * mean_group_bytes(num_bytes), num_bytes) for num_bytes in whole)


def _first_backward(layout: Layout, held: HeldStages, kept: float, gradients: float) -> tuple[float, float, float]:
    """(gradients, kept, working) bytes where every microbatch is in flight before the first backward: while that makes the gradients, or
    while the second adds to them.
    """
    stage = held.stages[-1]
    each = gradients / max(held.parameters, 1)
    made = [(each * done, kept, most) for most, done in stage.making]
    if layout.microbatches > 1:
        made.append((gradients, kept - kept / layout.microbatches, stage.working_bytes))
    return max(made, key=sum)


def _with_tied(
    layout: Layout, held: HeldStages, flight: int, peak: tuple[float, float, float]
) -> tuple[float, float, float]:
    """(gradients, kept, working) bytes with the gradients of parameters that other ranks use too: one for every backward that is over, and
    at the end of the step the others' and their sum, which find no activations.
    """
    tied = sum(stage.tied_parameters for stage in held.stages) * _gradient_bytes(layout)
    apart = layout.microbatches if layout.microbatches * tied <= TIED_EXACT_BYTES else 1
    gradients, kept, working = peak
    over = max(min(apart, layout.microbatches - flight // len(held.stages)), 1)
    whole = held.parameters * _gradient_bytes(layout)
    whole = whole / (layout.dp * layout.cp) + tied if layout.zero else whole
    end = (whole + (apart - 1) * tied, 0.0, (apart + 2) * tied)
    return max((gradients + (over - 1) * tied, kept, working), end, key=sum)


def _last_backward(layout: Layout, held: HeldStages, count: int, on_cpu: bool) -> tuple[float, float, float]:
    """(gradients, kept, working) bytes of the last microbatch's backward, beside which gradients are summed over `count` replicas: a bucket
    is copied together, others are under way, and under ZeRO whole gradients are let go as they become parts. What is under way
    takes the part that it becomes, and on CPUs, where gloo does not sum in place, as much as is summed.
    """
    each = _gradient_bytes(layout)
    whole = held.parameters * each
    bucket = mean_group_bytes(whole / len(held.stages)) if layout.zero else min(gradient_bucket_bytes(whole), whole)
    stage, kept = held.stages[-1], held.kept_bytes / len(held.stages)
    found = []
    for most, done in stage.making:
        there = each * done if layout.microbatches == 1 else whole
        ready = each * done
        for copied in {0.0, min(bucket, ready)}:
            sent = min(ready - copied, under_way(layout.zero > 0) * bucket)
            sums = sent / count if layout.zero else sent * on_cpu
            let_go = (ready - copied - sent) * (1 - 1 / count) if layout.zero else 0.0
            found.append((there + copied + sums - let_go, kept, most))
    return max(found, key=sum)


@lru_cache(maxsize=4096)
def in_flight(schedule: Schedule, num_ranks: int, microbatches: int, virtual_stages: int) -> tuple[int, ...]:
    """Per pipeline rank: microbatches whose activations its stages hold at once, counted per stage."""
    return tuple(schedule.max_in_flight(rank, num_ranks, microbatches, virtual_stages) for rank in range(num_ranks))

"""The memory of a layout: what its fullest rank holds at its peak.

`costmodel.memory.state_bytes` of the rank's parameters, what is kept for the microbatches in flight, the working set of one layer, and
buffers: of transfers, of gathered parameters, of gradients on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from costmodel.memory import STATE_PRECISIONS, state_bytes
from passes.layout import Layout, LayoutMemory
from passes.layout_stages import StageSums
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named

# What a GPU holds besides tensors in use. Fitted to published peaks that nvidia-smi and torch report (tests/benchmarks/published.csv):
# one pair of numbers for all of them.
RESERVE = 0.12  # of what is allocated: what the caching allocator keeps while nobody needs it
CONTEXT_BYTES = 3.0e9  # the driver's context, libraries' workspaces, the communicators' buffers
# Elements of the flat buffers that ZeRO 1 and 2 reduce gradients in and gather parameters in. Source: DeepSpeed's configuration,
# defaults of reduce_bucket_size and allgather_bucket_size.
ZERO_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class HeldStages:
    """The stages of one rank: `parameters` in elements and `kept_bytes` of a microbatch are their sums. `ranks`: which hold such stages."""

    stages: tuple[StageSums, ...]
    parameters: int
    kept_bytes: float
    ranks: tuple[int, ...]


def layout_memory(layout: Layout, ranks: Sequence[HeldStages], *, on_cpu: bool) -> LayoutMemory:
    """Of the fullest rank; `on_cpu`: no allocator and no driver hold anything besides."""
    count = layout.dp * layout.cp
    best: LayoutMemory | None = None
    transfers = max(stage.sent_bytes for held in ranks for stage in held.stages) * 2 if layout.pp > 1 else 0.0
    schedule = schedule_named(layout.schedule if layout.pp > 1 else "1f1b")
    flights = in_flight(schedule, layout.pp, layout.microbatches, layout.virtual_stages)
    for held in ranks:
        flight = max(flights[rank] for rank in held.ranks)
        state = state_bytes(
            held.parameters, precision=layout.precision, zero=layout.zero, dp_size=count, optimizer=layout.optimizer,
            gradient_bytes=layout.gradient_bytes,
        )  # fmt: skip
        kept = held.kept_bytes / len(held.stages) * flight
        if layout.offload:
            kept = min(kept, 2 * max(stage.kept_bytes / sum(n for _, n in stage.block_counts) for stage in held.stages))
        working = max(stage.working_bytes for stage in held.stages)
        received = transfers
        if layout.zero == 3 and count > 1:
            each = STATE_PRECISIONS[layout.precision]
            received += max(stage.largest_block_parameters for stage in held.stages) * (2 * each.parameter_bytes + each.gradient_bytes)
        if layout.zero in (1, 2) and count > 1:
            each = STATE_PRECISIONS[layout.precision]
            received += min(ZERO_BUCKET_ELEMENTS, held.parameters) * (each.parameter_bytes + each.gradient_bytes)
        memory = LayoutMemory(state.parameters, state.gradients, state.master, state.optimizer, kept, working, received)
        if not on_cpu:
            memory = replace(memory, reserve_bytes=RESERVE * memory.allocated_bytes, context_bytes=CONTEXT_BYTES)
        if best is None or memory.device_bytes > best.device_bytes:
            best = memory
    assert best is not None
    return best


@lru_cache(maxsize=4096)
def in_flight(schedule: Schedule, num_ranks: int, microbatches: int, virtual_stages: int) -> tuple[int, ...]:
    """Per pipeline rank: microbatches whose activations its stages hold at once, counted per stage."""
    return tuple(schedule.max_in_flight(rank, num_ranks, microbatches, virtual_stages) for rank in range(num_ranks))

"""Forwards only, for evaluation, over any placement of stages.

Design note. Play the step in ticks, each rank running at every tick the latest of its stages that has something to do.
A new microbatch enters only while fewer than p are on their way: more would only wait in front of a stage, and be held
there. In a V the rank at the turn, which has to run its stages one after the other, then never idles.

For stages in a loop passes/interleaved.py has the order: groups of microbatches through stage after stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.flow import stages_of_ranks
from passes.instructions import Forward


def forwards(stage_ranks: Sequence[int], num_microbatches: int) -> list[list[Forward]]:
    """Per pipeline rank its forwards in order; `stage_ranks[stage]` is a pipeline rank."""
    stages = stages_of_ranks(stage_ranks)
    chunk_of = {stage: chunk for listed in stages for chunk, stage in enumerate(listed)}
    last = len(stage_ranks) - 1
    # How many microbatches each stage has run, and had run before this tick.
    done = [0] * len(stage_ranks)
    lists: list[list[Forward]] = [[] for _ in stages]
    while done[last] < num_microbatches:
        before = list(done)
        entered = min(num_microbatches, before[last] + len(stages))
        for rank, listed in enumerate(stages):
            for stage in reversed(listed):
                if before[stage] < (before[stage - 1] if stage else entered):
                    lists[rank].append(Forward(before[stage], chunk_of[stage]))
                    done[stage] += 1
                    break
    return lists

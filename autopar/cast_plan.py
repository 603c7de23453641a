"""Which casts of parameters a plan makes once a step, and what that changes in what it predicts.

A held cast takes the bytes of the parameter in its dtype from the first microbatch to the last (`passes.step_casts`). Made anew by each
microbatch, it takes them for every one in flight, and the time of as many casts. So casts are held, except
- for a single microbatch, which makes them once anyway, and lets go of each in backward;
- under ZeRO 3, where no rank is to hold whole parameters;
- where layers are computed again as wholes, their casts with them: what that is to save is memory (recompute="full", and a budget in
  bytes that nothing fits with them: `autopar.memory_plan`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from passes.costs import Pricing
from passes.ir import DTYPE_NAMES, tensor_type
from passes.line import node_cost
from passes.localize import sharding
from passes.placement import local_type
from passes.step_casts import casts_to_hold, is_held

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan


def cast_bytes(stage: StagePlan) -> int:
    """Bytes of the casts that one rank of a stage holds for a step."""
    found: dict[str, int] = {}
    for node in stage.graph_module.graph.nodes:
        kind = tensor_type(node)
        if is_held(node) and kind is not None:
            shape = local_type(kind, sharding(node), stage.axis_sizes).shape
            found[str(node.args[0])] = math.prod(int(size) for size in shape) * kind.dtype.itemsize
    return sum(found.values())


def _held(stage: StagePlan, pricing: Pricing) -> tuple[StagePlan, float]:
    """A stage that makes its casts once a step, and the seconds that they take."""
    casts = casts_to_hold(stage.graph_module.graph)
    if not casts:
        return stage, 0.0
    names = {node.name for node in casts}
    seconds = sum(node_cost(node, pricing, stage.axis_sizes, set()).forward_seconds for node in casts)
    records = [{**record, "held": True} if record["name"] in names else record for record in stage.records]
    cost = replace(stage.cost, forward_seconds=max(stage.cost.forward_seconds - seconds, 0.0))
    return replace(stage, records=records, cost=cost), seconds


def with_held_casts(plan: Plan, pricing: Pricing) -> Plan:
    """The plan with its casts of parameters made once a step, where that saves anything."""
    if plan.microbatches == 1 or plan.zero == 3:
        return plan
    found = [_held(stage, pricing) for stage in plan.stages]
    if not any(is_held(node) for stage, _ in found for node in stage.graph_module.graph.nodes):
        return plan
    held = replace(plan, stages=tuple(stage for stage, _ in found))
    once = max(
        sum(seconds for (_, seconds), rank in zip(found, plan.stage_ranks, strict=True) if rank == own)
        for own in range(len(plan.instructions))
    )
    earlier, now = plan.simulated(), held.simulated()
    seconds = plan.predicted.step_seconds - earlier.step_seconds + now.step_seconds + once
    rate = plan.predicted.step_seconds / seconds if seconds else 1.0
    predicted = replace(
        plan.predicted, step_seconds=seconds, bubble_fraction=now.bubble_fraction,
        tflops_per_gpu=plan.predicted.tflops_per_gpu * rate, mfu=plan.predicted.mfu * rate,
    )  # fmt: skip
    return replace(held, predicted=predicted, notes=(*plan.notes, _note(held)))


def _note(plan: Plan) -> str:
    casts = [node for stage in plan.stages for node in stage.graph_module.graph.nodes if is_held(node)]
    dtypes = " and ".join(dict.fromkeys(DTYPE_NAMES[node.args[1]] for node in casts))
    most = max(plan.stages, key=cast_bytes)
    where = f", {cast_bytes(most) / 2**20:.3g} MiB" + (f" on stage {most.index}" if len(plan.stages) > 1 else "")
    return f"parameters are cast to {dtypes} once a step, and the casts held through it{where}"

"""What replicas add to the predicted times of stages: the bridge from a rank's graph to `costmodel.replicas`.

Under ZeRO 3 parameters are gathered for each unit that uses them: a block of a run of equal blocks, or what lies between runs
(`passes.fold`), as far as it is in one stage. The layout evaluator has the same units, so that a plan and a layout of it are priced alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from costmodel.hardware import Hardware
from costmodel.mesh import REPLICA_AXIS, axis_stride
from costmodel.replicas import RankLoad, ReplicaAxis, ReplicaTraffic, gathered_seconds, replica_traffic
from passes.costs import Pricing
from passes.cut import StageCost
from passes.fold import block_starts
from passes.ir import is_state, is_trainable, tensor_type
from passes.line import Line
from passes.localize import sharding
from passes.placement import local_type


@dataclass(frozen=True)
class HeldBytes:
    """One rank's piece of a parameter, and its gradient (0 if it has none)."""

    parameter_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Gathers:
    """Of a stage's parameters for one microbatch's forward and backward: seconds of the traffic, and how much longer compute is for it."""

    seconds: float = 0.0
    wait_seconds: float = 0.0


def replica_axis(mesh: Mapping[str, int], hardware: Hardware, zero: int) -> ReplicaAxis:
    """The replicas of a mesh. autopar's programs sum gradients once a step, beside the last microbatch's backward."""
    size = mesh.get(REPLICA_AXIS, 1)
    stride = axis_stride(mesh, REPLICA_AXIS) if REPLICA_AXIS in mesh else 1
    return ReplicaAxis(size, hardware.axis_link(size, stride), zero, slowdown=hardware.kernels.overlap_slowdown)


def held_bytes(module: fx.GraphModule, pricing: Pricing, axis_sizes: Mapping[str, int]) -> dict[str, HeldBytes]:
    """By name, what one rank holds of each parameter of a localized graph."""
    found: dict[str, HeldBytes] = {}
    for node in module.graph.nodes:
        kind = tensor_type(node)
        if is_state(node) and node.meta.get("kind") == "parameter" and kind is not None:
            num_bytes = pricing.num_bytes(local_type(kind, sharding(node), axis_sizes))
            found[str(node.target)] = HeldBytes(num_bytes, num_bytes if is_trainable(node) else 0)
    return found


def with_gathers(
    costs: Sequence[StageCost], module: fx.GraphModule, stage_of: Mapping[fx.Node, int], pricing: Pricing, axis_sizes: Mapping[str, int],
    axis: ReplicaAxis,
) -> tuple[list[StageCost], list[Gathers]]:  # fmt: skip
    """The stages' costs with what gathering parameters adds to each microbatch under ZeRO 3; and what that is."""
    line = Line(module, pricing, axis_sizes)
    held = held_bytes(module, pricing, axis_sizes)
    starts = set(block_starts(module))
    unit_of: dict[fx.Node, tuple[int, int]] = {}
    seconds: dict[tuple[int, int], list[float]] = {}
    block = 0
    costs_of = dict(zip(line.nodes, line.costs, strict=True))
    for node in module.graph.nodes:
        block += node in starts
        if node in costs_of:
            unit_of[node] = unit = stage_of[node], block
            sums = seconds.setdefault(unit, [0.0, 0.0])
            sums[0] += costs_of[node].forward_seconds
            sums[1] += costs_of[node].backward_seconds
    used: dict[tuple[int, int], list[HeldBytes]] = {}
    for node in module.graph.nodes:
        if is_state(node) and str(node.target) in held:
            for unit in {unit_of[user] for user in node.users if user in unit_of}:
                used.setdefault(unit, []).append(held[str(node.target)])
    found, added = list(costs), [Gathers() for _ in costs]
    for unit, parameters in used.items():
        forward, backward = seconds[unit]
        with_forward, with_backward, traffic = gathered_seconds(
            forward, backward, parameter_bytes=sum(p.parameter_bytes for p in parameters),
            gradient_bytes=sum(p.gradient_bytes for p in parameters), axis=axis,
        )  # fmt: skip
        stage = unit[0]
        found[stage] = replace(
            found[stage], forward_seconds=found[stage].forward_seconds + with_forward - forward,
            backward_seconds=found[stage].backward_seconds + with_backward - backward,
        )  # fmt: skip
        wait = with_forward + with_backward - forward - backward
        added[stage] = Gathers(added[stage].seconds + traffic, added[stage].wait_seconds + wait)
    return found, added


@dataclass(frozen=True)
class StageLoad:
    """A stage as its replicas see it: the names of its parameters, its costs with the gathers in them, and those."""

    parameters: Iterable[str]
    cost: StageCost
    gathers: Gathers


def step_traffic(
    ranks: Iterable[Sequence[StageLoad]], held: Mapping[str, HeldBytes], axis: ReplicaAxis, *, microbatches: int
) -> ReplicaTraffic:
    """What a step of the pipeline ranks with these stages exchanges between replicas."""
    loads, virtual_stages = [], 1
    for stages in ranks:
        mine = [held[name] for name in dict.fromkeys(name for stage in stages for name in stage.parameters)]
        loads.append(
            RankLoad(
                sum(p.gradient_bytes for p in mine), sum(p.parameter_bytes for p in mine if p.gradient_bytes or axis.zero == 3),
                sum(stage.cost.forward_seconds for stage in stages), sum(stage.cost.backward_seconds for stage in stages),
                sum(stage.gathers.seconds for stage in stages), sum(stage.gathers.wait_seconds for stage in stages),
            )
        )  # fmt: skip
        virtual_stages = len(stages)
    return replica_traffic(loads, axis, microbatches=microbatches, virtual_stages=virtual_stages)

"""From a traced model to a Plan: the passes in order, and the predictions.

trace -> loss -> shard -> localize -> cut -> stages -> order -> Plan. Every choice made here is recorded in the Plan; the emitter and
the runtime only read it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.memory_plan import with_memory
from autopar.mesh_notes import mesh_notes
from autopar.plan import Plan, Prediction, StagePlan, stage_records
from autopar.program import FUNCTION_NAMES, Receive, Send
from autopar.trace import Traced
from autopar.weight_notes import weight_notes
from costmodel.errors import BadArgument
from costmodel.hardware import Hardware
from costmodel.machine import basis_text
from costmodel.memory import TIED_EXACT_BYTES, optimizer_seconds
from costmodel.mesh import axis_stride
from costmodel.replicas import ReplicaAxis, ReplicaTraffic
from passes.costs import Pricing
from passes.cut import CutPlan, cut
from passes.ir import TensorType, is_state, is_trainable, origin, tensor_inputs, tensor_type
from passes.line import node_cost
from passes.localize import localize, sharding
from passes.loss import weigh_loss
from passes.names import readable_names
from passes.order import order
from passes.overrides import Overrides
from passes.patterns import call_of
from passes.placement import Copied, Partial, Shard, local_type, notation, parse_notation, type_text
from passes.replicas import Gathers, StageLoad, held_bytes, replica_axis, step_traffic, with_gathers
from passes.rules import rule_of
from passes.schedules import Schedule
from passes.schedules import schedule as schedule_named
from passes.serialize import graph_to_json
from passes.shard import ShardPlan, shard
from passes.shard_problem import SequenceParallel
from passes.stages import StageGraph, held_in_stages, split_stages, stage_edges
from passes.step_time import StepTimes
from passes.timeline import simulate
from passes.values import is_call


def fingerprint(traced: Traced) -> str:
    """Digest of the names, shapes and dtypes of a model's state."""
    text = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(traced.state.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_microbatches(rows: int, num_stages: int) -> int:
    """Four microbatches a stage where there are rows enough: a bubble of at most a fifth. One if there is no pipeline."""
    return 1 if num_stages == 1 else max(1, min(rows, 4 * num_stages))


def as_planned(plan: Plan, traced: Traced) -> Overrides:
    """The overrides that make a plan for another form of the same call (other sizes) hold every parameter where `plan` does."""
    used = {str(node.target) for node in traced.graph_module.graph.nodes if is_state(node)}
    placements = {
        name: text if "/" in text else "whole" for name, text in plan.parameter_notation.items() if name in used
    }
    held: dict[str, tuple[int, ...]] = {}
    for stage in plan.stages:
        for name in stage.parameters:
            held[name] = (*held.get(name, ()), stage.index)
    return Overrides(placements, held)


def make_plan(
    traced: Traced, *, mesh: Mapping[str, int], microbatches: int | None, schedule: str, hardware: Hardware, model_name: str,
    overrides: Overrides | None = None, sequence_parallel: SequenceParallel = False, virtual_stages: int | None = None,
    recompute: str | int = "none", zero: int = 0,
) -> Plan:  # fmt: skip
    """The plan for a mesh. BadArgument, TooManyStages or NoLegalSharding where it cannot be; DoesNotFit for `recompute` in bytes."""
    pp, tp = mesh["pp"], mesh["tp"]
    row = schedule_named(schedule)
    virtual = row.checked_virtual_stages(virtual_stages)
    num_stages, stage_ranks = pp * virtual, row.stage_ranks(pp, virtual)
    rows = traced.sizes.get("B", 1)
    weighted = weigh_loss(traced.graph_module, traced.loss)
    count = microbatches if microbatches is not None else 1 if weighted.meeting else choose_microbatches(rows, pp)
    meeting = meeting_notes(weighted.meeting, count, pp, mesh.get("dp", 1))
    for note in meeting if count > 1 or mesh.get("dp", 1) > 1 else ():
        warnings.warn(note, stacklevel=2)
    if count > rows:
        raise BadArgument(
            f"{count} microbatches were asked for, and the batch has {rows} rows",
            use=f"microbatches <= {rows}, or a larger batch",
        )
    overrides = overrides or Overrides()
    sizes = {**traced.sizes, "B": -(-rows // count)}
    hardware = hardware.for_ranks(math.prod(mesh.values()))
    pricing = Pricing(hardware, sizes, stride=axis_stride(mesh, "tp"))
    replicas = replica_axis(mesh, hardware, zero)
    graph = weighted.module.graph
    loss = next((node for node in graph.nodes if node.meta.get("loss")), None)
    overrides.check(graph, mesh)
    sharded = shard(
        weighted.module, axis="tp", axis_size=tp, pricing=pricing, microbatches=count, in_flight=_in_flight(row, 0, pp, count, virtual),
        loss=loss, pins=overrides.pins(mesh), sequence_parallel=sequence_parallel,
    )  # fmt: skip
    for note in unruled_notes(sharded.without_rule):
        warnings.warn(note, stacklevel=2)
    local = localize(weighted.module, sharded)
    rename(local)
    loss = next((node for node in local.graph.nodes if node.meta.get("loss") and node.op == "call_function"), None)
    cuts = cut(
        local,
        num_stages,
        pricing=pricing,
        axis_sizes=mesh,
        in_flight=lambda stage, stages: _in_flight(row, stage_ranks[stage], pp, count, virtual),
        forced=overrides.cuts,
        step_times=StepTimes(row, pp, count, virtual) if num_stages > 1 else None,
    )
    gathers = [Gathers()] * num_stages
    if zero == 3:
        costs, gathers = with_gathers(cuts.costs, local, cuts.stage_of, pricing, mesh, replicas)
        cuts = replace(cuts, costs=tuple(costs))
    outputs = _outputs(local)
    weight_state = (
        {str(node.target) for node in weighted.weights.graph.nodes if is_state(node)}
        if weighted.weights is not None
        else set()
    )
    stages = split_stages(local, cuts.stage_of, num_stages, outputs, loss, weight_state)
    edges, gradient_edges = stage_edges(stages)
    instructions = order(row, pp, count, edges, gradient_edges=gradient_edges, virtual_stages=virtual)
    names = output_names(outputs, loss)
    held = held_in_stages(stages)
    if weighted.weights is not None:
        rename(weighted.weights)
    inputs = {name: type_text(value.type, {}) for name, value in traced.inputs.items()}
    plans = tuple(_stage_plan(stage, cuts, sharded, mesh, names, held, inputs) for stage in stages)
    parameter_notation = {
        str(node.target): notation(kind.shape, _state_sharding(node))
        for node in local.graph.nodes
        if is_state(node) and node.meta.get("kind") == "parameter" and (kind := tensor_type(node)) is not None
    }
    ranks = [[stage for stage in plans if stage_ranks[stage.index] == rank] for rank in range(pp)]
    tied_bytes = count * max(
        sum(_local_bytes(name, stage, mesh) for stage in held_by for name in _tied_across(stage, stage_ranks))
        for held_by in ranks
    )
    exact = tied_bytes <= TIED_EXACT_BYTES
    timeline = simulate(
        instructions,
        stage_ranks=stage_ranks,
        forward_seconds=[stage.cost.forward_seconds for stage in plans],
        backward_seconds=[stage.cost.backward_seconds for stage in plans],
        send_seconds=lambda source, target: plans[min(source, target)].cost.seconds_to(max(source, target)),
    )
    updated = max(sum(stage.cost.parameter_count for stage in held_by) for held_by in ranks)
    update = float(
        optimizer_seconds(-(-updated // (replicas.size if zero else 1)), hardware, precision=traced.precision.name)
    )
    traffic = _replica_traffic(ranks, gathers, local, pricing, mesh, replicas, count)
    predicted = _predict(
        ranks, timeline.step_seconds + update, timeline.bubble_fraction, count, weighted.module, pricing, hardware, mesh, traffic
    )

    def tensor_seconds(other: Hardware) -> float:
        """Of the busiest rank's tensor-parallel traffic in a step on another machine."""
        elsewhere = Pricing(other, sizes, stride=pricing.stride)
        by_rank = [0.0] * pp
        for node, stage in cuts.stage_of.items():
            if node.meta.get("reshard"):
                by_rank[stage_ranks[stage]] += node_cost(node, elsewhere, mesh, set()).collective_seconds
        return count * max(by_rank)

    def replica_seconds(other: Hardware) -> float:
        axis, elsewhere = replica_axis(mesh, other, zero), gathers
        if zero == 3:
            elsewhere = with_gathers(cuts.costs, local, cuts.stage_of, pricing, mesh, axis)[1]
        return _replica_traffic(ranks, elsewhere, local, pricing, mesh, axis, count).seconds

    placed = mesh_notes(mesh, hardware, {"tp": tensor_seconds, "dp": replica_seconds})
    return with_memory(Plan(
        model=model_name, fingerprint=fingerprint(traced),
        num_parameters=sum(t.numel() for name, t in traced.state.items() if isinstance(t, torch.nn.Parameter)),
        mesh=dict(mesh), microbatches=count, schedule=row.name, hardware=hardware.name, sizes=dict(traced.sizes), inputs=inputs,
        stages=plans, instructions=instructions, parameter_notation=parameter_notation,
        aliases={alias: name for name, others in traced.aliases.items() for alias in others},
        collectives=_collectives(local), predicted=predicted,
        notes=tuple(_notes(cuts, sharded, plans, (*meeting, *weighted.notes, *precision_notes(traced, hardware), *placed), exact,
            tied_bytes, stage_ranks, hardware, parameter_notation, mesh)),
        tied_exact=exact, gradient_edges=tuple(gradient_edges), virtual_stages=virtual, stage_ranks=stage_ranks, zero=zero,
        loss_weight_records=graph_to_json(weighted.weights.graph) if weighted.weights is not None else None,
        precision=traced.precision.name,
    ), pricing, recompute)  # fmt: skip


def _replica_traffic(
    ranks: Sequence[Sequence[StagePlan]], gathers: Sequence[Gathers], local: fx.GraphModule, pricing: Pricing, mesh: Mapping[str, int],
    replicas: ReplicaAxis, microbatches: int,
) -> ReplicaTraffic:  # fmt: skip
    loads = [[StageLoad(stage.parameters, stage.cost, gathers[stage.index]) for stage in held_by] for held_by in ranks]
    return step_traffic(loads, held_bytes(local, pricing, mesh), replicas, microbatches=microbatches)


def _in_flight(row: Schedule, rank: int, num_ranks: int, count: int, virtual_stages: int) -> int:
    """The most microbatches that one of a rank's stages holds, where its stages take equal parts."""
    return -(-row.max_in_flight(rank, num_ranks, count, virtual_stages) // virtual_stages)


def _tied_across(stage: StagePlan, stage_ranks: Sequence[int]) -> list[str]:
    """The tied weights of a stage that another rank holds too."""
    return [name for name, held in stage.tied.items() if len({stage_ranks[other] for other in held}) > 1]


_RESHARD_SUFFIX = {
    "all_reduce": "sum", "copy_to": "copy", "all_gather": "whole", "reduce_scatter": "part", "take_shard": "part", "all_to_all": "turned",
    "own_gradient": "own", "pad_shard": "padded",
}  # fmt: skip


def rename(module: fx.GraphModule) -> None:
    """Give every node its readable name; a reshard is called after its value (`down` -> `down_sum`), and no value as a function is."""
    graph = module.graph
    reshards = [node for node in graph.nodes if node.meta.get("reshard") or node.meta.get("padded")]
    frames = {node: node.meta.pop("frames", ()) for node in reshards}
    names = readable_names(graph)
    taken = set(names.values())

    def unique(base: str) -> str:
        name, count = base, 0
        while name in taken or name in FUNCTION_NAMES:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        return name

    for node, name in names.items():
        if node in frames:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            suffix = _RESHARD_SUFFIX[node.target.__name__]  # type: ignore[union-attr]
            names[node] = unique(f"{names[source]}_{suffix}")
            node.meta["frames"] = frames[node]
        elif name.removesuffix("_" + name.rpartition("_")[2]) in FUNCTION_NAMES or name in FUNCTION_NAMES:
            names[node] = unique(name.removeprefix("sharded_"))
    for node, name in names.items():
        node.name = name
    module.recompile()


def _outputs(module: fx.GraphModule) -> list[fx.Node | None]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], (list, tuple)) else (output.args[0],)
    return [value if isinstance(value, fx.Node) and tensor_type(value) is not None else None for value in values]


def output_names(outputs: Sequence[fx.Node | None], loss: fx.Node | None) -> dict[int, str]:
    """The name of each output of the model in programs: "loss" for the loss, else the value's own."""
    return {k: "loss" if node is loss else node.name for k, node in enumerate(outputs) if node is not None}


def _state_sharding(node: fx.Node) -> dict[str, Any]:
    return {axis: p for axis, p in sharding(node).items() if isinstance(p, Shard)}


def _stage_plan(
    stage: StageGraph, cuts: CutPlan, sharded: ShardPlan, mesh: Mapping[str, int], names: Mapping[int, str],
    held: Mapping[str, tuple[int, ...]], inputs: Mapping[str, str],
) -> StagePlan:  # fmt: skip
    graph = stage.module.graph
    state = [node for node in graph.nodes if is_state(node)]

    def text(node: fx.Node) -> str:
        kind = tensor_type(node)
        assert kind is not None
        return type_text(kind, sharding(node))

    def placed(node: fx.Node) -> str:
        kind = tensor_type(node)
        assert kind is not None
        return notation(kind.shape, _state_sharding(node))

    parameters = {str(n.target): placed(n) for n in state if n.meta.get("kind") == "parameter"}
    trained = {str(n.target) for n in state if is_trainable(n)}
    owed = [str(n.target) for n in state if isinstance(sharding(n).get(sharded.axis), Copied) and is_trainable(n)]
    by_name = {node.name: node for node in graph.nodes}
    paths = [origin(n).path for n, s in cuts.stage_of.items() if s == stage.index and origin(n).path]
    return StagePlan(
        index=stage.index,
        receives={c.name: Receive(c.source, text(c.node), c.gradient) for c in stage.receives},
        sends={c.name: Send(c.to, text(c.node), c.gradient) for c in stage.sends},
        outputs={names[leaf]: text(by_name[name]) for leaf, name in stage.outputs},
        inputs={
            n.name: inputs[n.name]
            for n in graph.nodes
            if n.op == "placeholder" and n.name in inputs and "received" not in n.meta
        },
        parameters=parameters,
        buffers={str(n.target): placed(n) for n in state if n.meta.get("kind") != "parameter"},
        partial_gradients=tuple(owed),
        tied={name: held[name] for name in parameters if len(held[name]) > 1 and name in trained},
        cost=cuts.costs[stage.index],
        layers=_layers(paths),
        axis_sizes=dict(mesh),
        records=stage_records(stage.module),
    )


def _layers(paths: Sequence[str]) -> str:
    """The modules of a stage in a few words: the first and the last, cut where they still tell the layer."""
    if not paths:
        return ""

    def short(path: str) -> str:
        parts = path.split(".")
        numbered = [k for k, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbered[0] + 1] if numbered else parts)

    first, last = short(paths[0]), short(paths[-1])
    return first if first == last else f"{first} .. {last}"


def _local_bytes(name: str, stage: StagePlan, mesh: Mapping[str, int]) -> int:
    """Bytes of a rank's f32 gradient of a parameter."""
    shape, placements = parse_notation(stage.parameters[name], mesh)
    local = local_type(TensorType(torch.float32, shape), placements, mesh)
    return 4 * math.prod(int(size) for size in local.shape)


def _collectives(module: fx.GraphModule) -> dict[str, str]:
    """Per parameter: the collective that its first use leads to (forward), for the printed plan."""
    found: dict[str, str] = {}
    for node in module.graph.nodes:
        if is_state(node) and node.meta.get("kind") == "parameter":
            user = next(iter(node.users), None)
            steps = 0
            while user is not None and steps < 4 and isinstance(sharding(user).get("tp"), Partial):
                following = next((u for u in user.users if u.meta.get("reshard")), None)
                if following is not None:
                    found[str(node.target)] = following.target.__name__
                    break
                user, steps = next(iter(user.users), None), steps + 1
    return found


def _predict(
    ranks: Sequence[Sequence[StagePlan]], seconds: float, bubble: float, microbatches: int, module: fx.GraphModule, pricing: Pricing,
    hardware: Hardware, mesh: Mapping[str, int], replicas: ReplicaTraffic,
) -> Prediction:  # fmt: skip
    """`seconds`: of a step without the tail of what replicas exchange."""
    seconds += replicas.tail_seconds
    flops, dtype = 0.0, "f32"
    for node in module.graph.nodes:
        if is_call(node) and is_trainable(node):
            call = call_of(node)
            trainable = tuple(is_trainable(n) for n in tensor_inputs(node))
            cost = pricing.cost(call, trainable)
            flops += cost.forward_flops + cost.backward_flops
            if call.outputs and call.outputs[0].dtype in (torch.bfloat16, torch.float16):
                dtype = "bf16" if call.outputs[0].dtype == torch.bfloat16 else "f16"
    flops *= mesh.get("dp", 1)  # each replica's
    rate = flops * microbatches / seconds / math.prod(mesh.values()) if seconds else 0.0
    communication = microbatches * max(
        sum(stage.cost.collective_seconds + stage.cost.send_seconds for stage in stages) for stages in ranks
    )
    peak = max(sum(stage.cost.peak_bytes for stage in stages) for stages in ranks)
    return Prediction(
        seconds,
        peak,
        bubble,
        communication + replicas.seconds,
        rate / 1e12,
        rate / hardware.peak_flops.get(dtype, hardware.peak_flops["f32"]),
        basis_text(hardware.basis, hardware.uncertainty),
        replicas if replicas.seconds else None,
    )


def meeting_notes(places: Sequence[str], microbatches: int, num_stages: int, replicas: int = 1) -> list[str]:
    """What it means that rows of the batch meet before the loss adds them up."""
    if not places or (num_stages == 1 and microbatches == 1 and replicas == 1):
        return []
    where = places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")
    if replicas > 1:
        parts = f"{replicas} replicas" + (f" of {microbatches} microbatches" if microbatches > 1 else "")
        exact = "dp=1" + (" with microbatches=1" if microbatches > 1 else "")
        return [
            f"{parts} do not give the whole batch's loss: it compares rows of the batch with each other: {where}; {exact} does"
        ]
    if microbatches == 1:
        return [
            f"one microbatch, so no overlap of stages: the loss compares rows of the batch with each other: {where}"
        ]
    return [
        f"{microbatches} microbatches do not give the whole batch's loss: it compares rows of the batch with each other: "
        f"{where}; microbatches=1 does"
    ]


def precision_notes(traced: Traced, hardware: Hardware) -> list[str]:
    """What computes in which dtype, and where that was found out for another device than the plan's."""
    notes = [traced.precision.note] if traced.precision.note else []
    if traced.precision.autocast is not None and traced.autocast_device != hardware.device_type:
        notes.append(
            f"the casts are torch.autocast's for {traced.autocast_device}, where the model was traced; on {hardware.device_type} it "
            f"casts the same products and partly other ops: a model on {hardware.device_type} gives that plan"
        )
    return notes


def unruled_notes(nodes: Sequence[fx.Node]) -> list[str]:
    """One note per op and source line that stays whole for want of a rule."""
    where: dict[tuple[Any, str], list[str]] = {}
    for node in nodes:
        place = origin(node)
        line = f"{place.file}:{place.line}  {place.source}" if place.file else place.path
        where.setdefault((node.target, line), []).append(place.path)
    notes = []
    for (op, line), paths in where.items():
        named = f"torch.ops.{op}"
        modules = (
            f" ({len(paths)} times, first in {paths[0]})" if len(paths) > 1 else f" (in {paths[0]})" if paths[0] else ""
        )
        if rule_of(op) is not None:
            notes.append(f"{named} stays whole: its rule does not fit these shapes: {line}{modules}")
        else:
            notes.append(
                f'{named} has no rule and stays whole: {line}{modules}; to split it: autopar.register_rule({named}, "... -> ...")'
            )
    return notes


def _notes(
    cuts: CutPlan, sharded: ShardPlan, stages: Sequence[StagePlan], loss_notes: Sequence[str], exact: bool, tied_bytes: int,
    stage_ranks: Sequence[int], hardware: Hardware, parameters: Mapping[str, str], mesh: Mapping[str, int],
) -> list[str]:  # fmt: skip
    notes = list(cuts.notes)
    tied = {name: held for stage in stages for name, held in stage.tied.items()}
    for name, held in tied.items():
        where = " and ".join(str(stage) for stage in held)
        if len({stage_ranks[stage] for stage in held}) == 1:
            notes.append(f"{name} is used on stages {where}, all on pipeline rank {stage_ranks[held[0]]}: one tensor")
            continue
        how = (
            f"microbatch by microbatch, bitwise as on one device ({tied_bytes / 2**20:.3g} MiB kept)"
            if exact
            else "once a step"
        )
        notes.append(f"{name} is used on stages {where}: each holds it, gradients are summed {how}")
    summed = [name for stage in stages for name in stage.partial_gradients]
    if summed:
        notes.append(
            f"whole inside a split region, gradients summed over tp once a step: {', '.join(dict.fromkeys(summed))}"
        )
    if sharded.axis_size > 1:
        notes += unruled_notes(sharded.without_rule)
        notes += weight_notes(parameters, mesh["tp"])
    notes += loss_notes
    return notes

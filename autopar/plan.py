"""The Plan: every decision about a job, and nothing else. It can be printed, compared, saved, loaded, and emitted as programs.

A saved plan is JSON: the decisions in the notation of `passes.placement`, and each stage's graph. Loading runs no code and needs no
model; `Plan.check` then proves again what was proved when it was made, so an edited file cannot run unless it is consistent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from autopar.emit import emit_program
from autopar.program import Receive, Send
from costmodel.errors import AutoparError, BadArgument, BadPlan
from costmodel.memory import PeakMemory
from costmodel.replicas import ReplicaTraffic
from passes.cut import StageCost
from passes.instructions import BackwardInput, Instruction, instruction
from passes.ir import Size
from passes.module_cost import ModuleCost, module_cost
from passes.order import order, prove
from passes.placement import Placement, Shard, can_be_padded, divides, notation, parse_notation
from passes.schedules import FORWARD_ONLY
from passes.serialize import graph_from_json, graph_to_json
from passes.step_casts import cast_parameter, is_held
from passes.timeline import Span, Timeline, simulate

FORMAT = 2
_PLAIN = (
    "model", "fingerprint", "num_parameters", "microbatches", "schedule", "virtual_stages", "hardware", "tied_exact",
    "recompute", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class ParameterPlacement:
    """Where a parameter's parts live: whole shape and placement by mesh axis. Prints as `(3 12/tp 64) 768`."""

    shape: tuple[Size, ...]
    sharding: Mapping[str, Placement]

    def __str__(self) -> str:
        return notation(self.shape, self.sharding)


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of one training step, and on what basis. Bytes are per rank (the largest). `replicas`: what data
    parallelism exchanges, its seconds part of `communication_seconds` and those exposed of `step_seconds`; None without it.
    """

    step_seconds: float
    peak_bytes: float
    bubble_fraction: float
    communication_seconds: float
    tflops_per_gpu: float
    mfu: float
    basis: str
    replicas: ReplicaTraffic | None = None


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage for one tensor-parallel rank; types are in the notation, of whole values."""

    index: int
    receives: Mapping[str, Receive]
    sends: Mapping[str, Send]
    outputs: Mapping[str, str]
    inputs: Mapping[str, str]
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    partial_gradients: tuple[str, ...]
    tied: Mapping[str, tuple[int, ...]]
    cost: StageCost
    layers: str
    axis_sizes: Mapping[str, int]
    records: Sequence[Mapping[str, Any]] = field(repr=False)

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The stage's torch.fx graph, with parameters of this rank's shapes on the meta device."""
        return graph_from_json(self.records, self.axis_sizes)


@dataclass(frozen=True)
class Plan:
    """Every decision. `str()` is the partition plan; see `save`, `load`, `emit`, `source`, `timeline`."""

    model: str
    fingerprint: str
    num_parameters: int
    mesh: Mapping[str, int]
    microbatches: int
    schedule: str
    hardware: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, str]
    stages: tuple[StagePlan, ...]
    instructions: tuple[tuple[Instruction, ...], ...]
    parameter_notation: Mapping[str, str]
    aliases: Mapping[str, str]
    collectives: Mapping[str, str]
    predicted: Prediction
    notes: tuple[str, ...]
    tied_exact: bool
    gradient_edges: tuple[tuple[int, int], ...]
    virtual_stages: int  # stages a pipeline rank
    stage_ranks: tuple[int, ...]  # the pipeline rank of each stage
    loss_weight_records: Sequence[Mapping[str, Any]] | None = field(repr=False, default=None)
    zero: int = 0  # what data-parallel replicas share out: 1 optimizer state, 2 gradients too, 3 parameters too
    recompute: str | int = "none"  # "none", "selective", "full", or the most bytes a rank was to hold
    precision: str = "fp32"  # a name in autopar.precision.PRECISIONS

    # ---- what the decisions give ------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        return math.prod(self.mesh.values())

    def coords(self, rank: int) -> dict[str, int]:
        """A rank's place in the mesh; the last axis varies fastest. BadArgument if there is no such rank."""
        if not 0 <= rank < self.num_ranks:
            raise BadArgument(f"the plan has no rank {rank}", use=f"0 to {self.num_ranks - 1}")
        coords: dict[str, int] = {}
        for name, size in reversed(list(self.mesh.items())):
            rank, coords[name] = divmod(rank, size)
        return {name: coords[name] for name in self.mesh}

    def rank_stages(self, rank: int) -> tuple[StagePlan, ...]:
        """The stages of a rank (any of the mesh), in order: chunks of its instructions."""
        place = self.coords(rank).get("pp", 0)
        return tuple(stage for stage in self.stages if self.stage_ranks[stage.index] == place)

    def rank_state(self, rank: int) -> tuple[dict[str, str], dict[str, str]]:
        """(parameters, buffers) that a rank holds for all its stages, by name in the notation."""
        stages = self.rank_stages(rank)
        return (
            {name: text for stage in stages for name, text in stage.parameters.items()},
            {name: text for stage in stages for name, text in stage.buffers.items()},
        )

    @cached_property
    def splits_backward(self) -> bool:
        """True if the instructions put weight gradients off (BackwardInput, BackwardWeight)."""
        return any(isinstance(one, BackwardInput) for listed in self.instructions for one in listed)

    @cached_property
    def evaluation(self) -> tuple[tuple[Instruction, ...], ...]:
        """The instructions of a forward pass without gradients, per pipeline rank."""
        return order(FORWARD_ONLY, len(self.instructions), self.microbatches, self.edges, stage_ranks=self.stage_ranks)

    @cached_property
    def placements(self) -> dict[str, ParameterPlacement]:
        """By parameter name (tied parameters under every name)."""
        found = {
            name: ParameterPlacement(*parse_notation(text, self.mesh)) for name, text in self.parameter_notation.items()
        }
        return found | {alias: found[name] for alias, name in self.aliases.items() if name in found}

    @cached_property
    def loss_weights(self) -> fx.GraphModule | None:
        """The graph of the loss terms' weights; None if the loss adds up by itself, or there is none."""
        return graph_from_json(self.loss_weight_records, self.mesh) if self.loss_weight_records else None

    @cached_property
    def identity(self) -> str:
        """Six digits that change with any decision."""
        return hashlib.sha256(json.dumps(self._to_json(), sort_keys=True).encode()).hexdigest()[:6]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(from stage, to stage) wherever an activation goes."""
        return sorted({(stage.index, to) for stage in self.stages for send in stage.sends.values() for to in send.to})

    def with_microbatches(self, count: int) -> Plan:
        """The same plan for another number of microbatches. BadArgument or BadSchedule if the schedule cannot."""
        ordered = order(
            self.schedule, len(self.instructions), count, self.edges, gradient_edges=self.gradient_edges,
            virtual_stages=self.virtual_stages,
        )  # fmt: skip
        return replace(self, microbatches=count, instructions=ordered)

    def cost(self, path: str = "") -> ModuleCost:
        """What the ops under a module path cost one rank, as expressions in the batch, the sequence and the mesh axes; numbers by `.at`.

        BadArgument if the plan has no op there.
        """
        sizes = dict(self.sizes)
        if "B" in sizes:
            sizes["B"] = -(-sizes["B"] // self.microbatches)
        return module_cost([stage.graph_module.graph for stage in self.stages], path, self.mesh, sizes)

    def source(self, rank: int) -> str:
        """The emitted program of a rank."""
        return emit_program(self, rank)

    def simulated(self) -> Timeline:
        """The schedule played with the predicted times of the stages. What is computed again is so in BackwardInput."""
        halves = [(each.cost.backward_seconds - each.cost.recompute_seconds) / 2 for each in self.stages]
        return simulate(
            self.instructions,
            stage_ranks=self.stage_ranks,
            forward_seconds=[stage.cost.forward_seconds for stage in self.stages],
            backward_seconds=[stage.cost.backward_seconds for stage in self.stages],
            backward_input_seconds=[half + each.cost.recompute_seconds for half, each in zip(halves, self.stages, strict=True)],
            backward_weight_seconds=halves,
            send_seconds=lambda source, target: self.stages[min(source, target)].cost.seconds_to(max(source, target)),
        )

    def timeline(self) -> list[Span]:
        """Predicted spans of a step on the first tensor-parallel rank of each pipeline rank."""
        return list(self.simulated().spans)

    def check(self) -> Plan:
        """Prove the plan again. BadPlan (or BadSchedule) says what is inconsistent."""
        pp, virtual_stages = self.mesh.get("pp", 1), self.virtual_stages
        if len(self.instructions) != pp or len(self.stages) != pp * virtual_stages:
            raise BadPlan(
                f"the plan has {len(self.stages)} stages and {len(self.instructions)} instruction lists for pp = {pp}"
                + (f" with {virtual_stages} stages each" if virtual_stages != 1 else "")
            )
        counts = [self.stage_ranks.count(rank) for rank in range(pp)]
        if len(self.stage_ranks) != len(self.stages) or counts != [virtual_stages] * pp:
            raise BadPlan(
                f"the ranks of the stages are {list(self.stage_ranks)}",
                use=f"one of 0 to {pp - 1} for each of {len(self.stages)} stages, each {virtual_stages} times",
            )
        for name, size in self.mesh.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise BadPlan(f"the mesh axis {name} has size {size!r}", use="a positive integer")
        prove(
            self.instructions, self.edges, gradient_edges=self.gradient_edges, num_microbatches=self.microbatches,
            stage_ranks=self.stage_ranks,
        )  # fmt: skip
        for stage in self.stages:
            if dict(stage.axis_sizes) != dict(self.mesh):
                raise BadPlan(
                    f"stage {stage.index} was made for {dict(stage.axis_sizes)}, and the plan's mesh is {dict(self.mesh)}",
                    why="its program spells the sizes of one rank", use="a new plan for that mesh",
                )  # fmt: skip
            held = {str(n.target): n for n in stage.graph_module.graph.nodes if n.op == "get_attr"}
            declared = {**stage.parameters, **stage.buffers}
            if set(held) != set(declared):
                raise BadPlan(
                    f"stage {stage.index} declares other parameters than its graph reads: {sorted(set(held) ^ set(declared))}"
                )
            for name, text in stage.parameters.items():
                shape, sharding = parse_notation(text, self.mesh)
                if self.parameter_notation.get(name) != text:
                    raise BadPlan(
                        f"{name} is {text!r} in stage {stage.index}, and {self.parameter_notation.get(name)!r} in the plan's weights"
                    )
                node = held[name]
                if tuple(node.meta["tensor"].shape) != shape or dict(node.meta["sharding"]) != sharding:
                    raise BadPlan(
                        f"{name} is placed as {text!r}, but stage {stage.index}'s program uses it otherwise",
                        why="placements are decided together: one cannot be edited alone",
                        use="overrides={'placements': {...}} to make a new plan",
                    )
                for axis, placement in sharding.items():
                    if not isinstance(placement, Shard):
                        continue
                    size, count = shape[placement.dim], self.mesh[axis]
                    if not divides(size, placement.segments, count) and not can_be_padded(size, placement, count):
                        raise BadPlan(f"{name} is placed as {text!r}, which {axis} = {count} does not divide")
            for node in stage.graph_module.graph.nodes:
                if is_held(node) and cast_parameter(node) is None:
                    raise BadPlan(f"stage {stage.index} is to make {node.name} once a step, which is no cast of a parameter")
            received = {n.name: n.meta["received"] for n in stage.graph_module.graph.nodes if "received" in n.meta}
            if received != {name: value.source for name, value in stage.receives.items()}:
                raise BadPlan(
                    f"stage {stage.index} declares that it receives {list(stage.receives)}, but its graph takes {list(received)}"
                )
            for name, send in stage.sends.items():
                if any(
                    not stage.index < to < len(self.stages) or name not in self.stages[to].receives for to in send.to
                ):
                    raise BadPlan(f"stage {stage.index} sends {name} to {send.to}, and not all of them receive it")
            for name, value in stage.receives.items():
                sent = self.stages[value.source].sends.get(name) if 0 <= value.source < stage.index else None
                if sent is None or sent.type != value.type or stage.index not in sent.to:
                    raise BadPlan(
                        f"stage {stage.index} receives {name} ({value.type}) from stage {value.source}, which does not send it"
                    )
        return self

    def check_model(self, fingerprint: str) -> Plan:
        """BadPlan if the plan was made for a model with other parameters."""
        if fingerprint != self.fingerprint:
            raise BadPlan(
                f"this plan belongs to another model ({self.model})", why="the names, shapes or dtypes of its state differ",
                use="a plan made from this model",
            )  # fmt: skip
        return self

    # ---- files ------------------------------------------------------------------------------------------------------

    def _to_json(self) -> dict[str, Any]:
        stages = []
        for stage in self.stages:
            record = {
                name: getattr(stage, name) for name in ("index", "outputs", "inputs", "parameters", "buffers", "layers")
            }
            record["axis_sizes"] = dict(stage.axis_sizes)
            record["partial_gradients"] = list(stage.partial_gradients)
            record["tied"] = {name: list(held) for name, held in stage.tied.items()}
            record["receives"] = {name: asdict(value) for name, value in stage.receives.items()}
            record["sends"] = {name: {**asdict(value), "to": list(value.to)} for name, value in stage.sends.items()}
            record["cost"] = asdict(stage.cost)
            record["graph"] = list(stage.records)
            stages.append(record)
        plain = _PLAIN
        maps = ("mesh", "sizes", "inputs", "aliases", "collectives")
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in plain},
            **({"zero": self.zero} if self.zero else {}),
            **{name: dict(getattr(self, name)) for name in maps},
            "weights": dict(self.parameter_notation),
            "predicted": {name: value for name, value in asdict(self.predicted).items() if value is not None},
            "notes": list(self.notes),
            "gradient_edges": [list(edge) for edge in self.gradient_edges],
            "stage_ranks": list(self.stage_ranks),
            "instructions": [[item.to_list() for item in listed] for listed in self.instructions],
            "loss_weights": list(self.loss_weight_records) if self.loss_weight_records else None,
            "stages": stages,
        }

    def to_json(self) -> str:
        """The plan as JSON text; the same plan gives the same bytes."""
        return json.dumps(self._to_json(), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan and prove it. BadPlan names what is wrong with the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadPlan(f"cannot read the plan {path}", why=str(error)) from error
        try:
            return cls.from_json(text).check()
        except AutoparError as error:
            where = f"{path}, {error.where}" if error.where else str(path)
            raise type(error)(error.what, where=where, why=error.why, use=error.use) from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its JSON text, not yet proved."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadPlan("the plan is not JSON", why=str(error)) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise BadPlan("this is not a plan of this version of autopar", use=f'a file with "format": {FORMAT}')
        try:
            mesh = dict(values["mesh"])
            stages = tuple(_stage_from_json(record) for record in values["stages"])
            plain = _PLAIN
            given: dict[str, Any] = {name: values[name] for name in plain} | {"zero": int(values.get("zero", 0))}
            given |= {name: dict(values[name]) for name in ("sizes", "inputs", "aliases", "collectives")}
            return cls(
                **given,
                mesh=mesh,
                parameter_notation=dict(values["weights"]),
                predicted=_prediction(values["predicted"]),
                notes=tuple(values["notes"]),
                gradient_edges=tuple((int(a), int(b)) for a, b in values["gradient_edges"]),
                stage_ranks=tuple(int(rank) for rank in values["stage_ranks"]),
                instructions=tuple(tuple(instruction(item) for item in listed) for listed in values["instructions"]),
                loss_weight_records=values["loss_weights"],
                stages=stages,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, BadPlan):
                raise
            raise BadPlan(
                "the plan is incomplete or was edited into something unreadable", why=f"{type(error).__name__}: {error}"
            ) from error

    def emit(self, folder: str | Path) -> list[Path]:
        """Write each rank's program, `run.py` that starts them under torchrun, and the plan. Returns the paths."""
        from autopar.emit_files import emit_files

        return emit_files(self, Path(folder))

    def __str__(self) -> str:
        from autopar.plan_text import plan_text

        return plan_text(self)


def _stage_from_json(record: Mapping[str, Any]) -> StagePlan:
    return StagePlan(
        index=record["index"],
        receives={name: Receive(**value) for name, value in record["receives"].items()},
        sends={name: Send(**{**value, "to": tuple(value["to"])}) for name, value in record["sends"].items()},
        outputs=dict(record["outputs"]),
        inputs=dict(record["inputs"]),
        parameters=dict(record["parameters"]),
        buffers=dict(record["buffers"]),
        partial_gradients=tuple(record["partial_gradients"]),
        tied={name: tuple(stages) for name, stages in record["tied"].items()},
        cost=StageCost(**{**record["cost"], "memory": _memory(record["cost"].get("memory"))}),
        layers=record["layers"],
        axis_sizes=dict(record["axis_sizes"]),
        records=record["graph"],
    )


def _prediction(record: Mapping[str, Any]) -> Prediction:
    return Prediction(**{**record, "replicas": ReplicaTraffic(**record["replicas"]) if "replicas" in record else None})


def _memory(record: Mapping[str, int] | None) -> PeakMemory | None:
    return PeakMemory(**record) if record is not None else None


def stage_records(module: fx.GraphModule) -> list[dict[str, Any]]:
    """A stage's graph as a plan keeps it."""
    return graph_to_json(module.graph)

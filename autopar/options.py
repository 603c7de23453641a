"""What `parallelize` and the commands are asked for: checked once, kept in one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autopar.plan import Plan
from autopar.precision import Precision, precision_named
from autopar.runtime.compiled import Compile
from autopar.runtime.world import launched, launched_ranks, ranks_per_node
from costmodel.errors import BadArgument
from costmodel.hardware import Hardware, nearest
from costmodel.hardware import hardware as hardware_named
from passes.overrides import Overrides
from passes.schedules import schedule as schedule_named
from passes.shard_problem import SequenceParallel

# The axes of the mesh, the outermost first: tensor-parallel ranks, which talk in every layer, are next to each other; replicas, which talk
# once a step, come around them, and stages, which exchange activations only, around all.
MESH_ORDER = ("pp", "dp", "tp")
MOST_ZERO = 3  # the last ZeRO stage that there is


@dataclass(frozen=True)
class Options:
    """What `parallelize` was asked for. `mesh`: the sizes of the axes, the outermost first; dp is there if there are replicas."""

    mesh: Mapping[str, int]
    microbatches: int | None
    schedule: str
    loss_fn: Callable[..., torch.Tensor] | None
    hardware: Hardware
    overrides: Overrides
    plan: Plan | None
    sequence_parallel: SequenceParallel
    device: torch.device
    seed: int
    virtual_stages: int | None
    compile: Compile
    recompute: str | int
    zero: int
    precision: Precision


def checked_options(
    model: nn.Module, *, tp: int, pp: int, dp: int, microbatches: int | None, schedule: str, virtual_stages: int | None,
    loss_fn: Callable[..., torch.Tensor] | None, zero: int, precision: str, recompute: str | int, sequence_parallel: SequenceParallel,
    hardware: str | Hardware | None, overrides: Mapping[str, Any] | None, plan: Plan | None, compile: Compile,
    device: torch.device | str | None, seed: int, mesh_order: Sequence[str],
) -> Options:  # fmt: skip
    """The arguments of `parallelize` in one value. BadArgument for the first that cannot be used."""
    for name, degree in (("tp", tp), ("pp", pp), ("dp", dp)):
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise BadArgument(f"{name} = {degree!r} is not a degree of parallelism", use="a positive integer")
    if microbatches is not None and (
        isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1
    ):
        raise BadArgument(f"microbatches = {microbatches!r}", use="a positive integer, or None")
    if isinstance(zero, bool) or not isinstance(zero, int) or not 0 <= zero <= MOST_ZERO:
        raise BadArgument(f"zero = {zero!r} is no ZeRO stage", use=f"0 to {MOST_ZERO}")
    if zero == 3 and compile:
        raise BadArgument(
            "compile does not go with zero = 3 in this version", why="parameters are gathered while forward runs", use="zero=2"
        )
    if not isinstance(model, nn.Module):
        raise BadArgument(f"the model is a {type(model).__name__}, not an nn.Module")
    if recompute not in ("none", "selective", "full") and (
        isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 1
    ):
        raise BadArgument(
            f"recompute = {recompute!r}", use='"none", "selective", "full", or the most bytes that a rank may hold (an int)'
        )
    if sequence_parallel not in (False, True, "auto"):
        raise BadArgument(f"sequence_parallel = {sequence_parallel!r}", use='False, True or "auto"')
    schedule_named(schedule).checked_virtual_stages(virtual_stages)
    if not isinstance(compile, (bool, str, Mapping)):
        raise BadArgument(f"compile = {compile!r}", use="False, True, a backend's name, or a dict of torch.compile's options")
    order = tuple(mesh_order) if isinstance(mesh_order, Iterable) else ()
    if sorted(map(str, order)) != sorted(MESH_ORDER):
        raise BadArgument(f"mesh_order = {mesh_order!r}", use=f"each of {', '.join(MESH_ORDER)} once, the outermost first")
    mesh = mesh_of(pp=pp, dp=dp, tp=tp, order=order)
    return Options(
        dict(plan.mesh) if plan is not None else mesh, microbatches, schedule, loss_fn, profile_for(hardware, model),
        Overrides.of(overrides), plan, sequence_parallel, device_for(device, model), seed, virtual_stages, compile, recompute,
        zero if dp > 1 else 0,
        precision_named(plan.precision if plan is not None and precision == "fp32" else precision),
    )  # fmt: skip


def mesh_of(*, pp: int, dp: int, tp: int, order: Sequence[str] = MESH_ORDER) -> dict[str, int]:
    """The sizes of the axes, the outermost first; dp is there if there are replicas."""
    degrees = {"pp": pp, "dp": dp, "tp": tp}
    return {axis: degrees[axis] for axis in order if axis != "dp" or dp > 1}


def call_arguments(example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise BadArgument(
        f"example_inputs is a {type(example_inputs).__name__}",
        use="a dict of keyword arguments, or a tuple of positional ones",
    )


def device_for(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Where ranks compute: the device that is asked for, else the model's, else (for models on meta) the GPU if there is one."""
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise BadArgument(f"device = {device!r}", why=reason, use='a torch.device, or a name such as "cuda"') from error
    first = next((tensor for tensor in (*model.parameters(), *model.buffers())), None)
    if first is None or not first.is_meta:
        return first.device if first is not None else torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def profile_for(hardware: str | Hardware | None, model: nn.Module) -> Hardware:
    """The profile that is asked for; that of the device which the model is on for None. In a job on several nodes, with as many devices
    a node as the job has ranks there. BadArgument as `ranks_per_node` raises it.
    """
    if hardware is not None:
        profile = hardware_named(hardware)
    elif device_for(None, model).type == "cuda":
        place = torch.cuda.get_device_properties(torch.cuda.current_device())
        profile = nearest(place.name, place.total_memory) or hardware_named("a100-80gb")
    else:
        profile = hardware_named("cpu")
    num_ranks = launched_ranks()
    together = ranks_per_node(num_ranks) if launched() else num_ranks
    return replace(profile, devices_per_node=together) if together < num_ranks else profile


def model_name(model: nn.Module) -> str:
    """Where a model comes from, for titles: `examples/mlp.py:Net`, or `package.module:Class`."""
    import sys
    from pathlib import Path

    kind = type(model)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file:
        try:
            return f"{Path(file).resolve().relative_to(Path.cwd().resolve())}:{kind.__qualname__}"
        except ValueError:
            pass
    return f"{kind.__module__}:{kind.__qualname__}" if kind.__module__ != "__main__" else kind.__qualname__

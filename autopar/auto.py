"""`tp="auto"` and its like: what `parallelize` leaves to a search over the ranks that there are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autopar.options import profile_for
from autopar.runtime.world import launched_ranks
from autopar.search import search
from autopar.search_space import ZEROS
from costmodel.errors import BadArgument

AUTO = "auto"
DECISIONS = ("tp", "pp", "dp", "microbatches", "schedule", "recompute", "zero")


def is_auto(options: Mapping[str, Any]) -> bool:
    """True if a decision is left to the search."""
    return any(options.get(name) == AUTO for name in DECISIONS)


def ranks_here(model: nn.Module) -> int:
    """The ranks of this job: those that were launched, else the GPUs if the model is on one, else the cores."""
    if torch.distributed.is_initialized() or "WORLD_SIZE" in os.environ:
        return launched_ranks()
    first = next(model.parameters(), None)
    return torch.cuda.device_count() if first is not None and first.is_cuda else os.cpu_count() or 1


def decided(
    model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None, options: Mapping[str, Any], *, gpus: int | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None, compile: Any = False,
) -> dict[str, Any]:  # fmt: skip
    """`options` of `parallelize` with every "auto" decided: the fastest layout of `gpus` ranks (None: what the degrees multiply to, or
    those of this job where a degree is auto).

    A number of bytes as `recompute` is the memory of a rank. With `compile`, ZeRO 3 is none of the choices: it does not run then.
    BadArgument without example inputs; DoesNotFit as `search` raises it.
    """
    if example_inputs is None:
        asked = ", ".join(name for name in DECISIONS if options.get(name) == AUTO)
        raise BadArgument(f'{asked}="auto" needs example_inputs', why="what is fastest depends on their sizes", use="example_inputs={...}")
    found = dict(options)
    degrees = [found.get(axis, 1) for axis in ("tp", "pp", "dp")]
    if gpus is None:
        gpus = math.prod(degrees) if all(isinstance(degree, int) for degree in degrees) else ranks_here(model)
    limit = found.get("recompute") if isinstance(found.get("recompute"), int) else None
    sequence = found.get("sequence_parallel", False)
    plans = search(
        model, example_inputs, gpus=gpus, hardware=profile_for(found.get("hardware"), model), memory_bytes=limit,
        tp=found.get("tp", 1), pp=found.get("pp", 1), dp=found.get("dp", 1), microbatches=found.get("microbatches"),
        schedule=found.get("schedule", "1f1b"), virtual_stages=found.get("virtual_stages"),
        recompute=AUTO if limit is not None else found.get("recompute", "none"),
        zero=found.get("zero", 0), zeros=ZEROS[:3] if compile else ZEROS, sequence_parallel=sequence,
        precision=found.get("precision", "fp32"), loss_fn=loss_fn, top=1,
    )  # fmt: skip
    best = plans.predictions[0].layout
    found |= {"tp": best.tp, "pp": best.pp, "dp": best.dp, "microbatches": best.microbatches}
    if found.get("schedule") == AUTO:
        found |= {"schedule": best.schedule, "virtual_stages": best.virtual_stages if best.pp > 1 else None}
    if found.get("recompute") == AUTO:
        found["recompute"] = best.recompute
    if found.get("zero") == AUTO:
        found["zero"] = best.zero
    if sequence == AUTO:
        found["sequence_parallel"] = best.sequence_parallel
    return found

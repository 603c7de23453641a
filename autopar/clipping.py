"""Gradient norms over all ranks, and clipping: what `torch.nn.utils.clip_grad_norm_` does for one device.

A rank contributes the gradients of which it holds the piece to count (a copy of a whole tensor, a tied weight's further stages and other
replicas do not, unless they are not finite), as one number: the sum of |g|^p, or the largest |g|. The numbers of all ranks are gathered,
not reduced, and combined in one order: so every rank gets the same norm to the last bit, and sees alike what is not finite on one of them
only, also in a maximum, where a reduction may lose a NaN. Sums are made in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from costmodel.errors import BadArgument, NonFinite


def checked_max_norm(max_norm: float) -> float:
    """A float. BadArgument for anything else, and for nan."""
    try:
        value = float(max_norm)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise BadArgument(f"max_norm = {max_norm!r}", use="a number, or math.inf to leave the gradients as they are")
    return value


def norm_dtype(trained: Iterable[torch.Tensor]) -> torch.dtype:
    """Of the norm of these parameters' gradients: float64 if any of them is, else float32."""
    return torch.float64 if any(each.dtype == torch.float64 for each in trained) else torch.float32


def checked_norm_type(norm_type: float) -> float:
    """A float above 0, infinity included. BadArgument for anything else."""
    try:
        value = float(norm_type)
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise BadArgument(f"norm_type = {norm_type!r}", use="a number above 0, such as 2, or math.inf")
    return value


def norm_part(held: Iterable[tuple[torch.Tensor, bool]], norm_type: float, device: torch.device | str) -> torch.Tensor:
    """A rank's part of a norm, 0-dim float64: the sum of |g|^norm_type, or the largest |g|, of the gradients that count here.

    0 for none. Of the others, copies of what counts elsewhere, only that one is not finite is seen: the part is nan then.
    """
    parts = [_part(each, norm_type) if counts else _part(each, math.inf) * 0.0 for each, counts in held if each.numel()]
    return combined_parts(parts, norm_type, device)


def _part(gradient: torch.Tensor, norm_type: float) -> torch.Tensor:
    if norm_type == math.inf:
        return gradient.abs().amax().double()
    gradient = gradient.double()
    return gradient.square().sum() if norm_type == 2 else gradient.abs().pow(norm_type).sum()


def combined_parts(parts: Sequence[torch.Tensor], norm_type: float, device: torch.device | str) -> torch.Tensor:
    """Parts of several gradients, ranks or axes as one."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    stacked = torch.stack([part.to(device) for part in parts])
    return stacked.amax() if norm_type == math.inf else stacked.sum()


def clip_by_part(
    parameters: Iterable[torch.Tensor], part: torch.Tensor, max_norm: float, norm_type: float, error_if_nonfinite: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """Scale the gradients of `parameters` given the whole norm's part; returns the norm, 0-dim of `dtype`.

    As torch does: by max_norm / (norm + 1e-6), where that is below 1. NonFinite, with no gradient changed, where that is asked for.
    """
    norm = (part if norm_type == math.inf else part.pow(1.0 / norm_type)).to(dtype)
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise NonFinite(
            f"the gradients' norm of order {norm_type:g} is {norm.item()}", why="a gradient on some rank is not finite",
            use="error_if_nonfinite=False to go on; no gradient has been changed",
        )  # fmt: skip
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm


def over_axes(part: torch.Tensor, norm_type: float, gathers: Iterable[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """The part of all ranks: gathered over one axis of the mesh after the other."""
    for gather in gathers:
        part = combined_parts(list(gather(part).unbind(0)), norm_type, part.device)
    return part

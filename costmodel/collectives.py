"""Seconds of the collectives and transfers that programs perform, from latency and bandwidth.

The alpha-beta model: a step that moves m bytes over one link takes `latency + m / bandwidth`. Every algorithm here is
the one that moves the least possible bytes per rank (ring, or pairwise exchange); trees, which win for short messages
on many ranks, are not modelled, so small collectives on large axes are over-estimated. Sources: Thakur, Rabenseifner
and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005; Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms", JPDC 2009; the same form with its constants is NCCL's own tuning model
(src/graph/tuning.cc). `num_bytes` may be a sympy expression; the result then is one too.
"""

from __future__ import annotations

from typing import Any

from costmodel.errors import BadArgument
from costmodel.hardware import Link

Seconds = Any  # float for numbers; a sympy expression where num_bytes is one


def _check_axis(axis_size: int) -> None:
    if axis_size < 1:
        raise BadArgument(
            f"axis_size is {axis_size}", why="a mesh axis has at least one rank", use="an integer of 1 or more"
        )


def _steps(*, num_steps: int, bytes_per_step: Any, link: Link) -> Seconds:
    return num_steps * link.latency_seconds + num_steps * bytes_per_step / link.bandwidth_bytes_per_second


def all_reduce_seconds(*, num_bytes: Any, axis_size: int, link: Link) -> Seconds:
    """Seconds of a ring all_reduce of `num_bytes` held on each of `axis_size` ranks: a reduce_scatter, then an
    all_gather.

    2 (n-1) latency + 2 (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument (a ValueError) if axis_size < 1. Source:
    Patarasuk and Yuan 2009.
    """
    _check_axis(axis_size)
    return _steps(num_steps=2 * (axis_size - 1), bytes_per_step=num_bytes / axis_size, link=link)


def all_gather_seconds(*, num_bytes: Any, axis_size: int, link: Link) -> Seconds:
    """Seconds of a ring all_gather whose result on every rank has `num_bytes`; each rank brings num_bytes / axis_size.

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Thakur et al. 2005,
    section 4.1.
    """
    _check_axis(axis_size)
    return _steps(num_steps=axis_size - 1, bytes_per_step=num_bytes / axis_size, link=link)


def reduce_scatter_seconds(*, num_bytes: Any, axis_size: int, link: Link) -> Seconds:
    """Seconds of a ring reduce_scatter of an input of `num_bytes` on each rank; each rank keeps num_bytes / axis_size.

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Patarasuk and Yuan
    2009. The additions are memory traffic far faster than the link and are not counted.
    """
    _check_axis(axis_size)
    return _steps(num_steps=axis_size - 1, bytes_per_step=num_bytes / axis_size, link=link)


def all_to_all_seconds(*, num_bytes: Any, axis_size: int, link: Link) -> Seconds:
    """Seconds of a pairwise all_to_all in which each rank holds `num_bytes`, one n-th of it for every rank (itself
    included).

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Thakur et al. 2005,
    section 4.3.
    """
    _check_axis(axis_size)
    return _steps(num_steps=axis_size - 1, bytes_per_step=num_bytes / axis_size, link=link)


def broadcast_seconds(*, num_bytes: Any, axis_size: int, link: Link) -> Seconds:
    """Seconds of a pipelined ring broadcast of `num_bytes` from one rank to `axis_size` ranks.

    (n-1) latency + bytes / bandwidth: the bytes cross the first link once, later links overlap with it. 0 for one rank.
    BadArgument if axis_size < 1. Source: NCCL's ring broadcast (src/graph/tuning.cc).
    """
    _check_axis(axis_size)
    if axis_size == 1:
        return 0.0
    return (axis_size - 1) * link.latency_seconds + num_bytes / link.bandwidth_bytes_per_second


def send_seconds(*, num_bytes: Any, link: Link) -> Seconds:
    """Seconds until `num_bytes` sent by one rank have arrived at another: latency + bytes / bandwidth."""
    return link.latency_seconds + num_bytes / link.bandwidth_bytes_per_second

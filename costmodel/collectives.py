"""Seconds of the collectives and transfers that programs perform, from latency and bandwidth.

The alpha-beta model: a step that moves m bytes over one link takes `latency + m / bandwidth`. On a plain `Link` every algorithm is the one
that moves the least possible bytes per rank (ring, or pairwise exchange).

On an `AxisLink` (two levels: links inside a node, ports between nodes) a ring passes through each node once. Its steps are as many as
there are ranks; those that leave a node have the network's latency, the others the node's. Its bandwidth is the slower of the links inside
and the network shares of the axis's ranks in a node together: a ring is run once per port, each entering the node through another one.
An all_reduce takes the faster of that and a tree (latency by the logarithm of the nodes, `_TREE_BANDWIDTH` of a ring's bandwidth), so that
seconds grow with bytes, without a jump. What an all_to_all sends to other nodes goes over each rank's own share.

Sources: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005; Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms", JPDC 2009; the same form with its constants is NCCL's own tuning model (src/graph/tuning.cc).
`num_bytes` may be a sympy expression; the result then is one too.
"""

from __future__ import annotations

import math
from typing import Any

import sympy

from costmodel.errors import BadArgument
from costmodel.machine import AxisLink, Link

Seconds = Any  # float for numbers; a sympy expression where num_bytes is one
AnyLink = Link | AxisLink
_TREE_BANDWIDTH = 0.85  # of a ring's: NCCL src/graph/tuning.cc, trees across nodes


def _check_axis(axis_size: int) -> None:
    if axis_size < 1:
        raise BadArgument(
            f"axis_size is {axis_size}", why="a mesh axis has at least one rank", use="an integer of 1 or more"
        )


def _ring_latency(axis_size: int, link: AnyLink) -> float:
    """Seconds of the first byte's way round the ring."""
    steps = axis_size - 1
    if isinstance(link, Link):
        return steps * link.latency_seconds
    outside = min(steps, link.num_nodes - 1)
    return outside * link.across.latency_seconds + (steps - outside) * link.inside.latency_seconds


def _ring(*, rounds: int, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """`rounds` times round a ring of n ranks, n-1 steps of bytes / n each."""
    moved = rounds * (axis_size - 1) * (num_bytes / axis_size)
    return rounds * _ring_latency(axis_size, link) + moved / link.bandwidth_bytes_per_second


def _least(one: Seconds, other: Seconds) -> Seconds:
    return sympy.Min(one, other) if isinstance(one, sympy.Basic) or isinstance(other, sympy.Basic) else min(one, other)


def all_reduce_seconds(*, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """Seconds of a ring all_reduce of `num_bytes` held on each of `axis_size` ranks: a reduce_scatter, then an
    all_gather.

    2 (n-1) latency + 2 (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument (a ValueError) if axis_size < 1. Source:
    Patarasuk and Yuan 2009. Between nodes: a tree where that is faster (Sanders, Speck and Traeff, "Two-tree algorithms", 2009), which
    goes up and down log2(nodes) levels.
    """
    _check_axis(axis_size)
    ring = _ring(rounds=2, num_bytes=num_bytes, axis_size=axis_size, link=link)
    if isinstance(link, Link) or link.num_nodes == 1:
        return ring
    levels = math.ceil(math.log2(link.num_nodes))
    latency = 2 * (levels * link.across.latency_seconds + (link.ranks_per_node - 1) * link.inside.latency_seconds)
    moved = 2 * (axis_size - 1) * (num_bytes / axis_size)
    return _least(ring, latency + moved / (link.bandwidth_bytes_per_second * _TREE_BANDWIDTH))


def all_gather_seconds(*, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """Seconds of a ring all_gather whose result on every rank has `num_bytes`; each rank brings num_bytes / axis_size.

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Thakur et al. 2005,
    section 4.1.
    """
    _check_axis(axis_size)
    return _ring(rounds=1, num_bytes=num_bytes, axis_size=axis_size, link=link)


def reduce_scatter_seconds(*, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """Seconds of a ring reduce_scatter of an input of `num_bytes` on each rank; each rank keeps num_bytes / axis_size.

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Patarasuk and Yuan
    2009. The additions are memory traffic far faster than the link and are not counted.
    """
    _check_axis(axis_size)
    return _ring(rounds=1, num_bytes=num_bytes, axis_size=axis_size, link=link)


def all_to_all_seconds(*, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """Seconds of a pairwise all_to_all in which each rank holds `num_bytes`, one n-th of it for every rank (itself
    included).

    (n-1) latency + (n-1)/n bytes / bandwidth. 0 for one rank. BadArgument if axis_size < 1. Source: Thakur et al. 2005,
    section 4.3. Between nodes the pieces for other nodes and those for the same node move at once, each over their own link.
    """
    _check_axis(axis_size)
    if isinstance(link, Link) or link.num_nodes == 1:
        return _ring(rounds=1, num_bytes=num_bytes, axis_size=axis_size, link=link)
    piece = num_bytes / axis_size
    outside = (axis_size - link.ranks_per_node) * piece / link.across.bandwidth_bytes_per_second
    inside = (link.ranks_per_node - 1) * piece / link.inside.bandwidth_bytes_per_second
    slowest = sympy.Max(outside, inside) if isinstance(num_bytes, sympy.Basic) else max(outside, inside)
    return _ring_latency(axis_size, link) + slowest


def broadcast_seconds(*, num_bytes: Any, axis_size: int, link: AnyLink) -> Seconds:
    """Seconds of a pipelined ring broadcast of `num_bytes` from one rank to `axis_size` ranks.

    (n-1) latency + bytes / bandwidth: the bytes cross the first link once, later links overlap with it. 0 for one rank.
    BadArgument if axis_size < 1. Source: NCCL's ring broadcast (src/graph/tuning.cc).
    """
    _check_axis(axis_size)
    if axis_size == 1:
        return 0.0
    return _ring_latency(axis_size, link) + num_bytes / link.bandwidth_bytes_per_second


def send_seconds(*, num_bytes: Any, link: AnyLink) -> Seconds:
    """Seconds until `num_bytes` sent by one rank have arrived at another: latency + bytes / bandwidth, of the network share of one rank
    if the axis leaves its node.
    """
    if isinstance(link, AxisLink):
        link = link.inside if link.num_nodes == 1 else link.across
    return link.latency_seconds + num_bytes / link.bandwidth_bytes_per_second

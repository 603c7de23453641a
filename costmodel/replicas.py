"""Seconds that the replicas of data parallelism add to a training step: what they exchange, and how much of it compute hides.

Traffic of one rank a step, of n replicas, for G bytes of gradients and P bytes of parameters:

    ZeRO 0     an all_reduce of G
    ZeRO 1, 2  a reduce_scatter of G, and an all_gather of P when the optimizer has changed its parts
    ZeRO 3     an all_gather of P in each microbatch's forward and in its backward, and a reduce_scatter of G

A collective of `num_bytes` over a ring sends (n-1)/n of them from each rank, an all_reduce twice that. Source: Rajbhandari et al., "ZeRO",
SC 2020, section 7.

Gradients are summed once a step, in buckets, beside the last microbatch's backward: what is left over after it is at least the last
bucket. Gathered parameters are wanted at the next forward, in buckets again; those of ZeRO 3 layer by layer (`gathered_seconds`), each
while the layer before computes. Ranks of a pipeline stop one after the other, and the traffic of those that stop early is hidden by what
the later ones still compute. Compute is slower meanwhile (`ReplicaAxis.slowdown`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from costmodel.collectives import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from costmodel.machine import AxisLink

BUCKET_BYTES = 40e6  # of gradients that are summed while the next ones are made: what is left over after the last backward


@dataclass(frozen=True)
class ReplicaAxis:
    """The ranks that hold the same parameters. `overlaps`: whether traffic runs beside compute, which then takes `slowdown` times as long.
    `sums_each_microbatch`: gradients are summed after every microbatch's backward (ZeRO 3), not once a step.
    """

    size: int
    link: AxisLink
    zero: int = 0
    overlaps: bool = True
    slowdown: float = 1.0
    sums_each_microbatch: bool = False


class RankLoad(NamedTuple):
    """A pipeline rank: bytes of all its gradients as they are summed and of all its parameters as they are gathered; seconds of one
    microbatch's forward and backward on it. Of those, under ZeRO 3: of the traffic of its layers, and what they are longer for it
    (`gathered_seconds`).
    """

    gradient_bytes: float
    parameter_bytes: float
    forward_seconds: float
    backward_seconds: float
    gather_seconds: float = 0.0
    gather_wait_seconds: float = 0.0


@dataclass(frozen=True)
class ReplicaTraffic:
    """Of the rank that has most, a step: bytes it sends, seconds they take, and how much longer the step is for them; `tail_seconds`:
    how much of this comes after the last backward.
    """

    num_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    tail_seconds: float = 0.0


def beside(compute: float, traffic: float, *, overlaps: bool, slowdown: float = 1.0, first: float = 0.0) -> tuple[float, float]:
    """(seconds of compute with traffic beside or after it, what of the traffic is exposed). `first`: seconds nothing can hide."""
    if not traffic:
        return compute, 0.0
    if not overlaps:
        return compute + traffic, traffic
    hidden = min(traffic - first, compute)
    slowed = compute + hidden * (slowdown - 1)
    total = max(slowed, traffic - first) + first
    return total, total - compute


def gathered_seconds(
    forward: float, backward: float, *, parameter_bytes: float, gradient_bytes: float, axis: ReplicaAxis
) -> tuple[float, float, float]:
    """(forward, backward, traffic of both) seconds of a layer under ZeRO 3, its parameters gathered for each beside a layer's compute."""
    gather = all_gather_seconds(num_bytes=parameter_bytes, axis_size=axis.size, link=axis.link)
    scatter = 0.0
    if axis.sums_each_microbatch:
        scatter = reduce_scatter_seconds(num_bytes=gradient_bytes, axis_size=axis.size, link=axis.link)
    return (
        beside(forward, gather, overlaps=axis.overlaps, slowdown=axis.slowdown)[0],
        beside(backward, gather + scatter, overlaps=axis.overlaps, slowdown=axis.slowdown)[0],
        2 * gather + scatter,
    )


def replica_traffic(ranks: Sequence[RankLoad], axis: ReplicaAxis, *, microbatches: int, virtual_stages: int = 1) -> ReplicaTraffic:
    """What a step of pipeline ranks, the first to begin first, exchanges with its replicas."""
    if axis.size == 1:
        return ReplicaTraffic()
    num_bytes = seconds = waited = tail = 0.0
    later = 0.0  # how much longer the ranks before this one run
    seen: set[RankLoad] = set()
    for rank in ranks:
        if rank not in seen:  # of equal ranks the first one stops last
            seen.add(rank)
            sums, gathers = _seconds(rank, axis)
            left = 0.0
            if axis.zero == 3:
                total = microbatches * rank.gather_seconds
                if not axis.sums_each_microbatch:
                    total += sums
                    left = _left(sums, rank.gradient_bytes, rank.backward_seconds, axis, before=rank.gather_seconds / 2)
            else:
                total = sums + gathers
                left = _left(sums, rank.gradient_bytes, rank.backward_seconds, axis)
                left += _left(gathers, rank.gradient_bytes, rank.forward_seconds, axis)
            num_bytes = max(num_bytes, _bytes(rank, axis, microbatches))
            seconds, tail = max(seconds, total), max(tail, left - later)
            waited = max(waited, microbatches * rank.gather_wait_seconds)
        later += rank.backward_seconds / virtual_stages
    return ReplicaTraffic(num_bytes, seconds, waited + tail, tail)


def _seconds(rank: RankLoad, axis: ReplicaAxis) -> tuple[float, float]:
    """(of summing the gradients once, of gathering the parameters once)"""
    if axis.zero == 0:
        return all_reduce_seconds(num_bytes=rank.gradient_bytes, axis_size=axis.size, link=axis.link), 0.0
    return (
        reduce_scatter_seconds(num_bytes=rank.gradient_bytes, axis_size=axis.size, link=axis.link),
        all_gather_seconds(num_bytes=rank.parameter_bytes, axis_size=axis.size, link=axis.link),
    )


def _left(traffic: float, num_bytes: float, compute: float, axis: ReplicaAxis, before: float = 0.0) -> float:
    """Seconds that compute is longer for the traffic beside it, or that are left over after it: at least those of one bucket of the
    `num_bytes`. `before`: of other traffic beside the same compute.
    """
    if not axis.overlaps:
        return traffic
    bucket = min(1.0, BUCKET_BYTES / max(num_bytes, 1))
    compute = max(compute - before, 0.0)
    return max(traffic * bucket, traffic - compute) + (axis.slowdown - 1) * min(traffic, compute)


def _bytes(rank: RankLoad, axis: ReplicaAxis, microbatches: int) -> float:
    """What a rank sends in a step."""
    share = (axis.size - 1) / axis.size
    if axis.zero == 0:
        return 2 * share * rank.gradient_bytes
    sums, gathers = (microbatches if axis.zero == 3 and axis.sums_each_microbatch else 1), (2 * microbatches if axis.zero == 3 else 1)
    return share * (sums * rank.gradient_bytes + gathers * rank.parameter_bytes)

"""How much replicas exchange at a time: rules that the runtime keeps (`autopar.runtime`) and the memory model counts with (`passes`).

Larger buckets are fewer calls, smaller ones overlap more and hold less. Each exchange wakes a rank once or twice, which on a CPU costs as
much as some megabytes. With ZeRO a group of parameters is gathered, and its gradients are summed, at once; what is held of groups is memory
that its user wanted saved, so they are smaller than buckets once there is enough to share out.
"""

from __future__ import annotations

BUCKET_BYTES = 25 * 2**20  # at most, but for a tensor that is larger alone
HELD_GROUPS = 1  # groups of gathered parameters that a stage holds (ZeRO 3), beside one that is on its way
_UNDER_WAY, _SHARDED_UNDER_WAY = 2, 1
_LEAST_BUCKETS, _LEAST_BUCKET_BYTES = 16, 4 * 2**20  # so that a small model's gradients are not all sent, or held twice, at the end
_GROUPS = 16  # about, of a stage's parameters
_LEAST_GROUP_BYTES = 2**20
_MOST_GROUP_BYTES = 64 * 2**20
_FILLED = 0.75  # of a group, on average: it ends before the tensor that would go beyond its bytes


def gradient_bucket_bytes(total_bytes: float) -> int:
    """Bytes of gradients that are summed at once without ZeRO, of a rank's `total_bytes`."""
    return int(min(BUCKET_BYTES, max(_LEAST_BUCKET_BYTES, total_bytes // _LEAST_BUCKETS)))


def under_way(sharded: bool) -> int:
    """Buckets that are being summed when the next one starts: the ones before them are waited for. `sharded`: under ZeRO."""
    return _SHARDED_UNDER_WAY if sharded else _UNDER_WAY


def shard_group_bytes(total_bytes: float) -> int:
    """Bytes of parameters that are gathered, and of gradients that are summed, at once under ZeRO, of a stage's `total_bytes`."""
    return int(min(max(total_bytes // _GROUPS, _LEAST_GROUP_BYTES), _MOST_GROUP_BYTES))


def mean_group_bytes(total_bytes: float) -> float:
    """What a group of `shard_group_bytes` has on average, where the tensors are not known."""
    return min(_FILLED * shard_group_bytes(total_bytes), total_bytes)

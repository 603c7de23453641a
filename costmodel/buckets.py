"""How much replicas exchange at a time: rules that the runtime keeps (`autopar.runtime`) and the memory model counts with (`passes`).

Larger buckets are fewer calls, smaller ones overlap more and hold less. Each sum wakes a rank once or twice, which on a CPU costs as much
as some megabytes; with ZeRO what a bucket copies is memory that its user wanted saved, so it may be smaller.
"""

from __future__ import annotations

BUCKET_BYTES = 25 * 2**20  # at most, but for a tensor that is larger alone
HELD_GROUPS = 2  # groups of gathered parameters that a rank holds at once (ZeRO 3)
_LEAST_BUCKETS, _LEAST_BUCKET_BYTES = 4, 4 * 2**20  # so that a small model's gradients are not all sent at the end
_LEAST_SHARDED_BUCKETS, _LEAST_SHARDED_BUCKET_BYTES = 16, 2**20
_GROUPS = 16  # about, of a rank's parameters
_LEAST_GROUP_BYTES = 2**16
_MOST_GROUP_BYTES = 64 * 2**20


def gradient_bucket_bytes(total_bytes: float, sharded: bool) -> int:
    """Bytes of gradients that are summed at once, of a rank's `total_bytes`; `sharded`: each replica gets its part of the sum alone."""
    count, least = (_LEAST_SHARDED_BUCKETS, _LEAST_SHARDED_BUCKET_BYTES) if sharded else (_LEAST_BUCKETS, _LEAST_BUCKET_BYTES)
    return int(min(BUCKET_BYTES, max(least, total_bytes // count)))


def parameter_group_bytes(total_bytes: float) -> int:
    """Bytes of parameters that are gathered at once under ZeRO 3, of a stage's `total_bytes`."""
    return int(min(max(total_bytes // _GROUPS, _LEAST_GROUP_BYTES), _MOST_GROUP_BYTES))

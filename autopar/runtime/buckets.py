"""How tensors travel together: what sums and gathers of data parallelism share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

_use_count = torch._C._storage_Use_Count


def _references(tensor: torch.Tensor) -> int:
    return _use_count(tensor.untyped_storage()._cdata)


_ALONE = _references(torch.empty(1))  # of a tensor whose memory nothing else refers to


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether something else refers to the memory of this tensor, which may then not be written."""
    return _references(tensor) > _ALONE


def buckets_of(names: Iterable[str], tensors: Mapping[str, torch.Tensor], limit_bytes: int) -> list[list[str]]:
    """Runs of names in the given order, one dtype each, of no more than `limit_bytes` but for single tensors."""
    buckets: list[list[str]] = []
    num_bytes, dtype = 0, None
    for name in names:
        tensor = tensors[name]
        if not buckets or dtype != tensor.dtype or num_bytes + tensor.nbytes > limit_bytes:
            buckets.append([])
            num_bytes, dtype = 0, tensor.dtype
        buckets[-1].append(name)
        num_bytes += tensor.nbytes
    return buckets

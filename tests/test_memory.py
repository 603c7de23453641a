"""What ranks allocate, counted tensor by tensor: building a rank takes its shards and at most one whole parameter beside them.

The user's model is shared memory that the ranks of this machine read (or it is on the meta device); what a rank makes itself is counted
by a dispatch mode that sees every new storage and its end.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autopar

SLACK_BYTES = 64 * 1024  # batches, masks, the sum of a norm: nothing of the size of a weight


class Allocations(TorchDispatchMode):
    """The bytes of CPU storages that ops have made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_now = self.bytes_peak = self.bytes_largest = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _counts(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._known:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known[address] = size
        self.bytes_now += size
        self.bytes_peak = max(self.bytes_peak, self.bytes_now)
        self.bytes_largest = max(self.bytes_largest, size)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.bytes_now -= self._known.pop(address, 0)


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu" and not isinstance(leaf, torch._subclasses.FakeTensor)

"""Receive buffers: small rings that are filled again and again, without an allocation per transfer.

Design note. A buffer may be filled again after its last use, and that is not known from the schedule alone: autograd
keeps a received activation for as long as it likes, a stage's output may be a view of its input, and autograd may
give a received gradient's memory away (the gradient of a parameter can be a view of the incoming one: torch takes
such a tensor over without a copy). Reusing early gives a right first loss and wrong training. So each receive hands
out a new tensor over the buffer's storage, and a buffer is free exactly when the ring's own tensor is the only one
left on that storage. A buffer that was given away is never free; the ring then makes another. tests/test_buffers.py fills
every buffer with nan when it is handed out, and trains to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from passes.placement import local_shape


class Ring:
    """Buffers of one dtype and shape. It grows to `depth` buffers; beyond that, tensors are made and forgotten."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, *, depth: int) -> None:
        self.dtype, self.shape, self.device = dtype, shape, device
        self._depth, self._next = depth, 0
        self._buffers: list[torch.Tensor] = []
        self._storages: list[tuple[int, int]] = []  # the storage's address, and how many refer to it when it is free

    def take(self) -> torch.Tensor:
        """A tensor to receive into. Its memory is taken again once nothing refers to it."""
        count = len(self._buffers)
        for offset in range(count):
            index = (self._next + offset) % count
            storage, free = self._storages[index]
            if torch._C._storage_Use_Count(storage) <= free:
                self._next = index + 1
                return self._buffers[index].detach()
        buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if count >= self._depth:
            # a buffer that was given away would fill the ring for good
            self._buffers.pop(0)
            self._storages.pop(0)
        storage = buffer.untyped_storage()._cdata
        self._buffers.append(buffer)
        self._storages.append((storage, torch._C._storage_Use_Count(storage)))
        return buffer.detach()

    def __len__(self) -> int:
        return len(self._buffers)


@dataclass(frozen=True)
class Rings:
    """For one step: `received[m][i]` is the ring of the i-th received value of microbatch m, `gradients[m][i]` of the
    i-th sent one's.
    """

    received: list[list[Ring]]
    gradients: list[list[Ring]]


class RingTable:
    """The rings of a stage, by the sizes of a step's microbatches. Those of the last two are kept: training and
    evaluation take turns.
    """

    def __init__(
        self, received: Sequence[str], sent: Sequence[str], mesh: Mapping[str, int], device: torch.device, *, depth: int
    ) -> None:
        self._received, self._sent, self._mesh, self._device, self._depth = received, sent, mesh, device, depth
        self.kept: dict[tuple[int, ...], Rings] = {}

    def of(self, sizes: Sequence[Mapping[str, int]]) -> Rings:
        """The rings for microbatches of these sizes. Microbatches with equal shapes share rings."""
        key = tuple(size for microbatch in sizes for size in microbatch.values())
        rings = self.kept.pop(key, None)
        if rings is None:
            rings = Rings(self._rings(self._received, sizes), self._rings(self._sent, sizes))
            while len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
        self.kept[key] = rings
        return rings

    def _rings(self, types: Sequence[str], sizes: Sequence[Mapping[str, int]]) -> list[list[Ring]]:
        known: dict[tuple[int, ...], list[Ring]] = {}
        for microbatch in sizes:
            numbers = tuple(microbatch.values())
            if numbers not in known:
                shapes = [local_shape(text, dict(microbatch), self._mesh) for text in types]
                known[numbers] = [Ring(dtype, shape, self._device, depth=self._depth) for dtype, shape in shapes]
        return [known[tuple(microbatch.values())] for microbatch in sizes]

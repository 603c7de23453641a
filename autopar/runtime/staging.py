"""Several ranks on one GPU: transfers and collectives over gloo, through pinned host memory.

Design note. NCCL wants a GPU per rank and gloo wants host memory, so values go down to the host, over, and up again. It is slow, and
it makes the whole runtime run where there is one GPU. The host waits for the device in one place only: a value has to have left the
GPU before gloo may send it. What is received goes up on the compute stream without waiting; the pinned memory comes from torch's
caching host allocator, which gives it out again only after the copies that were asked of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.axis import GlooAxis, Pending


class _Arriving:
    """A receive into host memory; when it is waited for, the value goes up."""

    def __init__(self, work: dist.Work, host: torch.Tensor, tensor: torch.Tensor) -> None:
        self._work, self._host, self._tensor = work, host, tensor

    def wait(self) -> None:
        """Until the value is here; its way up is in the stream."""
        self._work.wait()
        self._tensor.copy_(self._host, non_blocking=True)


class _Leaving:
    """A send from host memory, which is kept until then."""

    def __init__(self, work: dist.Work, host: torch.Tensor) -> None:
        self._work, self._host = work, host

    def wait(self) -> None:
        """Until the peer has it."""
        self._work.wait()


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A pinned copy, complete; what is on the host already stays."""
    if tensor.device.type == "cpu":
        return tensor
    host = _host_memory(tensor)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def staged_send(group: Any, tensor: torch.Tensor, peer: int, tag: int) -> _Leaving:
    """Start sending."""
    host = to_host(tensor)
    return _Leaving(group.send([host], peer, tag), host)


def staged_recv(group: Any, tensor: torch.Tensor, peer: int, tag: int) -> _Arriving:
    """Start receiving; `tensor` is written when the work is waited for."""
    host = _host_memory(tensor)
    return _Arriving(group.recv([host], peer, tag), host, tensor)


class StagedAxis(GlooAxis):
    """An axis over gloo whose tensors are on a GPU."""

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return super().all_reduce(to_host(tensor), op).to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_gather(to_host(tensor)).to(tensor.device)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().reduce_scatter(to_host(tensor)).to(tensor.device)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_to_all(to_host(tensor)).to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, source_coord: int) -> torch.Tensor:
        return tensor.copy_(super().broadcast(to_host(tensor), source_coord))

    def start_all_reduce(self, flat: torch.Tensor) -> Pending:
        return _Up(self, super().start_all_reduce(to_host(flat)), flat.device)

    def start_reduce_scatter(self, tensor: torch.Tensor) -> Pending:
        return _Up(self, super().start_reduce_scatter(to_host(tensor)), tensor.device)

    def start_all_gather(self, flat: torch.Tensor, out: torch.Tensor | None = None) -> Pending:
        if flat.device.type == "cpu":
            return super().start_all_gather(flat, out)
        return _Up(self, super().start_all_gather(to_host(flat)), flat.device, out)


class _Up(Pending):
    """A collective of host memory whose result goes up; into `out` if given."""

    def __init__(
        self, axis: StagedAxis, inner: Pending, device: torch.device, out: torch.Tensor | None = None
    ) -> None:
        super().__init__(axis, None, lambda: inner.wait().to(device) if out is None else out.copy_(inner.wait()))
        self._inner = inner

    def advance(self) -> None:
        self._inner.advance()

"""A rank's place in the job: the mesh, its coords, its axes, and the transfers to the other pipeline ranks.

Design note. The same World runs in three places: under torchrun, inside `autopar.launch`, and as a thread of one
process. In all three the process groups are made by hand on a store that belongs to this world alone, rather than
with `new_group`: that works for threads, takes no part in the user's own groups, and lets a rank that fails drop its
sockets, which is how its peers learn of it at once instead of after a timeout.

The mesh is ordered, outermost axis first: {"pp": 2, "tp": 2} puts the tensor-parallel ranks of a stage next to each
other. gloo connects through the loopback device when all ranks are on one machine.

On CUDA there are two ways. One rank per GPU: NCCL, where a wait is a place in the stream and the host goes on. Several
ranks on one GPU, which NCCL refuses: gloo over pinned host memory (`staging.py`).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.agreement import agree_on_plan
from autopar.runtime.axis import GlooAxis, GroupAxis, LocalAxis, TransferFailed
from autopar.runtime.board import BETWEEN_STEPS, BYSTANDER, COMPUTING, FAILED, STOPPED, Board, padded
from autopar.runtime.staging import StagedAxis, staged_recv, staged_send
from costmodel.errors import BadArgument, RankFailed, WorldSizeMismatch

PIPELINE_AXIS = "pp"
TIMEOUT_SECONDS = 300.0
_GRACE_SECONDS = 2.0


def launched() -> bool:
    """True in a process that torchrun or `autopar.launch` has started as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_ranks() -> int:
    """The ranks of the job that this process is of; 1 in a plain process."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node(num_ranks: int) -> int:
    """How many of a job's ranks each node has: LOCAL_WORLD_SIZE, which torchrun and `autopar.launch` set; all of them without it.

    BadArgument if it is no number of ranks that a node of this job could have.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE")
    if given is None:
        return num_ranks
    count = int(given) if given.isdecimal() else 0
    if count < 1 or num_ranks % count:
        raise BadArgument(
            f"LOCAL_WORLD_SIZE = {given!r} in a job of {num_ranks} rank{'s' if num_ranks != 1 else ''}",
            why="nodes have equal numbers of ranks, whose sum is WORLD_SIZE", use="the same --nproc-per-node on every node",
        )  # fmt: skip
    return count


def coords_of(rank: int, mesh: Mapping[str, int]) -> dict[str, int]:
    """A rank's coords, the last axis of the mesh changing fastest."""
    coords = {}
    for name, size in reversed(list(mesh.items())):
        rank, coords[name] = divmod(rank, size)
    return {name: coords[name] for name in mesh}


def mesh_text(mesh: Mapping[str, int]) -> str:
    """`pp=2 x tp=2`"""
    return " x ".join(f"{name}={size}" for name, size in mesh.items()) or "1"


def check_world_size(num_ranks: int, mesh: Mapping[str, int]) -> None:
    """WorldSizeMismatch unless the mesh has exactly `num_ranks` ranks."""
    wanted = math.prod(mesh.values())
    if num_ranks != wanted:
        program = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0].endswith(".py") else "train.py"
        raise WorldSizeMismatch(
            f"{num_ranks} rank{'s were' if num_ranks != 1 else ' was'} launched, but {mesh_text(mesh)} needs {wanted}.",
            use=f"torchrun --nproc-per-node {wanted} {program}, or other degrees",
        )


class World:
    """One rank of a mesh. Made by `from_environment` (processes) or `in_thread`."""

    def __init__(
        self,
        mesh: Mapping[str, int],
        rank: int,
        board: Board,
        store: dist.Store | None,
        *,
        device: torch.device,
        nccl: bool,
        one_machine: bool,
        timeout_seconds: float,
    ) -> None:
        self.mesh, self.rank, self.num_ranks = dict(mesh), rank, math.prod(mesh.values())
        self.coords = coords_of(rank, self.mesh)
        self.device, self.board, self.timeout_seconds = device, board, timeout_seconds
        self.pipeline_rank, self.num_pipeline_ranks = self.coords.get(PIPELINE_AXIS, 0), self.mesh.get(PIPELINE_AXIS, 1)
        self._nccl, self._one_machine, self._closed = nccl, one_machine, False
        self._staged = device.type == "cuda" and not nccl
        self._axes: dict[str, GroupAxis | LocalAxis] = {}
        for index, name in enumerate(self.mesh):
            ranks = self._members(index, rank)
            if len(ranks) == 1:
                self._axes[name] = LocalAxis(name)
                continue
            assert store is not None
            group = self._group(dist.PrefixStore(f"{name}/{ranks[0]}", store), self.coords[name], len(ranks))
            kind = GroupAxis if nccl else StagedAxis if self._staged else GlooAxis
            self._axes[name] = kind(name, self.coords[name], ranks, group, board, index)
        # Transfers between stages. gloo matches by tag: both directions share the axis's connections. NCCL matches by
        # order alone and runs what one pair of ranks does in one group one after the other, so each direction, to
        # higher and to lower pipeline ranks, has a group of its own: its streams run beside the compute's.
        self._down: dist.ProcessGroup | None = None
        self._up: dist.ProcessGroup | None = None
        pipeline = self._axes.get(PIPELINE_AXIS)
        if isinstance(pipeline, GroupAxis):
            self._down = self._up = pipeline.group
            if nccl:
                assert store is not None
                self._down, self._up = (
                    self._group(dist.PrefixStore(f"{way}/{pipeline.ranks[0]}", store), self.pipeline_rank, len(pipeline.ranks))
                    for way in ("down", "up")
                )
        self.peers = tuple(self.rank_of(**{PIPELINE_AXIS: place}) for place in range(self.num_pipeline_ranks))

    @classmethod
    def from_environment(
        cls, mesh: Mapping[str, int], *, device: torch.device | str = "cpu", timeout_seconds: float = TIMEOUT_SECONDS,
        plan: str = "", refusal: str | None = None,
    ) -> World:  # fmt: skip
        """This process's rank, from RANK and WORLD_SIZE; alone if they are not set. WorldSizeMismatch.

        plan: what all ranks must have alike; refusal: why this one has none (BadArgument, on all ranks: see `agreement.py`).

        Initialises torch.distributed's default group if the job has none: state dicts of DTensors need it, and it has
        the store.
        """
        device = torch.device(device)
        if not launched() and not dist.is_initialized():
            check_world_size(1, mesh)
            return cls.in_thread(mesh, 0, None, Board.memory(1), device=device, timeout_seconds=timeout_seconds)
        num_ranks = launched_ranks()
        check_world_size(num_ranks, mesh)
        local_num_ranks = ranks_per_node(num_ranks)
        nccl = device.type == "cuda" and local_num_ranks <= torch.cuda.device_count()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(seconds=timeout_seconds)
            )
        rank = dist.get_rank()
        job_store = dist.distributed_c10d._get_default_store()
        # a job may hold several worlds, one after the other or at once: each rank counts its own
        number = job_store.add(f"autopar/worlds/{rank}", 1)
        store = dist.PrefixStore(f"autopar/{number}", job_store)
        agree_on_plan(store, rank, num_ranks, plan, refusal, timeout_seconds)
        return cls(
            mesh, rank, Board.of_processes(rank, num_ranks, store), store,
            device=device, nccl=nccl, one_machine=local_num_ranks == num_ranks, timeout_seconds=timeout_seconds,
        )  # fmt: skip

    @classmethod
    def in_thread(
        cls,
        mesh: Mapping[str, int],
        rank: int,
        store: dist.Store | None,
        memory: bytearray,
        *,
        device: torch.device | str = "cpu",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> World:
        """One rank of several that are threads of this process: they share a HashStore and the board's memory."""
        board = Board(rank, math.prod(mesh.values()), memory)
        return cls(
            mesh, rank, board, store,
            device=torch.device(device), nccl=False, one_machine=True, timeout_seconds=timeout_seconds,
        )  # fmt: skip

    def _group(self, store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
        timeout = timedelta(seconds=self.timeout_seconds)
        if self._nccl:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(store, rank, size, options)  # type: ignore[return-value]
        gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        if self._one_machine:
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            gloo._devices = [dist.ProcessGroupGloo.create_default_device()]
        gloo._timeout, gloo._threads = timeout, 1
        return dist.ProcessGroupGloo(store, rank, size, gloo)  # type: ignore[return-value]

    # ---- places -------------------------------------------------------------------------------------------------

    def axis(self, name: str) -> GroupAxis | LocalAxis:
        """The mesh axis `name` as this rank sees it; an axis the mesh does not have is one of size 1."""
        return self._axes.get(name) or LocalAxis(name)

    def rank_of(self, **coords: int) -> int:
        """The rank at these coords; axes that are not named are this rank's own."""
        rank = 0
        for name, size in self.mesh.items():
            coord = coords.get(name, self.coords[name])
            if not 0 <= coord < size:
                raise BadArgument(f"There is no coord {coord} on axis {name} of size {size}.")
            rank = rank * size + coord
        return rank

    def _members(self, index: int, rank: int) -> tuple[int, ...]:
        """The ranks of the collective over axis `index` of the mesh that `rank` is in."""
        sizes = list(self.mesh.values())
        stride = math.prod(sizes[index + 1 :])
        first = rank - rank // stride % sizes[index] * stride
        return tuple(first + coord * stride for coord in range(sizes[index]))

    def __repr__(self) -> str:
        return self.name_of(self.rank)

    def name_of(self, rank: int) -> str:
        """`rank 1 (pp 0, tp 1)`"""
        coords = coords_of(rank, self.mesh)
        return (
            f"rank {rank} ({', '.join(f'{name} {coord}' for name, coord in coords.items())})"
            if coords
            else f"rank {rank}"
        )

    # ---- transfers between pipeline ranks ---------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Start sending a contiguous tensor to pipeline rank `peer` (at this rank's other coords). See `wait`."""
        group = self._down if peer > self.pipeline_rank else self._up
        try:
            if self._staged:
                return staged_send(group, tensor, peer, tag)
            return group.send([tensor], peer, tag)  # type: ignore[union-attr]
        except (RuntimeError, AttributeError) as error:
            raise self._not_started(group, peer, error) from None

    def recv(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Start receiving into `tensor` from pipeline rank `peer`. See `wait`."""
        group = self._down if peer < self.pipeline_rank else self._up
        try:
            if self._staged:
                return staged_recv(group, tensor, peer, tag)
            return group.recv([tensor], peer, tag)  # type: ignore[union-attr]
        except (RuntimeError, AttributeError) as error:
            raise self._not_started(group, peer, error) from None

    def _not_started(self, group: Any, peer: int, error: Exception) -> TransferFailed:
        """The peer is gone already; or this world is closed."""
        return TransferFailed("the connections are closed" if group is None else str(error), (self.peers[peer],))

    def wait(self, work: Any, peer: int) -> None:
        """Wait for a transfer with pipeline rank `peer` (NCCL: make the stream wait). TransferFailed if that rank is gone
        or late.
        """
        wait_for = self.board.wait_for
        wait_for(self.peers[peer])
        try:
            work.wait()
        except RuntimeError as error:
            raise TransferFailed(str(error), (self.peers[peer],)) from None
        wait_for(COMPUTING)

    # ---- the end ------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """This rank raised: tell the others where and what, and let go of the connections."""
        lines = str(error).strip().splitlines()
        where = self.board.showing() or "before its first step"
        what = f"failed {'in ' if '(' in where else ''}{where}: {type(error).__name__}: {lines[0] if lines else ''}"
        self.board.leave(FAILED, what)
        self._let_go()

    def lost(self, suspects: Sequence[int], reason: str) -> RankFailed:
        """Contact with the suspects is lost: find out who is to blame, let go of the connections, return the error to
        raise.
        """
        waiting = self.board.showing() or "its start"
        missed = ", ".join(self.name_of(rank) for rank in suspects)
        culprit = self.board.culprit(suspects, self._members, grace_seconds=_GRACE_SECONDS)
        self.board.leave(BYSTANDER)
        self._let_go()
        reason = re.sub(r"^\[[^]]*\] *", "", reason.strip().split("\n")[0]).split(". ")[
            0
        ]  # gloo's file and line, and advice
        return RankFailed(
            f"{self.name_of(culprit.rank)} {culprit.what}",
            where=f"{self}, in {waiting}, waiting for {missed}",
            why=reason or None,
        )

    def rest(self) -> None:
        """Between steps: what the board shows if this rank dies now."""
        self.board.show(_RESTING)

    def close(self) -> None:
        """The normal end."""
        if not self._closed:
            self.board.leave(STOPPED)
            self._let_go()

    @property
    def closed(self) -> bool:
        """True after the end or a failure."""
        return self._closed

    def _let_go(self) -> None:
        self._closed = True
        self._down = self._up = None
        for axis in self._axes.values():
            axis.close()


_RESTING = padded(BETWEEN_STEPS)

"""All ranks of a job as threads of one process: the default in a plain process or notebook.

Design note. The threads run the same programs through the same Worker as processes do, over real gloo groups that
meet on a store in this process's memory. They live from the first step to `close`, or to the end of the interpreter.
Each thread takes over the main thread's number of intra-op threads (a setting per thread in torch), because another
number may round otherwise; autograd's own threads are switched off, so that a rank's backward runs on its thread also
on a GPU. A job of one rank runs on the caller's thread.

When a rank raises, it drops its connections, the others raise RankFailed in consequence, and the caller gets one
RankFailed with the first error as its cause (an AutoparError is raised as it is). The next step starts new threads.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autopar.program import Program
from autopar.runtime.batch import BatchTypes
from autopar.runtime.board import Board
from autopar.runtime.compiled import Compile
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.record import RankRecord
from autopar.runtime.scaling import LossScale
from autopar.runtime.worker import Interrupted, Worker
from autopar.runtime.world import TIMEOUT_SECONDS, World, check_world_size, coords_of
from costmodel.errors import AutoparError, RankFailed
from costmodel.mesh import REPLICA_AXIS

_ENDING_SECONDS = 10.0


@dataclass(frozen=True)
class _Job:
    """What a rank thread is made from."""

    program: Program
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    rank: int
    mesh: Mapping[str, int]
    store: dist.Store
    memory: bytearray
    device: torch.device
    seed: int
    timeout_seconds: float
    compile: Compile
    held: HeldGradients | None
    loss_scale: LossScale | None

    def worker(self) -> Worker:
        world = World.in_thread(
            self.mesh, self.rank, self.store, self.memory, device=self.device, timeout_seconds=self.timeout_seconds
        )
        try:
            return Worker(
                self.program, world, self.parameters, self.buffers, seed=self.seed, compile=self.compile, joins_replicas=True,
                held=self.held, loss_scale=self.loss_scale,
            )  # fmt: skip
        except BaseException as error:
            world.failed(error)  # the others do not wait for this rank
            raise


class _Rank:
    """A rank thread's two ends of conversation. The thread knows this object and not the ThreadRanks, which may so be
    collected.
    """

    def __init__(self, job: _Job, results: queue.SimpleQueue[tuple[int, Any, BaseException | None]]) -> None:
        self.job, self.results = job, results
        self.orders: queue.SimpleQueue[tuple[str, Any, dict[str, Any], int, bool] | None] = queue.SimpleQueue()
        self.worker: Worker | None = None
        self.thread = threading.Thread(target=self._run, name=f"autopar rank {job.rank}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        torch.autograd.set_multithreading_enabled(False)
        if self.job.device.type == "cuda":
            torch.cuda.set_device(self.job.device)
        while (order := self.orders.get()) is not None:
            method, argument, options, num_threads, training = order
            result, failure = None, None
            try:
                if torch.get_num_threads() != num_threads:
                    torch.set_num_threads(num_threads)
                if self.worker is None:
                    self.worker = self.job.worker()
                self.worker.train(training)
                result = getattr(self.worker, method)(argument, **options)
            except BaseException as error:
                failure = error
            del order, argument
            self.results.put((self.job.rank, result, failure))
            del result, failure
        if self.worker is not None:
            self.worker.world.close()
            self.worker = None


def _end(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        rank.orders.put(None)
    for rank in ranks:
        rank.thread.join(_ENDING_SECONDS)


class ThreadRanks:
    """Rank threads for `programs`, one per rank of the mesh, each with its own local parameters and buffers.

    `step(batch)` leaves gradients in the parameters' `.grad` and returns the loss; `forward(batch)` returns each
    rank's outputs. The batch is that of all replicas: its rows are split over them, 10 over 4 as 3, 3, 2, 2.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        parameters_per_rank: Sequence[Mapping[str, torch.Tensor]],
        buffers_per_rank: Sequence[Mapping[str, torch.Tensor]],
        mesh: Mapping[str, int],
        microbatches: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        timeout_seconds: float = TIMEOUT_SECONDS,
        compile: Compile = False,
        held_per_rank: Sequence[HeldGradients] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        check_world_size(len(programs), mesh)
        self.mesh, self.num_ranks = dict(mesh), len(programs)
        self._state = list(zip(programs, parameters_per_rank, buffers_per_rank, strict=True))
        self._device, self._seed, self._timeout_seconds = torch.device(device), seed, timeout_seconds
        self._compile: Compile = compile
        self._held = held_per_rank if held_per_rank is not None else [None] * len(programs)
        self._loss_scale = loss_scale
        self._batch_types = BatchTypes(programs[0].batch, microbatches, tuple(mesh))
        self._training = True
        self._ranks: list[_Rank] = []
        self._alone: Worker | None = None
        self._results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._end: weakref.finalize[Any, Any] | None = None

    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool = False) -> torch.Tensor:
        """Forward and backward on all ranks; the loss of the whole batch."""
        return self._each("step", batch, accumulate=accumulate)[0]

    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[RankRecord]]:
        """`step`, and every rank's record of it."""
        results = self._each("profile", batch)
        return results[0][0], [record for _, record in results]

    def forward(self, batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Forward only; the outputs that each rank holds, by rank."""
        return self._each("forward", batch)

    @property
    def workers(self) -> list[Worker]:
        """Those of the ranks that have run."""
        return [worker for worker in (self._alone, *(rank.worker for rank in self._ranks)) if worker is not None]

    def train(self, mode: bool = True) -> None:
        """Whether dropout and the like are on."""
        self._training = mode

    def close(self) -> None:
        """End the threads. A later step starts new ones."""
        self._alone = None
        if self._end is not None:
            self._end()
            self._end, self._ranks = None, []

    def _jobs(self) -> list[_Job]:
        store, memory = dist.HashStore(), Board.memory(self.num_ranks)
        return [self._job(rank, store, memory) for rank in range(self.num_ranks)]

    def _job(self, rank: int, store: dist.Store, memory: bytearray) -> _Job:
        return _Job(
            *self._state[rank], rank, self.mesh, store, memory,
            self._device, self._seed, self._timeout_seconds, self._compile, self._held[rank], self._loss_scale,
        )  # fmt: skip

    def _each(self, method: str, batch: Mapping[str, torch.Tensor], **options: Any) -> list[Any]:
        batches = self._batch_types.over_replicas(batch, self.mesh.get(REPLICA_AXIS, 1))
        for each in batches:
            self._batch_types.layout(each)  # BadArgument here, before a rank knows of it
        if self.num_ranks == 1:
            return [self._on_this_thread(method, batch, options)]
        if not self._ranks:
            self._results = queue.SimpleQueue()
            self._ranks = [_Rank(job, self._results) for job in self._jobs()]
            self._end = weakref.finalize(self, _end, self._ranks)
        num_threads = torch.get_num_threads()
        for number, rank in enumerate(self._ranks):
            replica = coords_of(number, self.mesh).get(REPLICA_AXIS, 0)
            rank.orders.put((method, batches[replica], options, num_threads, self._training))
        results: list[Any] = [None] * self.num_ranks
        failures: dict[int, BaseException] = {}
        try:
            for _ in range(self.num_ranks):
                # once one has failed the others learn of it at once; whoever does not is left behind
                wait = self._timeout_seconds + _ENDING_SECONDS if failures else None
                rank_number, results[rank_number], failure = self._results.get(timeout=wait)
                if failure is not None:
                    failures[rank_number] = failure
        except queue.Empty:
            pass
        except BaseException:
            self._stop()
            raise
        if failures:
            self._stop()
            for held in self._held:  # a rank may have been through with its step
                if held is not None and held.unsummed:
                    held.clear()
            self._raise(failures)
        return results

    def _on_this_thread(self, method: str, batch: Mapping[str, torch.Tensor], options: dict[str, Any]) -> Any:
        if self._alone is None or self._alone.world.closed:
            self._alone = self._jobs()[0].worker()
        self._alone.train(self._training)
        return getattr(self._alone, method)(batch, **options)

    def _stop(self) -> None:
        for rank in self._ranks:
            if rank.worker is not None:
                rank.worker.world.board.stop = True
        self.close()

    def _raise(self, failures: dict[int, BaseException]) -> None:
        """The error that started it: the first that is not the consequence of another's."""
        own = {rank: error for rank, error in failures.items() if not isinstance(error, (RankFailed, Interrupted))}
        if not own:
            raise next(iter(failures.values()))
        rank, error = next(iter(own.items()))
        if isinstance(error, AutoparError):
            raise error
        told = [failure.what for failure in failures.values() if isinstance(failure, RankFailed)]
        what = told[0] if told else f"rank {rank} failed: {type(error).__name__}: {error}"
        raise RankFailed(what, use="the error above for where in the program") from error

"""What one rank did in one step, and when: for `profile_step`.

Design note. The worker keeps times of its instructions while `worker.record` is a list, and none otherwise. Collectives inside of
an instruction tell the board that they wait, for its own purposes; for the recorded step that call is replaced by one that
keeps the time too. On CUDA each time waits for the device, so that it says when the work was done and not when it was asked for:
a recorded step there is a little slower than others.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from autopar.runtime.board import COMPUTING

if TYPE_CHECKING:
    from autopar.runtime.worker import Worker
    from autopar.runtime.world import World


@dataclass(frozen=True)
class RankRecord:
    """Times are seconds of this machine's clock (`time.perf_counter`, which the processes of one machine share).

    `actions`: an instruction as it prints, its start and its end. Adjacent sends go by the first of them. A receive is there where it is
    waited for, and before that where it is posted unless that is beside a send. `collectives`: start and end.
    """

    rank: int
    host: str
    begin: float
    end: float
    actions: tuple[tuple[str, float, float], ...]
    collectives: tuple[tuple[float, float], ...]

    def moved(self, seconds: float) -> RankRecord:
        """The same on a clock that is `seconds` ahead."""
        return RankRecord(
            self.rank, self.host, self.begin + seconds, self.end + seconds,
            tuple((text, start + seconds, end + seconds) for text, start, end in self.actions),
            tuple((start + seconds, end + seconds) for start, end in self.collectives),
        )  # fmt: skip


def meet(world: World) -> None:
    """Wait for all ranks: along every axis of the mesh, one after the other."""
    for axis in world.mesh:
        world.axis(axis).all_reduce(torch.zeros(1, device=world.device))


def recorded_step(worker: Worker, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, RankRecord]:
    """`worker.step(batch)`, and what it did when. Right after `meet`."""
    world = worker.world
    board = world.board
    collectives: list[tuple[float, float]] = []
    began: list[float] = []
    tell = board.wait_for

    def clock() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return time.perf_counter()

    class Actions(list[tuple[str, float, float]]):
        """Takes an action's end when the device is done with it."""

        def append(self, action: tuple[str, float, float]) -> None:
            super().append((*action[:2], clock()))

    def wait_for(rank: int) -> None:
        if rank < COMPUTING:
            began.append(clock())
        elif rank == COMPUTING and began:
            collectives.append((began.pop(), clock()))
        tell(rank)

    actions = Actions() if world.device.type == "cuda" else []
    board.wait_for = wait_for  # type: ignore[method-assign]
    worker.record = actions
    begin = time.perf_counter()
    try:
        loss = worker.step(batch)
        end = clock()
    finally:
        worker.record = None
        del board.wait_for  # the class's own again
    return loss, RankRecord(world.rank, socket.gethostname(), begin, end, tuple(actions), tuple(collectives))


def on_one_clock(records: Sequence[RankRecord]) -> list[RankRecord]:
    """The records of all ranks as one clock would have them: ranks of other machines than the first's begin together."""
    first = records[0]
    return [one if one.host == first.host else one.moved(first.begin - one.begin) for one in records]

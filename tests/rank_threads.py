"""Ranks of one mesh axis as threads of this process over real gloo groups, made once and shared by the tests that
need collectives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.board import Board
from autopar.runtime.world import World

_TIMEOUT_SECONDS = 120.0


class RankThreads:
    """`run(function)` calls function(axis) on every rank at once; the results in order of coords. The first error of
    a rank is raised."""

    def __init__(self, size: int) -> None:
        self.size = size
        store, memory = dist.HashStore(), Board.memory(size)
        self._orders: list[queue.SimpleQueue[Callable[..., Any]]] = [queue.SimpleQueue() for _ in range(size)]
        self._results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        for rank in range(size):
            threading.Thread(target=self._live, args=(rank, store, memory), daemon=True).start()

    def _live(self, rank: int, store: dist.Store, memory: bytearray) -> None:
        torch.autograd.set_multithreading_enabled(False)
        torch.set_num_threads(1)
        world = World.in_thread({"tp": self.size}, rank, store, memory, timeout_seconds=_TIMEOUT_SECONDS)
        while True:
            function = self._orders[rank].get()
            try:
                result, failure = function(world.axis("tp")), None
            except Exception as error:
                result, failure = None, error
            self._results.put((rank, result, failure))

    def run(self, function: Callable[..., Any]) -> list[Any]:
        for orders in self._orders:
            orders.put(function)
        found = sorted((self._results.get() for _ in range(self.size)), key=lambda item: item[0])
        for _, _, failure in found:
            if failure is not None:
                raise failure
        return [result for _, result, _ in found]


@cache
def rank_threads(size: int) -> RankThreads:
    """The ranks of an axis of `size`."""
    return RankThreads(size)

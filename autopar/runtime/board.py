"""The board: what every rank is doing right now, where the others can read it after it has died.

Design note. When a peer is lost a rank sees no more than a closed socket or a timeout, often of a rank that only
waited for the guilty one itself. So each rank writes its current instruction into a slot of memory that the ranks of
one machine share: one slice assignment per instruction, no system call. For processes the memory is a mapped file
that has lost its name, and the rank holds a lock on one byte of it, which the kernel drops when the process dies,
however it dies. For rank threads it is a bytearray. Between machines the one who finds a culprit leaves a note in the
store.

`culprit` answers, in this order: a rank that raised; a rank that died; after a timeout the rank at the end of the
chain of ranks that wait for each other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

ABSENT, RUNNING, FAILED, BYSTANDER, STOPPED = range(5)
COMPUTING = -1
BETWEEN_STEPS = "between steps"
_TEXT_BYTES, _NUMBERS = 240, 2
_SLOT_BYTES = 8 * _NUMBERS + _TEXT_BYTES
_NOTE = "failed"


class Culprit(NamedTuple):
    """The rank to blame and what became of it, as the rest of a sentence: 'died in Backward(3)'."""

    rank: int
    what: str


def padded(text: str) -> bytes:
    """A slot's text: made once per instruction, so that showing it is one copy."""
    return text.encode()[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES, b"\0")


class Board:
    """One rank's view: it writes its own slot and reads all. `stop` is set by whoever wants this rank's step to end
    early.
    """

    def __init__(
        self, rank: int, num_ranks: int, memory: Any, *, file: int | None = None, store: dist.Store | None = None
    ) -> None:
        self.rank, self.num_ranks, self.stop = rank, num_ranks, False
        self._file, self._store = file, store
        self._memory = memoryview(memory)
        self._numbers = self._memory.cast("q")
        self._state = rank * _SLOT_BYTES // 8
        self._waiting = self._state + 1
        start = rank * _SLOT_BYTES + 8 * _NUMBERS
        self._text = slice(start, start + _TEXT_BYTES)
        self._numbers[self._waiting] = COMPUTING
        self._numbers[self._state] = RUNNING

    @staticmethod
    def memory(num_ranks: int) -> bytearray:
        """Shared memory for ranks that are threads."""
        return bytearray(num_ranks * _SLOT_BYTES)

    @classmethod
    def of_processes(cls, rank: int, num_ranks: int, store: dist.Store) -> Board:
        """The board of this machine's ranks. The first to come makes the file, and removes its name when all have
        opened it.
        """
        machine = f"board/{socket.gethostname()}"
        path = None
        if store.add(f"{machine}/comers", 1) == 1:
            handle, path = tempfile.mkstemp(prefix="autopar-board-")
            os.truncate(handle, num_ranks * _SLOT_BYTES)
            store.set(f"{machine}/path", path)
        else:
            handle = os.open(store.get(f"{machine}/path").decode(), os.O_RDWR)
        fcntl.lockf(handle, fcntl.LOCK_EX, 1, rank)
        board = cls(rank, num_ranks, mmap.mmap(handle, num_ranks * _SLOT_BYTES), file=handle, store=store)
        if store.add("board/opened", 1) == num_ranks:
            store.set("board/ready", "")
        if path is not None:
            try:
                store.wait(["board/ready"])
            finally:
                os.unlink(path)
        return board

    # ---- this rank ----------------------------------------------------------------------------------------------

    def show(self, text: bytes) -> None:
        """Publish the current instruction (`padded`)."""
        self._memory[self._text] = text

    def wait_for(self, rank: int) -> None:
        """Publish that this rank now waits for `rank`; for a collective over axis i of the mesh, -2 - i; COMPUTING when
        done.
        """
        self._numbers[self._waiting] = rank

    def leave(self, state: int, text: str = "") -> None:
        """Publish how this rank ended: FAILED with a text, BYSTANDER of another's failure, or STOPPED."""
        if text:
            self._memory[self._text] = padded(text)
        self._numbers[self._state] = state

    def showing(self, rank: int | None = None) -> str:
        """The text in a rank's slot."""
        start = (self.rank if rank is None else rank) * _SLOT_BYTES + 8 * _NUMBERS
        return bytes(self._memory[start : start + _TEXT_BYTES]).rstrip(b"\0").decode(errors="replace")

    def _place(self, rank: int) -> str:
        text = self.showing(rank) or "before its first step"
        return f"in {text}" if "(" in text else text

    # ---- the others ---------------------------------------------------------------------------------------------

    def _number(self, rank: int, offset: int) -> int:
        return self._numbers[rank * _SLOT_BYTES // 8 + offset]

    def _dead(self, rank: int) -> bool:
        if self._file is None or rank == self.rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _seen(self) -> Culprit | None:
        """A rank that raised or died. Its slot still shows where."""
        states = [self._number(rank, 0) for rank in range(self.num_ranks)]
        for rank, state in enumerate(states):
            if state == FAILED:
                return Culprit(rank, self.showing(rank))
        for rank, state in enumerate(states):
            if state == RUNNING and self._dead(rank):
                return Culprit(rank, f"died {self._place(rank)}")
        for rank, state in enumerate(states):
            if state == STOPPED:
                return Culprit(rank, f"had ended {self._place(rank)}")
        return None

    def _noted(self) -> Culprit | None:
        """What a rank of another machine has found."""
        try:
            if self._store is None or not self._store.check([_NOTE]):
                return None
            rank, what = self._store.get(_NOTE).decode().split(" ", 1)
        except (RuntimeError, dist.DistError):  # the store lives in a process that may have died as well
            return None
        return Culprit(int(rank), what)

    def note(self, culprit: Culprit) -> None:
        """Tell the ranks of other machines."""
        if self._store is not None:
            try:
                self._store.set(_NOTE, f"{culprit.rank} {culprit.what}")
            except (RuntimeError, dist.DistError):
                return

    def culprit(
        self, suspects: Sequence[int], members: Callable[[int, int], Sequence[int]], *, grace_seconds: float
    ) -> Culprit:
        """Who is to blame for losing contact with `suspects`. `members(axis, rank)` are the ranks of a collective."""
        deadline = time.monotonic() + grace_seconds
        while True:
            found = self._seen() or self._noted()
            if found is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if found is None:
            found = self._stalled(suspects, members)
        self.note(found)
        return found

    def _stalled(self, suspects: Sequence[int], members: Callable[[int, int], Sequence[int]]) -> Culprit:
        seen = {self.rank}
        queue = [rank for rank in suspects if rank not in seen]
        last = queue[0] if queue else self.rank
        while queue:
            last = queue.pop(0)
            seen.add(last)
            waits = self._number(last, 1)
            if self._number(last, 0) == ABSENT or waits == COMPUTING:
                break
            queue += [rank for rank in ([waits] if waits >= 0 else members(-2 - waits, last)) if rank not in seen]
        return Culprit(last, f"does not answer; it is {self._place(last)}")

"""The transfers of one rank: receives posted ahead, adjacent transfers in one go, sends waited for late.

Design note. When it is made, a schedule's transfers become records: everything a table can hold is looked up once. Adjacent transfers
are one run: its sends are started, then its receives are waited for.

Receives are posted ahead: the first of every peer when the step begins, each further one as soon as the one before it has come, which is
before the compute that uses it. So a sender finds its receive posted and the transfer goes on beside the compute. Per peer they are
posted in the order of the schedule, which is the order of the peer's sends: NCCL matches by order alone, activations and gradients of
all stages of two ranks together. gloo matches by tag; there the tag says which stages and which microbatch (modulo `_WINDOW`, far
more than are ever under way).

A send is waited for when `MOST_SENDS` more have been started since, and at the end of the step. The order pass proves the schedule
for sends that wait where they stand; waiting later only waits less. On CUDA with NCCL, waiting makes the stream wait, not the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from autopar.runtime.board import padded
from autopar.runtime.chunk import Chunk
from autopar.runtime.world import World
from costmodel.errors import BadPlan
from passes.instructions import (
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
)

TRANSFERS = (RecvActivation, RecvGradient, SendActivation, SendGradient)
RECEIVES = (RecvActivation, RecvGradient)
_TENSORS_PER_TRANSFER = 256  # room in a tag
_WINDOW = 64  # microbatches that a tag tells apart
MOST_SENDS = 4


class _Transfer:
    """A transfer instruction on this rank. `places` are in RECEIVES or SENDS of the chunk, in the order they are sent."""

    __slots__ = ("chunk", "gradient", "last", "microbatch", "peer", "places", "queue", "slots", "tag", "text")

    def __init__(self, instruction: Any, text: bytes, chunk: Chunk, peer: int, num_stages: int) -> None:
        self.text, self.chunk, self.peer, self.microbatch = text, chunk, peer, instruction.microbatch
        self.gradient = isinstance(instruction, (RecvGradient, SendGradient))
        receives = isinstance(instruction, RECEIVES)
        stage = instruction.source if receives else instruction.to
        self.slots: list[int] = []
        if isinstance(instruction, RecvActivation):
            self.places = chunk.activations_from(stage)
        elif isinstance(instruction, SendGradient):
            self.places = chunk.gradients_to(stage)
        elif isinstance(instruction, SendActivation):
            self.places = chunk.activations_to(stage)
        else:
            pairs = chunk.gradients_from(stage)
            self.places, self.slots = [place for place, _ in pairs], [slot for _, slot in pairs]
        if len(self.places) >= _TENSORS_PER_TRANSFER:
            raise BadPlan(
                f"{instruction!r} would move {len(self.places)} tensors; at most {_TENSORS_PER_TRANSFER - 1} can be."
            )
        source, to = (stage, chunk.number) if receives else (chunk.number, stage)
        kind = (self.microbatch % _WINDOW * num_stages + source) * num_stages + to
        self.tag = kind * _TENSORS_PER_TRANSFER
        self.last = False  # the last of its kind for its microbatch and chunk: what it sends may be dropped
        self.queue: _Queue | None = None


class _Queue:
    """The receives from one peer in their order, and how many of them were posted and have come in this step."""

    __slots__ = ("done", "posted", "transfers")

    def __init__(self) -> None:
        self.transfers: list[_Transfer] = []
        self.posted = self.done = 0


class Run:
    """Adjacent transfers."""

    __slots__ = ("receives", "sends")

    def __init__(self) -> None:
        self.receives: list[_Transfer] = []
        self.sends: list[_Transfer] = []


class Line:
    """The transfers of one schedule: its runs, in order, and the queue of each peer."""

    def __init__(self) -> None:
        self.queues: dict[int, _Queue] = {}

    def start(self) -> None:
        """A new step."""
        for queue in self.queues.values():
            queue.posted = queue.done = 0


class Transfers:
    """Runs a rank's transfers. `chunks` are its stages by chunk; `stage_ranks` the pipeline rank of every stage."""

    def __init__(self, world: World, chunks: Sequence[Chunk], stage_ranks: Sequence[int]) -> None:
        self._world, self._chunks, self._stage_ranks = world, chunks, stage_ranks
        self._sent: deque[tuple[list[Any], list[torch.Tensor], _Transfer]] = deque()
        self._coming: dict[_Transfer, tuple[list[Any], list[torch.Tensor]]] = {}

    def compile(self, schedule: Sequence[Instruction]) -> tuple[Line, dict[int, Run]]:
        """The runs of a schedule, by the place of their first instruction."""
        line, runs = Line(), {}
        last: dict[tuple[type, int, int], _Transfer] = {}
        run: Run | None = None
        for index, instruction in enumerate(schedule):
            if not isinstance(instruction, TRANSFERS):
                run = None
                continue
            if run is None:
                run = runs[index] = Run()
            transfer = self._transfer_of(instruction)
            if isinstance(instruction, RECEIVES):
                run.receives.append(transfer)
                transfer.queue = line.queues.setdefault(transfer.peer, _Queue())
                transfer.queue.transfers.append(transfer)
            else:
                run.sends.append(transfer)
                last[type(instruction), instruction.microbatch, instruction.chunk] = transfer
        for transfer in last.values():
            transfer.last = True
        return line, runs

    def _transfer_of(self, instruction: Any) -> _Transfer:
        stage = instruction.source if isinstance(instruction, RECEIVES) else instruction.to
        peer = self._stage_ranks[stage]
        if peer == self._world.pipeline_rank:
            raise BadPlan(f"{instruction!r} is between two stages of one rank, which hand values over without transfers.")
        text, chunk = padded(repr(instruction)), self._chunks[instruction.chunk]
        return _Transfer(instruction, text, chunk, peer, len(self._stage_ranks))

    # ---- a step ---------------------------------------------------------------------------------------------------

    def start(self, line: Line) -> None:
        """Post the first receive of every peer."""
        line.start()
        for queue in line.queues.values():
            self._post_next(queue)

    def _post_next(self, queue: _Queue) -> None:
        """Post the next receive of a peer, if there is one."""
        number = queue.posted
        if number == len(queue.transfers):
            return
        transfer = queue.transfers[number]
        queue.posted = number + 1
        rings = transfer.chunk.rings
        assert rings is not None
        of_values = (rings.gradients if transfer.gradient else rings.received)[transfer.microbatch]
        recv, peer, tag = self._world.recv, transfer.peer, transfer.tag
        works, tensors = [], []
        for place in transfer.places:
            tensor = of_values[place].take()
            works.append(recv(tensor, peer, tag))
            tensors.append(tensor)
            tag += 1
        self._coming[transfer] = works, tensors

    def run(self, run: Run) -> None:
        """Start a run's sends, wait for its receives, and post the ones that follow those."""
        for transfer in run.sends:
            self._send(transfer)
        while len(self._sent) > MOST_SENDS:
            self._finish_send()
        for transfer in run.receives:
            self._receive(transfer)

    def _send(self, transfer: _Transfer) -> None:
        flight = transfer.chunk.flight(transfer.microbatch)
        source: Sequence[torch.Tensor | None] = flight.input_gradients if transfer.gradient else flight.outputs
        send, peer, tag = self._world.send, transfer.peer, transfer.tag
        works, tensors = [], []
        for place in transfer.places:
            tensor = source[place].detach().contiguous()  # type: ignore[union-attr]
            works.append(send(tensor, peer, tag))
            tensors.append(tensor)
            tag += 1
        self._sent.append((works, tensors, transfer))
        if transfer.last:
            if transfer.gradient:
                flight.input_gradients = []
            else:
                flight.outputs = ()

    def _receive(self, transfer: _Transfer) -> None:
        queue, coming = transfer.queue, self._coming
        assert queue is not None
        while transfer not in coming:
            self._post_next(queue)
        works, tensors = coming[transfer]
        self._wait(works, transfer)
        del coming[transfer]
        queue.done += 1
        if queue.posted == queue.done:
            self._post_next(queue)
        flight = transfer.chunk.flight(transfer.microbatch)
        if transfer.gradient:
            for slot, tensor in zip(transfer.slots, tensors, strict=True):
                flight.gradients[slot] = tensor
        else:
            for place, tensor in zip(transfer.places, tensors, strict=True):
                flight.arguments[place] = tensor

    def _wait(self, works: Sequence[Any], transfer: _Transfer) -> None:
        world = self._world
        world.board.show(transfer.text)
        for work in works:
            world.wait(work, transfer.peer)

    def _finish_send(self) -> None:
        works, _, transfer = self._sent.popleft()
        self._wait(works, transfer)

    def finish_sends(self) -> None:
        """Wait for all that was sent."""
        while self._sent:
            self._finish_send()

    def drop(self) -> None:
        """Forget everything of this step."""
        self._sent.clear()
        self._coming.clear()

"""The transfers of one rank: receives posted ahead and waited for at their use, sends waited for late.

Design note. When it is made, a schedule's transfers become records: everything a table can hold is looked up once. Adjacent transfers
are one run: its receives are posted and its sends started.

A receive is waited for by the compute that needs it (`waits`), which may stand many computes later. Receives are posted one ahead of
the schedule: the first of every peer when the step begins, and with each run its own and the next one of their peers. So a sender
finds its receive posted and the transfer goes on beside the compute; and how many receives are under way follows from the list
alone. Per peer they are posted in the order of the schedule, which is the order of the peer's sends: NCCL matches by order alone,
activations and gradients of all stages of two ranks together. gloo matches by tag; there the tag says which stages and which
microbatch (modulo `_WINDOW`, far more than are ever under way).

A send is waited for when `MOST_SENDS` more have been started since, and at the end of the step. The schedule is proved for transfers
that are waited for where they stand; waiting later only waits less. On CUDA with NCCL, waiting makes the stream wait, not the host.
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
    Backward,
    BackwardInput,
    Forward,
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

    __slots__ = ("chunk", "gradient", "last", "microbatch", "peer", "places", "slots", "tag", "text")

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


class _Queue:
    """The receives from one peer in their order, and how many of them were posted in this step."""

    __slots__ = ("posted", "transfers")

    def __init__(self) -> None:
        self.transfers: list[_Transfer] = []
        self.posted = 0


class Run:
    """Adjacent transfers: the sends, and up to where the queues of receives are posted then. `text` is the board's."""

    __slots__ = ("posts", "sends", "text")

    def __init__(self) -> None:
        self.posts: dict[_Queue, int] = {}
        self.sends: list[_Transfer] = []
        self.text = b""


class Line:
    """The transfers of one schedule: its runs by the place of their first instruction, the receives that are waited for
    before the instruction at a place, and the queue of each peer.
    """

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self.waits: dict[int, list[_Transfer]] = {}
        self.queues: dict[int, _Queue] = {}


class Transfers:
    """Runs a rank's transfers. `chunks` are its stages by chunk; `stage_ranks` the pipeline rank of every stage."""

    def __init__(self, world: World, chunks: Sequence[Chunk], stage_ranks: Sequence[int]) -> None:
        self._world, self._chunks, self._stage_ranks = world, chunks, stage_ranks
        self._sent: deque[tuple[list[Any], list[torch.Tensor], _Transfer]] = deque()
        self._coming: dict[_Transfer, tuple[list[Any], list[torch.Tensor]]] = {}

    def compile(self, schedule: Sequence[Instruction]) -> Line:
        """The transfers of a schedule. BadPlan for a receive that no later compute needs."""
        line = Line()
        last: dict[tuple[type, int, int], _Transfer] = {}
        coming: dict[tuple[int, int, bool], list[_Transfer]] = {}  # by chunk, microbatch, gradients or not
        run: Run | None = None
        for index, instruction in enumerate(schedule):
            if not isinstance(instruction, TRANSFERS):
                run = None
                if isinstance(instruction, (Forward, Backward, BackwardInput)):
                    key = instruction.chunk, instruction.microbatch, not isinstance(instruction, Forward)
                    line.waits[index] = coming.pop(key, [])
                continue
            transfer = self._transfer_of(instruction)
            if run is None:
                run = line.runs[index] = Run()
            if isinstance(instruction, RECEIVES):
                queue = line.queues.setdefault(transfer.peer, _Queue())
                queue.transfers.append(transfer)
                run.posts[queue] = len(queue.transfers) + 1
                coming.setdefault((instruction.chunk, transfer.microbatch, transfer.gradient), []).append(transfer)
            else:
                run.sends.append(transfer)
                last[type(instruction), instruction.microbatch, instruction.chunk] = transfer
            run.text = run.sends[0].text if run.sends else run.text or transfer.text
        for transfer in last.values():
            transfer.last = True
        for waiting in coming.values():
            raise BadPlan(f"No compute after {waiting[0].text.rstrip(bytes(1)).decode()} needs what it receives.")
        return line

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
        for queue in line.queues.values():
            queue.posted = 0
            self._post(queue, 1)

    def _post(self, queue: _Queue, count: int) -> None:
        """Post the receives of a peer until `count` of them are, or all."""
        transfers = queue.transfers
        for number in range(queue.posted, min(count, len(transfers))):
            self._post_one(transfers[number])
            queue.posted = number + 1

    def _post_one(self, transfer: _Transfer) -> None:
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
        """Post a run's receives and the next of each peer, start its sends, and wait for sends that are long under way."""
        for queue, count in run.posts.items():
            self._post(queue, count)
        for transfer in run.sends:
            self._send(transfer)
        while len(self._sent) > MOST_SENDS:
            self._finish_send()

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

    def receive(self, transfer: _Transfer) -> None:
        """Wait for what a posted receive brings, and hand it to its stage."""
        works, tensors = self._coming.pop(transfer)
        self._wait(works, transfer.peer)
        flight = transfer.chunk.flight(transfer.microbatch)
        if transfer.gradient:
            for slot, tensor in zip(transfer.slots, tensors, strict=True):
                flight.gradients[slot] = tensor
        else:
            for place, tensor in zip(transfer.places, tensors, strict=True):
                flight.arguments[place] = tensor

    def _wait(self, works: Sequence[Any], peer: int) -> None:
        wait = self._world.wait
        for work in works:
            wait(work, peer)

    def _finish_send(self) -> None:
        works, _, transfer = self._sent.popleft()
        self._world.board.show(transfer.text)
        self._wait(works, transfer.peer)

    def finish_sends(self) -> None:
        """Wait for all that was sent."""
        while self._sent:
            self._finish_send()

    def drop(self) -> None:
        """Forget everything of this step."""
        self._sent.clear()
        self._coming.clear()

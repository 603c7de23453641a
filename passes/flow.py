"""Where the stages of a cut model live, and what each of their computes needs from the others.

Design note. A stage's forward needs what stages before it send over the edges; a backward needs gradients from the
stages after it, over the edges that gradients flow back on. Where both ends are stages of one rank nothing is
transferred, and the order of that rank's list is all that counts. `Flow` is this one table, which the order pass
(passes/order.py) places transfers by and the proof (passes/prove.py) holds them to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from costmodel.errors import BadArgument
from passes.instructions import (
    Backward,
    BackwardInput,
    Compute,
    Forward,
    Recv,
    RecvActivation,
    RecvGradient,
    Send,
    SendActivation,
    SendGradient,
)

Edge = tuple[int, int]

# A result that other stages may need: of which stage, whether of its backward, for which microbatch.
Result = tuple[int, bool, int]


def stages_of_ranks(stage_ranks: Sequence[int]) -> list[list[int]]:
    """Per pipeline rank its stages, in ascending order: the place in that list is the stage's chunk."""
    found: list[list[int]] = [[] for _ in range(max(stage_ranks, default=-1) + 1)]
    for stage, rank in enumerate(stage_ranks):
        found[rank].append(stage)
    return found


class Move(NamedTuple):
    """One transfer, seen from outside: the tensors of a microbatch from one stage to another."""

    source: int
    to: int
    gradient: bool
    microbatch: int


class Flow:
    """Which stage has which rank, and which results each compute needs: forwards along the edges, backwards reversed.

    `stage_ranks[stage]` is a pipeline rank. BadArgument for an edge that does not lead to a later stage, or a gradient
    edge that is no edge.
    """

    def __init__(
        self, stage_ranks: Sequence[int], edges: Collection[Edge], gradient_edges: Collection[Edge] | None
    ) -> None:
        self.stage_ranks = list(stage_ranks)
        self.stages = stages_of_ranks(stage_ranks)
        self.chunks = [self.stages[rank].index(stage) for stage, rank in enumerate(stage_ranks)]
        num_stages = len(self.stage_ranks)
        self.edges = sorted(set(edges))
        self.gradient_edges = self.edges if gradient_edges is None else sorted(set(gradient_edges))
        for source, to in self.edges:
            if not 0 <= source < to < num_stages:
                raise BadArgument(f"The edge {(source, to)} does not lead to a later one of {num_stages} stages.")
        known = set(self.edges)
        for edge in self.gradient_edges:
            if edge not in known:
                raise BadArgument(f"Gradients cannot flow back over {edge}.", why=f"the edges are {self.edges}")
        # Per direction (forward, backward) and stage: the stages whose results it needs, on this rank and on others,
        # and the stages on other ranks that need its result.
        self.local: tuple[list[list[int]], list[list[int]]] = self._tables()
        self.receives: tuple[list[list[int]], list[list[int]]] = self._tables()
        self.sends: tuple[list[list[int]], list[list[int]]] = self._tables()
        paths = [(source, to, False) for source, to in self.edges]
        paths += [(to, source, True) for source, to in self.gradient_edges]
        for source, to, gradient in paths:
            if self.stage_ranks[source] == self.stage_ranks[to]:
                self.local[gradient][to].append(source)
            else:
                self.receives[gradient][to].append(source)
                self.sends[gradient][source].append(to)

    def _tables(self) -> tuple[list[list[int]], list[list[int]]]:
        return [[] for _ in self.stage_ranks], [[] for _ in self.stage_ranks]

    @property
    def one_stage_a_rank(self) -> bool:
        return len(self.stages) == len(self.stage_ranks)

    def result(self, rank: int, compute: Compute) -> Result | None:
        """What a compute makes that others may wait for; None for the weight gradients alone."""
        if isinstance(compute, Forward):
            return self.stages[rank][compute.chunk], False, compute.microbatch
        if isinstance(compute, Backward | BackwardInput):
            return self.stages[rank][compute.chunk], True, compute.microbatch
        return None

    def send(self, move: Move) -> Send:
        cls = SendGradient if move.gradient else SendActivation
        return cls(move.microbatch, to=move.to, chunk=self.chunks[move.source])

    def recv(self, move: Move) -> Recv:
        cls = RecvGradient if move.gradient else RecvActivation
        return cls(move.microbatch, source=move.source, chunk=self.chunks[move.to])

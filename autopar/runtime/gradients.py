"""Gradients that several stages or ranks hold parts of, summed once.

Design note. Two kinds: a tied weight is used by several stages, each with a gradient of its own; a partial gradient
is of a parameter that is whole on each tensor-parallel rank but was used on a part of the values there. Only this
step's part may be summed: what earlier steps left in `.grad` has been summed already, so it is set aside when the
step begins and added back at its end.

Exact tied sums (`TIED_EXACT`). One process that runs microbatch after microbatch adds, per microbatch, the gradients of
all uses (the last use first) and then that sum to `.grad`; adding in any other order rounds differently. So each stage's
gradient of each microbatch is kept apart. Where all stages that use a weight are on this rank (the first and the last
in a V), the sum is made as soon as the last of them has its part, and as many gradients are kept as microbatches are
in flight. Between ranks all of them are exchanged at the end of the step. Without exact sums one accumulated gradient
per rank is exchanged.

Sums over the replicas of data parallelism come on top (`replicas.py`): of tied and partial gradients after these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autopar.deferred import Product
from autopar.program import StageModule
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.replicas import ReplicaSums
from autopar.runtime.world import World
from costmodel.mesh import REPLICA_AXIS

_TIED_TAG = 1 << 29


class _TiedSum:
    """One tied weight on this rank. `stages`: all that use it; `own`: those of this rank, both from last to first."""

    def __init__(
        self, name: str, parameter: torch.Tensor, stages: Sequence[int], stage_ranks: Sequence[int], world: World,
        num_microbatches: int, exact: bool,
    ) -> None:  # fmt: skip
        self.name, self.parameter, self._world = name, parameter, world
        self.stages = sorted(stages, reverse=True)
        self._of_rank: dict[int, list[int]] = {}
        for stage in self.stages:
            self._of_rank.setdefault(stage_ranks[stage], []).append(stage)
        self.own = self._of_rank[world.pipeline_rank]
        self.local = len(self._of_rank) == 1
        self._exact, self._num_microbatches = exact or self.local, num_microbatches
        self._stage_ranks = stage_ranks
        self._kept: list[dict[int, torch.Tensor]] = []
        self._to_come: list[int] = []
        self._next = 0
        self._total: torch.Tensor | None = None

    def begin(self, total: torch.Tensor | None) -> None:
        """`total`: what the sum is added to."""
        self._total, self._next = total, 0
        if self._exact:
            self._kept = [{} for _ in range(self._num_microbatches)]
            self._to_come = [len(self.own)] * self._num_microbatches

    def after_backward(self, stage: int, microbatch: int, complete: bool) -> None:
        """Take the gradient of one stage and microbatch out of `.grad`."""
        if not self._exact:
            return
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None:
            kept = self._kept[microbatch]
            kept[stage] = kept[stage] + gradient if stage in kept else gradient
        self._to_come[microbatch] -= complete
        while self.local and self._next < self._num_microbatches and not self._to_come[self._next]:
            parts, self._kept[self._next] = self._kept[self._next], {}
            self._add([parts[stage] for stage in self.own if stage in parts])
            self._next += 1

    def _add(self, parts: Sequence[torch.Tensor]) -> None:
        """The gradients of one microbatch, the last stage's first."""
        if parts:
            gradient = parts[0]
            for part in parts[1:]:
                gradient = gradient + part
            self._total = gradient.clone() if self._total is None else self._total.add_(gradient)

    def finish(self) -> None:
        """Sum, and put the sum into `.grad`."""
        if not self.local:
            self._exchange()
        self.parameter.grad, self._total = self._total, None

    def _exchange(self) -> None:
        world, parameter, count = self._world, self.parameter, self._num_microbatches
        if self._exact:
            rows = [self._kept[microbatch].pop(stage, None) for stage in self.own for microbatch in range(count)]
        else:
            rows = [parameter.grad]
        stacked = torch.stack([torch.zeros_like(parameter) if row is None else row for row in rows])
        del rows
        parts = {
            rank: stacked if rank == world.pipeline_rank
            else stacked.new_empty((len(stages) * count if self._exact else 1, *parameter.shape))
            for rank, stages in self._of_rank.items()
        }  # fmt: skip
        others = [rank for rank in parts if rank != world.pipeline_rank]
        works = [(world.recv(parts[rank], rank, _TIED_TAG), rank) for rank in others]
        works += [(world.send(stacked, rank, _TIED_TAG), rank) for rank in others]
        for work, rank in works:
            world.wait(work, rank)
        if not self._exact:
            self._add([part[0] for part in parts.values()])
            return
        for microbatch in range(count):
            self._add(
                [
                    parts[rank][self._of_rank[rank].index(stage) * count + microbatch]
                    for stage in self.stages
                    for rank in (self._stage_ranks[stage],)
                ]
            )


class GradientSums:
    """The gradients of one rank's stages (classes by number) that several ranks have parts of. False if there are none.

    `held`: the rank's parameters, and its shards of them. `replicas`: the sums over data parallelism; None where there is one replica.
    """

    def __init__(
        self, world: World, stages: Mapping[int, type[StageModule]], stage_ranks: Sequence[int],
        held: HeldGradients, num_microbatches: int,
    ) -> None:  # fmt: skip
        trained = {name: tensor for name, tensor in held.parameters.items() if tensor.requires_grad}
        self._world, self._parameters = world, trained
        split = world.axis("tp").size > 1
        self._partial = sorted({n for cls in stages.values() for n in cls.PARTIAL_GRADIENTS if n in trained and split})
        tied: dict[str, tuple[tuple[int, ...], bool]] = {}
        for cls in stages.values():
            for name, users in cls.TIED.items():
                if name in trained and len(users) > 1:
                    tied[name] = (tuple(users), cls.TIED_EXACT)
        self._tied = {
            name: _TiedSum(name, trained[name], users, stage_ranks, world, num_microbatches, exact)
            for name, (users, exact) in sorted(tied.items())
        }
        self._of_stage = {stage: [tied for tied in self._tied.values() if stage in tied.own] for stage in stages}
        self.replicas: ReplicaSums | None = None
        replicas = world.axis(REPLICA_AXIS)
        if replicas.size > 1 and trained:
            late = sorted({*self._tied, *self._partial})
            early = {
                stage: [name for name in cls.PARAMS if name in trained and name not in late]
                for stage, cls in stages.items()
            }
            self.replicas = ReplicaSums(replicas, early, late, held)
        self._earlier: dict[str, torch.Tensor | None] = {}

    def __bool__(self) -> bool:
        return bool(self._tied or self._partial or self.replicas)

    def begin(self, accumulate: bool = False) -> None:
        """Set aside what earlier steps left. `accumulate`: more steps follow before the optimizer's."""
        if self.replicas is not None:
            self.replicas.begin(accumulate)
        for name in (*self._tied, *self._partial):
            if name not in self._earlier:
                self._earlier[name], self._parameters[name].grad = self._parameters[name].grad, None
        for name, tied in self._tied.items():
            # one microbatch after the other onto what was there, unless that has still to wait for the sum over tp
            earlier = None if name in self._partial else self._earlier[name]
            tied.begin(None if earlier is None else earlier.clone())

    def after_backward(self, stage: int, microbatch: int, *, complete: bool) -> None:
        """Keep what a backward of a stage left of tied weights apart; `complete` when none of it is put off."""
        for tied in self._of_stage[stage]:
            tied.after_backward(stage, microbatch, complete)

    def last_backward(self, stage: int, put_off: Sequence[list[Product]]) -> None:
        """What comes next is the last backward of a stage, but for the weight gradients that are in these lists, or will be by then."""
        if self.replicas is not None:
            self.replicas.watch(put_off)

    def after_last_backward(self, stage: int, *, complete: bool) -> None:
        """It is over. `complete`: nothing of the stage is put off."""
        if self.replicas is not None:
            self.replicas.unwatch()
            if complete:
                self.replicas.complete(stage)

    def added(self, parameter: torch.Tensor) -> None:
        """A weight gradient that was put off has been added."""
        if self.replicas is not None:
            self.replicas.ready(parameter)

    def abandon(self) -> None:
        """The step failed: `.grad` is again what it was before it."""
        for name, earlier in self._earlier.items():
            self._parameters[name].grad = earlier
        self._earlier.clear()
        for tied in self._tied.values():
            tied.begin(None)
        if self.replicas is not None:
            self.replicas.abandon()

    def finish(self) -> None:
        """Sum over stages and ranks, and add what was set aside."""
        for tied in self._tied.values():  # by name: any two ranks take those that they share in the same order
            tied.finish()
        if self._partial:
            self._sum_partial()
        for name, earlier in self._earlier.items():
            parameter = self._parameters[name]
            if name in self._partial and earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        self._earlier.clear()
        if self.replicas is not None:
            self.replicas.finish()

    def _sum_partial(self) -> None:
        """One all_reduce per dtype."""
        axis = self._world.axis("tp")
        buckets: dict[torch.dtype, list[torch.Tensor]] = {}
        for name in self._partial:
            parameter = self._parameters[name]
            buckets.setdefault(parameter.dtype, []).append(parameter)
        for parameters in buckets.values():
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            flat = axis.all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
                parameter.grad = piece.view_as(parameter).clone()

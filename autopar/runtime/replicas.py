"""Gradients summed over the replicas of data parallelism: once a step, in buckets, beside the last microbatch's backward.

Design note. torch's DistributedDataParallel and FSDP2 wrap an nn.Module and hook its forward, its parameters and the end of each
backward call. A rank here has no module but straight-line stages, several backward calls a step (one a microbatch and stage, some in two
halves), weight gradients that are put off, and gradients that are first owed over other axes (tied weights over pp, partial ones over
tp); and its ranks may be threads, which have no default process group. What is left of a reducer is this file.

A parameter's gradient is complete when the last microbatch has added its part: autograd tells by its hook on the parameter
(`watch` ... `unwatch` around that backward), weight gradients that are put off by `ready`. A bucket starts when all of its are
complete and the bucket before has started, so on all replicas in one order: later stages first, in a stage the last used first.
Tied and partial gradients come last, after their sums over the other axes. `finish` waits for all and leaves the sums in `.grad`.

What earlier steps left in `.grad` has been summed already: it is set aside when the step begins and added back; unless they
accumulated and left parts, which this step adds to (`held_gradients.py`).
A parameter that gets no gradient takes part with zeros and keeps None: all replicas run one program, so it gets none on any.

With ZeRO (`parameter_shards.py`) each replica gets the sum of its shards' elements only, added to the shards' `.grad`. A bucket is a row
for each replica, of its elements of the bucket's parameters, filled up to the longest with zeros; of a whole group of them, which
most buckets are, the rows one after the other are the gradients as they are.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from autopar.deferred import Product
from autopar.runtime.axis import Axis, Pending
from autopar.runtime.buckets import buckets_of, shares_memory
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.shard_groups import ShardGroup
from costmodel.buckets import gradient_bucket_bytes, under_way


class _Rows:
    """A bucket of `names` as one row for each replica, of what `shards` has of them."""

    def __init__(self, names: Sequence[str], shards: ParameterShards) -> None:
        rows = [
            [(place, *shards.group_of[name].within(name, coord)) for place, name in enumerate(names)]
            for coord in range(shards.replicas)
        ]
        lengths = [sum(end - begin for _, begin, end in row) for row in rows]
        self.length, self.sizes = max(lengths), [end - begin for _, begin, end in rows[shards.coord]]
        self._rows = [
            ([(place, begin, end) for place, begin, end in row if end > begin], self.length - length)
            for row, length in zip(rows, lengths, strict=True)
        ]
        self.shards = [shards.of[name] for name in names]

    def of(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """[replicas, length]"""
        flat = [gradient.reshape(-1) for gradient in gradients]
        pieces: list[torch.Tensor] = []
        for row, filled in self._rows:
            pieces += [flat[place][begin:end] for place, begin, end in row]
            if filled:
                pieces.append(flat[0].new_zeros(filled))
        return torch.cat(pieces).view(len(self._rows), self.length)


class _Bucket:
    """Parameters whose gradients travel together, and the sum while it is under way. `rows`: if shards of them get the sums."""

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.Tensor], shards: ParameterShards | None) -> None:
        self.names, self.parameters = names, parameters
        self.rows = _Rows(names, shards) if shards is not None else None
        self.missing: set[int] = set()
        self.pending: Pending | None = None
        self.with_gradient: list[bool] = []


class ReplicaSums:
    """The sums over `axis` of one rank's gradients.

    `stages`: by stage, the names that are complete when its last backward is over, in the order of their first use; `late`: those
    that are not before the end of the step. `held`: the rank's parameters, or the shards of them that are to get the sums.
    `reductions` counts, by name, the sums of the last step.
    """

    def __init__(
        self, axis: Axis, stages: Mapping[int, Sequence[str]], late: Sequence[str], held: HeldGradients
    ) -> None:
        self._axis, self._held, parameters = axis, held, held.parameters
        self._under_way = under_way(sharded=held.shards is not None)
        limit = gradient_bucket_bytes(sum(parameters[name].nbytes for listed in (*stages.values(), late) for name in listed))

        def runs(names: Iterable[str]) -> list[list[str]]:
            if held.shards is None:
                return buckets_of(names, parameters, limit)
            of_groups: dict[ShardGroup, list[str]] = {}
            for name in names:
                of_groups.setdefault(held.shards.group_of[name], []).append(name)
            return list(of_groups.values())

        def buckets(listed: Iterable[Sequence[str]]) -> list[_Bucket]:
            return [_Bucket(run, [parameters[name] for name in run], held.shards) for run in listed]

        self._of_stage = {stage: buckets(runs(reversed(stages[stage]))) for stage in sorted(stages, reverse=True)}
        self._early = [bucket for listed in self._of_stage.values() for bucket in listed]
        self._late = buckets(buckets_of(late, parameters, limit))
        self._buckets = [*self._early, *self._late]
        self._bucket_of = {id(parameter): bucket for bucket in self._early for parameter in bucket.parameters}
        method = weakref.WeakMethod(self.ready)  # a parameter's hook is out of the garbage collector's sight

        def ready(parameter: torch.Tensor) -> None:
            if (found := method()) is not None:
                found(parameter)

        for bucket in self._early:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(ready)
        self._watching = False
        self._put_off: Sequence[list[Product]] = ()
        self._next = 0
        self._sums_now = True
        self._earlier: dict[str, torch.Tensor] = {}
        self.reductions: Counter[str] = Counter()

    # ---- a step -------------------------------------------------------------------------------------------------

    def begin(self, accumulate: bool = False) -> None:
        """Set aside what earlier steps left. `accumulate`: another step of the same update follows."""
        self.reductions.clear()
        self._next, self._watching = 0, False
        self._sums_now = not (accumulate and self._held.keeps_parts)
        if self._held.unsummed:
            self._held.take_up()
        for bucket in self._buckets:
            bucket.missing = {id(parameter) for parameter in bucket.parameters}
            bucket.pending = None
            if bucket.rows is None and not self._held.unsummed:
                for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
                    if parameter.grad is not None and name not in self._earlier:
                        self._earlier[name], parameter.grad = parameter.grad, None

    def watch(self, put_off: Sequence[list[Product]]) -> None:
        """The next backward is the last of its stage for all gradients but those that are in these lists, or will be by then."""
        self._watching, self._put_off = True, put_off

    def unwatch(self) -> None:
        """That backward is over."""
        self._watching = False

    def ready(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient has got one more part: its last, while that is watched for."""
        if not (self._watching and self._sums_now):
            return
        if not any(parameter is each for products in self._put_off for product in products for each in product[:2]):
            bucket = self._bucket_of.get(id(parameter))
            if bucket is not None:
                bucket.missing.discard(id(parameter))
                if not bucket.missing:
                    self._start_next()

    def complete(self, stage: int) -> None:
        """All gradients of a stage have got all of their parts."""
        for bucket in self._of_stage[stage]:
            bucket.missing.clear()
        self._start_next()

    def _start_next(self) -> None:
        while self._sums_now and self._next < len(self._early) and not self._early[self._next].missing:
            self._start(self._early[self._next])
            for earlier in self._early[max(0, self._next - self._under_way) : self._next]:
                if earlier.pending is not None:
                    earlier.pending.advance()
            if self._next >= self._under_way:
                self._deliver(self._early[self._next - self._under_way])
            self._next += 1

    def _start(self, bucket: _Bucket) -> None:
        gradients = [parameter.grad for parameter in bucket.parameters]
        bucket.with_gradient = [gradient is not None for gradient in gradients]
        for parameter in bucket.parameters:
            parameter.grad = None
        filled = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, bucket.parameters, strict=True)
        ]
        del gradients
        if bucket.rows is None:
            alone = len(filled) == 1 and not shares_memory(filled[0])
            flat = filled[0].reshape(-1) if alone else torch.cat([gradient.reshape(-1) for gradient in filled])
            del filled
            bucket.pending = self._axis.start_all_reduce(flat)
        else:
            rows = bucket.rows.of(filled)
            del filled
            bucket.pending = self._axis.start_reduce_scatter(rows)
        self.reductions.update(bucket.names)

    def finish(self) -> None:
        """Start what has not been started, and put all sums into `.grad`; where another step is to do it, leave parts there."""
        if not self._sums_now:
            self._held.keep(self._earlier, self._axis.coord)
            self._earlier.clear()
            return
        for bucket in self._early:
            bucket.missing.clear()
        self._start_next()
        for bucket in self._late:
            self._start(bucket)
        for bucket in self._buckets:
            if bucket.pending is not None:
                bucket.pending.advance()
        for bucket in self._buckets:
            self._deliver(bucket)
        self._earlier.clear()
        self._held.unsummed = False

    def _deliver(self, bucket: _Bucket) -> None:
        """Wait for a bucket's sum, if that has not been done, and hand it out."""
        pending, bucket.pending = bucket.pending, None
        if pending is None:
            return
        flat = pending.wait()
        del pending
        if bucket.rows is not None:
            parts = flat[: sum(bucket.rows.sizes)].split(bucket.rows.sizes)
            for shard, piece, has in zip(bucket.rows.shards, parts, bucket.with_gradient, strict=True):
                if has:
                    gradient = piece.view(shard.shape)
                    shard.grad = gradient if shard.grad is None else shard.grad.add_(gradient)
            return
        pieces = flat.split([parameter.numel() for parameter in bucket.parameters])
        for name, parameter, piece, has in zip(bucket.names, bucket.parameters, pieces, bucket.with_gradient, strict=True):
            earlier = self._earlier.get(name)
            if has:
                gradient = piece.view(parameter.shape)
                parameter.grad = gradient if earlier is None else earlier.add_(gradient)
            else:
                parameter.grad = earlier

    def abandon(self) -> None:
        """The step failed: `.grad` is again what it was before it; parts that it may have added to are gone."""
        self._watching = False
        if self._held.unsummed:
            self._held.clear()
        for bucket in self._buckets:
            bucket.pending = None
            for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
                parameter.grad = self._earlier.get(name)
        self._earlier.clear()


def mean_over(axis: Axis, buffers: Sequence[torch.Tensor]) -> None:
    """The mean over replicas of buffers that forward updates, in place. Integers, such as counts of batches, are equal already."""
    floats = [buffer for buffer in buffers if buffer.is_floating_point()]
    for dtype in dict.fromkeys(buffer.dtype for buffer in floats):
        same = [buffer for buffer in floats if buffer.dtype == dtype]
        total = axis.all_reduce(torch.cat([buffer.reshape(-1) for buffer in same])).div_(axis.size)
        for buffer, piece in zip(same, total.split([buffer.numel() for buffer in same]), strict=True):
            buffer.copy_(piece.view(buffer.shape))

"""What a cut is judged by: the memory of the fullest rank, ranks left without parameters, and then the step time of the schedule.

Design note. The dynamic programme of `passes.cut` finds the least maximum stage time. That is a good start and not the aim: how
long a step takes also depends on the schedule (what fills and drains the pipeline, which rank has which stages), on each pair of
stages' transfers, and on the memory of a rank with all its stages. `Objective` prices all of it for many cuts at once: a cut is a
row of indices into some places, times and bytes come from running sums, transfers from the values that are made in one stage and
used in another, and the step time from `StepTimes`. A rank that would hold no parameter (a cut right before the loss can be the
quickest) is avoided where it can be: torch's optimizers refuse an empty list, so a user's line would raise there.

`improved` tries every cut where there are few, and elsewhere moves boundaries, one or several adjacent ones together by a place (so
that work can pass through the stages between), as long as the step gets shorter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import fx

from costmodel.collectives import send_seconds
from costmodel.hardware import Hardware
from costmodel.memory import state_bytes
from costmodel.mesh import axis_groups
from passes.ir import tensor_type
from passes.line import Line, running_sums
from passes.localize import sharding
from passes.placement import local_type
from passes.step_time import StepTimes

_ALL_TRIED = 3000  # cuts: with no more than these, all of them are
_TIE = 1.001  # step times this near count as equal: then the cut that sends least is taken
_GAIN = 0.9995  # of the step time: a move that brings less is not worth its evaluation
_MOST_ROUNDS = 30
_LARGEST_TABLE = 2_000_000  # elements of a table over cuts and values

InFlight = Callable[[int, int], int]


@dataclass(frozen=True)
class Judged:
    """Cuts, judged: bytes by which the fullest rank exceeds the device, how many ranks hold no parameter, seconds of a step, seconds
    of all transfers. [K] each."""

    excess_bytes: torch.Tensor
    bare_ranks: torch.Tensor
    step_seconds: torch.Tensor
    sent_seconds: torch.Tensor


class Objective:
    """Prices cuts of `line` at `points`: 0, some places, and the end of the line, ascending.

    A cut is `ends`: a row of num_stages + 1 indices into `points`, the first 0 and the last the end's. Without `step_times` stages
    are on ranks of their own, and the step time is the slowest stage's.
    """

    def __init__(
        self, line: Line, points: Sequence[int], num_stages: int, *, hardware: Hardware, axis_sizes: Mapping[str, int], in_flight: InFlight,
        step_times: StepTimes | None,
    ) -> None:  # fmt: skip
        self.line, self.points, self.num_stages, self.step_times = line, list(points), num_stages, step_times
        self.stage_ranks = step_times.stage_ranks if step_times else tuple(range(num_stages))
        self._capacity = float(hardware.memory_bytes)
        self._forward = self._sums([cost.forward_seconds for cost in line.costs])
        self._backward = self._sums([cost.backward_seconds for cost in line.costs])
        saved = self._sums([cost.saved_bytes for cost in line.costs])
        # counted at the first use of each parameter; a tied parameter's second copy is little beside the rest
        first = [sum(numel for numel, previous in uses if previous < 0) for uses in line.first_use]
        state = self._sums([float(state_bytes(numel).total) for numel in first])
        self._held = state.unsqueeze(1), saved.unsqueeze(1)
        self._uses = self._sums([float(len(uses)) for uses in line.first_use])
        self._in_flight = torch.tensor([in_flight(stage, num_stages) for stage in range(num_stages)], dtype=torch.float64)
        self._latency, self._per_byte = _links(self.stage_ranks, hardware, axis_sizes)
        self._values(line)

    def _sums(self, values: Sequence[float]) -> torch.Tensor:
        sums = running_sums(values)
        return torch.tensor([sums[point] for point in self.points], dtype=torch.float64)

    def _values(self, line: Line) -> None:
        """Values made between two points and used beyond: where, where, and their bytes. Those with the same places are one row."""
        found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        for node in line.nodes:
            kind = tensor_type(node)
            if kind is None:
                continue
            made = self._interval(line, node)
            uses = {self._interval(line, user) for user in node.users if user in line.position} - {made}
            if uses:
                num_bytes = line.pricing.num_bytes(local_type(kind, sharding(node), line.axis_sizes))
                key = made, tuple(sorted(uses))
                before = found.get(key, (0, 0))
                found[key] = before[0] + num_bytes, before[1] + 1
        rows = [
            (made, use, k == 0, num_bytes, count)
            for (made, uses), (num_bytes, count) in found.items()
            for k, use in enumerate(uses)
        ]
        self._made, self._used = (torch.tensor([row[k] for row in rows], dtype=torch.long) for k in (0, 1))
        self._first = torch.tensor([row[2] for row in rows], dtype=torch.bool)
        self._bytes, self._count = (torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in (3, 4))

    def _interval(self, line: Line, node: fx.Node) -> int:
        return bisect_right(self.points, line.position[node]) - 1

    # ---- prices ---------------------------------------------------------------------------------------------------

    def stage_seconds(self, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward seconds of a microbatch, [K, stages] each."""
        return self._forward[ends].diff(), self._backward[ends].diff()

    def transfers(self, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[K, from stage, to stage]: bytes of a microbatch, and seconds of sending them there. Nothing between stages of one rank."""
        num_cuts, size = len(ends), self.num_stages
        if num_cuts * len(self._made) > _LARGEST_TABLE and num_cuts > 1:
            half = num_cuts // 2
            parts = self.transfers(ends[:half]), self.transfers(ends[half:])
            return torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])
        table = torch.zeros(2, num_cuts, size * size, dtype=torch.float64)
        if len(self._made):
            inner = ends[:, 1:-1].contiguous()
            made, used = (
                torch.searchsorted(inner, at.expand(num_cuts, -1).contiguous(), right=True) for at in (self._made, self._used)
            )
            before = torch.where(self._first, made, used.roll(1, 1))  # the stage before in which the value is
            sent = (used != made) & (used != before)
            for k, amount in enumerate((self._bytes, self._count)):
                table[k].scatter_add_(1, made * size + used, amount * sent)
        num_bytes, count = table.view(2, num_cuts, size, size)
        return num_bytes, count * self._latency + num_bytes * self._per_byte

    def judge(self, ends: torch.Tensor) -> Judged:
        """`ends` is [K, stages + 1]."""
        forward, backward = self.stage_seconds(ends)
        _, sends = self.transfers(ends)
        state, saved = (table.squeeze(1)[ends].diff() for table in self._held)
        ranks = torch.tensor(self.stage_ranks)
        memory, uses = torch.zeros(2, len(ends), max(self.stage_ranks) + 1, dtype=torch.float64)
        memory.index_add_(1, ranks, state + saved * self._in_flight)
        uses.index_add_(1, ranks, self._uses[ends].diff())
        excess = (memory.amax(1) - self._capacity).clamp(min=0.0)
        if self.step_times is not None:
            seconds = self.step_times(forward, backward, sends, sends > 0)
        else:
            seconds = (forward + backward + 2 * sends.sum(2)).amax(1)
        return Judged(excess, (uses == 0).sum(1).double(), seconds, sends.sum((1, 2)))

    # ---- search ---------------------------------------------------------------------------------------------------

    def improved(self, start: Sequence[int]) -> list[int]:
        """A cut at least as good as `start`, the best there is where all can be tried."""
        last, inner = len(self.points) - 1, self.num_stages - 1
        if inner == 0:
            return list(start)
        first = torch.tensor([list(start)])
        if math.comb(last - 1, inner) <= _ALL_TRIED:
            tried = torch.tensor([[0, *places, last] for places in combinations(range(1, last), inner)])
            return self._best(torch.cat([first, tried]))
        # the dynamic programme knows stages and not ranks: with several stages a rank there is another place to start from
        starts = {tuple(start), *([tuple(self._even())] if len(set(self.stage_ranks)) < self.num_stages else [])}
        return self._best(torch.tensor([self._descended(list(one)) for one in sorted(starts)] + [list(start)]))

    def _even(self) -> list[int]:
        """Stages of equal time, as far as places allow."""
        total = self._forward + self._backward
        ends = [0]
        for stage in range(1, self.num_stages):
            wanted = float(total[-1]) * stage / self.num_stages
            low, high = ends[-1] + 1, len(self.points) - 1 - (self.num_stages - stage)
            ends.append(min(range(low, high + 1), key=lambda k: abs(float(total[k]) - wanted)))
        return [*ends, len(self.points) - 1]

    def _descended(self, ends: list[int]) -> list[int]:
        now = self.judge(torch.tensor([ends]))
        fault, seconds = (float(now.excess_bytes[0]), float(now.bare_ranks[0])), float(now.step_seconds[0])
        for _ in range(_MOST_ROUNDS):
            moves = self._moves(ends)
            if not len(moves):
                break
            judged = self.judge(moves)
            best = _first(judged.excess_bytes, judged.bare_ranks, judged.step_seconds)
            gained = float(judged.excess_bytes[best]), float(judged.bare_ranks[best])
            if gained >= fault and (gained > fault or float(judged.step_seconds[best]) > seconds * _GAIN):
                break
            ends, fault, seconds = moves[best].tolist(), gained, float(judged.step_seconds[best])
        return ends

    def _moves(self, ends: Sequence[int]) -> torch.Tensor:
        """The cut with boundaries first..last moved by a place, forward or back, that leave no stage empty."""
        found = []
        for first in range(1, self.num_stages):
            for last in range(first, self.num_stages):
                if ends[first] - 1 > ends[first - 1]:
                    found.append([*ends[:first], *(end - 1 for end in ends[first : last + 1]), *ends[last + 1 :]])
                if ends[last] + 1 < ends[last + 1]:
                    found.append([*ends[:first], *(end + 1 for end in ends[first : last + 1]), *ends[last + 1 :]])
        return torch.tensor(found, dtype=torch.long).reshape(-1, len(ends))

    def _best(self, ends: torch.Tensor) -> list[int]:
        """The first row is what there is without a search: what is taken is no slower. Of those within _TIE, what sends least."""
        judged = self.judge(ends)
        fits = judged.excess_bytes <= judged.excess_bytes.amin()
        fits &= judged.bare_ranks <= judged.bare_ranks[fits].amin()
        quickest = float(judged.step_seconds[fits].amin())
        limit = quickest * _TIE
        if bool(fits[0]):
            limit = min(limit, float(judged.step_seconds[0]))
        near = fits & (judged.step_seconds <= max(limit, quickest))
        return ends[_first((~near).double(), judged.sent_seconds, judged.step_seconds)].tolist()


def _first(*keys: torch.Tensor) -> int:
    """The place of the least row, by the first key, then the second, and so on."""
    left = torch.arange(len(keys[0]))
    for key in keys:
        left = left[key[left] == key[left].amin()]
    return int(left[0])


def _links(
    stage_ranks: Sequence[int], hardware: Hardware, axis_sizes: Mapping[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[stages, stages]: seconds of latency, and per byte, of a transfer between two stages; 0 within a rank.

    Of the slowest pair of ranks: all of a stage's send at once. In a mesh without pp it is the outermost axis.
    """
    num_ranks = max(stage_ranks) + 1
    groups = axis_groups({"pp": num_ranks, **axis_sizes} if "pp" not in axis_sizes else {**axis_sizes, "pp": num_ranks}, "pp")
    node = torch.tensor([[group[place] // hardware.devices_per_node for group in groups] for place in range(num_ranks)])
    leaves = (node.unsqueeze(1) != node.unsqueeze(0)).any(2).tolist()
    size = len(stage_ranks)
    latency, per_byte = torch.zeros(2, size, size, dtype=torch.float64)
    for one in range(size):
        for other in range(size):
            if stage_ranks[one] != stage_ranks[other]:
                link = hardware.across if leaves[stage_ranks[one]][stage_ranks[other]] else hardware.inside
                latency[one, other] = float(send_seconds(num_bytes=0, link=link))
                per_byte[one, other] = float(send_seconds(num_bytes=1, link=link)) - latency[one, other]
    return latency, per_byte

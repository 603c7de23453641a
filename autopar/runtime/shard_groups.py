"""How ZeRO cuts parameters over replicas: laid end to end in groups, and each group in equal parts.

Design note. A group is what is gathered, and what is reduced, at once. Its parameters follow one another in the order in which the program
first uses them, so that the parts of all replicas one after the other are the whole group: what a gather receives is used where it
is, and parameters are views of it. To cut every parameter by itself would copy each of them once more on the way, and fill each up to a
multiple of the replicas. So a replica may have all of a small parameter, or nothing; of a group it has ceil(elements / replicas).

A group has one dtype, and parameters of one stage; one that several stages of the rank use is a group of its own. Where tensor-parallel
ranks have pieces of different sizes, groups are laid out for the largest: the same on all of them. What these ranks hold alike is then cut
at the same places, so that an optimizer whose kernel rounds by an element's place changes it alike on all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from autopar.runtime.buckets import buckets_of
from costmodel.buckets import shard_group_bytes
from costmodel.mesh import REPLICA_AXIS
from passes.placement import local_shape_of


class ShardGroup:
    """Parameters end to end, of which each replica has a part of `part` elements, the last ones filled up. `names`: in order.

    `numels`: how many elements this rank has of each; `rooms`: how many there is room for.
    """

    def __init__(self, numels: Mapping[str, int], rooms: Mapping[str, int], replicas: int) -> None:
        self.names, self.replicas = tuple(numels), replicas
        self._numels = dict(numels)
        self.begins: dict[str, int] = {}
        total = 0
        for name in numels:
            self.begins[name] = total
            total += rooms[name]
        self.part = -(-total // replicas)

    def within(self, name: str, coord: int) -> tuple[int, int]:
        """(begin, end) of a replica's elements of a parameter, among the parameter's."""
        first, numel = coord * self.part - self.begins[name], self._numels[name]
        return min(max(first, 0), numel), min(max(first + self.part, 0), numel)

    def in_part(self, name: str, coord: int) -> tuple[int, int]:
        """The same elements, among those of the replica's part."""
        begin, end = self.within(name, coord)
        first = self.begins[name] + begin - coord * self.part if end > begin else 0
        return first, first + end - begin


def shard_groups(
    stages: Sequence[Mapping[str, str]], parameters: Mapping[str, torch.Tensor], mesh: Mapping[str, int]
) -> list[ShardGroup]:
    """Groups of a rank's parameters. `stages`: for each of its stages the placements by name, in the order of first use; names that are not
    in `parameters` are left out.
    """
    listed = [[name for name in placed if name in parameters] for placed in stages]
    texts = {name: text for placed in stages for name, text in placed.items()}
    rooms = {
        name: torch.empty(local_shape_of(texts[name], mesh), dtype=each.dtype, device="meta") for name, each in parameters.items()
    }
    uses = Counter(name for names in listed for name in names)
    runs: list[list[str]] = [[name] for name, count in uses.items() if count > 1]
    for names in listed:
        limit = shard_group_bytes(sum(rooms[name].nbytes for name in names))
        runs += buckets_of((name for name in names if uses[name] == 1), rooms, limit)
    return [
        ShardGroup(
            {name: parameters[name].numel() for name in run}, {name: rooms[name].numel() for name in run}, mesh[REPLICA_AXIS]
        )
        for run in runs
    ]

"""ZeRO: each replica's shard of the parameters, which is what its optimizer updates.

Design note. Parameters are cut flat, in groups (`shard_groups.py`). A shard has as many dims as its parameter, all but the first of size 1,
so that optimizer groups chosen by `p.ndim` are what they are for whole parameters; it may be empty.

Stages 1 and 2: the whole parameters are there for the programs, as views of their group's memory, and the shard is a view of the same, so
that an optimizer's update of the shard is one of the parameter. What the other replicas updated is gathered into place in the next forward:
after an optimizer's step on any shard, and after other changes in place, which a tensor's version counts (fused optimizers do not count
theirs). It is `expected` when a step begins, asked for with the first parameter that is used, and waited for group by group, so
that all but the first group come while the forward runs. Gradients are reduced into the shards (`replicas.py`), and whole ones are let go
as soon as they have been sent, in stage 1 as in stage 2: a step of several microbatches holds whole gradients until its last one.

Stage 3: the shard is all that there is between uses. The parameter stays as the leaf that gradients are added to, a view of one element in
its shape; its value is gathered where programs ask for it (`gathered.py`). Frozen parameters are shared out as well.

Parameters without values (on meta) have shards without values; each gets its memory when it is loaded, so that never more than one whole
tensor is alive beside the shards. Which optimizers may update shards: `optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from autopar.runtime.axis import Axis, Pending
from autopar.runtime.optimizers import register_shard
from autopar.runtime.shard_groups import ShardGroup, shard_groups
from costmodel.mesh import REPLICA_AXIS


def is_shared_out(trained: bool, stage: int) -> bool:
    """Whether a ZeRO `stage` shares out a parameter."""
    return stage >= 3 or (stage >= 1 and trained)


class ParameterShards:
    """One replica's shards of a rank's parameters, for a ZeRO `stage` of 1 or more.

    `stages`: by stage of the rank, the placements of its parameters in the order of their first use. `of`: the shards by name;
    before stage 3 frozen parameters stay whole. `whole`: the parameters that are sharded, from stage 3 on without values. Those of
    `parameters` that have values are taken over, and let go of theirs.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], stages: Sequence[Mapping[str, str]], mesh: Mapping[str, int], coord: int,
        stage: int,
    ) -> None:  # fmt: skip
        self.replicas, self.coord, self.stage, self.gathers = mesh[REPLICA_AXIS], coord, stage, stage >= 3
        self.whole = {name: each for name, each in parameters.items() if is_shared_out(each.requires_grad, stage)}
        self.groups = shard_groups(stages, self.whole, mesh)
        self.group_of = {name: group for group in self.groups for name in group.names}
        self._memory: dict[ShardGroup, torch.Tensor] = {}  # [part]; before stage 3 [replicas, part]
        self.of: dict[str, nn.Parameter] = {}
        self._coming: dict[ShardGroup, Pending] = {}
        self._expected: Axis | None = None
        for name, parameter in self.whole.items():
            if parameter.is_meta:
                begin, end = self.group_of[name].within(name, coord)
                self._hand_out(name, parameter.detach().reshape(-1)[begin:end])
            else:
                self.load(name, parameter.detach())
        self._seen, self._stepped = self._versions(), False

    def _hand_out(self, name: str, elements: torch.Tensor) -> None:
        parameter = self.whole[name]
        shard = nn.Parameter(elements.view(-1, *[1] * (parameter.ndim - 1)), requires_grad=parameter.requires_grad)
        register_shard(shard, self)
        self.of[name] = shard

    @torch.no_grad()
    def load(self, name: str, value: torch.Tensor) -> nn.Parameter:
        """Take a parameter's value. The parameter: another tensor than before if it had none."""
        group, parameter = self.group_of[name], self.whole[name]
        if group not in self._memory:
            shape = (group.part,) if self.gathers else (self.replicas, group.part)
            self._memory[group] = torch.zeros(shape, dtype=parameter.dtype, device=value.device)
        memory = self._memory[group]
        begin, end = group.in_part(name, self.coord)
        if self.gathers:
            elements, whole = memory[begin:end], value.new_zeros((), dtype=parameter.dtype).expand(parameter.shape)
            elements.copy_(value.reshape(-1)[slice(*group.within(name, self.coord))])
        else:
            elements, first = memory[self.coord, begin:end], group.begins[name]
            whole = memory.view(-1)[first : first + parameter.numel()].view(parameter.shape)
            whole.copy_(value)
        if name in self.of and not self.of[name].is_meta:
            return parameter
        if parameter.is_meta:
            parameter = self.whole[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        else:
            parameter.data = whole
        self._hand_out(name, elements)
        return parameter

    def within(self, name: str) -> tuple[int, int]:
        """(begin, end) of this replica's elements of a parameter."""
        return self.group_of[name].within(name, self.coord)

    # ---- stages 1 and 2: whole parameters as the other replicas have updated them -----------------------------------------------

    def stepped(self) -> None:
        """An optimizer has made a step on these shards."""
        self._stepped = True

    def _versions(self) -> list[int]:
        return [shard._version for shard in self.of.values()]

    def expect(self, axis: Axis) -> None:
        """Other replicas may have changed their shards. All of them say so, or none."""
        if not self.gathers:
            self._expected = axis

    def wait_for(self, name: str) -> None:
        """Until a parameter is up to date with all replicas' shards. All replicas wait for the same in the same order."""
        if self._expected is not None:
            self._ask()
        if self._coming and (pending := self._coming.pop(self.group_of[name], None) if name in self.group_of else None) is not None:
            pending.wait()

    def refresh(self) -> None:
        """Wait for all that is expected."""
        if self._expected is not None:
            self._ask()
        for pending in self._coming.values():
            pending.wait()
        self._coming.clear()

    def forget(self) -> None:
        """A step has failed: what was expected does not come."""
        self._expected = None
        self._coming.clear()

    @torch.no_grad()
    def _ask(self) -> None:
        axis, self._expected = self._expected, None
        assert axis is not None
        device = next((shard.device for shard in self.of.values()), torch.device("cpu"))
        changed = torch.tensor(float(self._stepped or self._versions() != self._seen), device=device)
        if axis.all_reduce(changed, "max").item():
            for group in self.groups:
                memory = self._memory[group]
                self._coming[group] = axis.start_all_gather(memory[self.coord], memory)
        self._seen, self._stepped = self._versions(), False

    # ---- values from all replicas' shards ---------------------------------------------------------------------------------------

    def start_gather(self, group: ShardGroup, axis: Axis) -> Pending:
        """The values of a group, [replicas, part], of stage 3. All take part."""
        return axis.start_all_gather(self._memory[group])

    def gathered_bytes(self, group: ShardGroup) -> int:
        """Of a group of stage 3 while it is whole."""
        return self._memory[group].nbytes * self.replicas

    @torch.no_grad()
    def gathered(self, name: str, axis: Axis) -> torch.Tensor:
        """The value of one parameter of stage 3. All take part."""
        group = self.group_of[name]
        sizes = [end - begin for begin, end in (group.within(name, coord) for coord in range(self.replicas))]
        mine = self.of[name].detach().view(-1)
        rows = axis.all_gather(F.pad(mine, (0, max(sizes) - mine.numel())))
        return joined([row[:size] for row, size in zip(rows, sizes, strict=True)], self.whole[name].shape)


def joined(shards: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The whole from all replicas' shards (or their gradients), in the order of replicas."""
    return torch.cat([shard.detach().reshape(-1) for shard in shards]).view(tuple(shape))

"""ZeRO: each replica's shard of the parameters, which is what its optimizer updates.

Design note. A parameter of n elements is cut flat into as many equal parts as there are replicas, the last ones shorter or empty, so that
each replica holds ceil(n / replicas) elements of it whatever its shape. A shard has as many dims as its parameter, all but the first of
size 1, so that optimizer groups chosen by `p.ndim` are what they are for whole parameters.

Stages 1 and 2: the whole parameter is there for the programs, and the shard is a view of it, so that an optimizer's update of the shard
is one of the parameter; what the other replicas updated is gathered before the next forward (`refresh`): after an optimizer's step on
any shard, and after other changes in place, which a tensor's version counts (fused optimizers do not count theirs). Gradients are reduced
into the shards (`replicas.py`), and whole ones are let go as soon as they have been sent, in stage 1 as in stage 2: a step of several
microbatches holds whole gradients until its last one has added to them.

Stage 3: the shard is all that there is between uses. The parameter stays as the leaf that gradients are added to, a view of one element in
its shape; its value is gathered where programs ask for it (`gathered.py`). Frozen parameters are shared out as well.

Which optimizers may update them: `optimizers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from autopar.runtime.axis import Axis
from autopar.runtime.buckets import buckets_of, part_of, part_size
from autopar.runtime.optimizers import register_shard
from costmodel.buckets import BUCKET_BYTES


class ParameterShards:
    """One replica's shards of a rank's parameters, for a ZeRO `stage` of 1 or more. `of`: by name; before stage 3 frozen parameters stay
    whole. `whole`: the parameters that are sharded, from stage 3 on without values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], replicas: int, coord: int, stage: int) -> None:
        self.replicas, self.coord, self.stage, self.gathers = replicas, coord, stage, stage >= 3
        self.whole = {name: each for name, each in parameters.items() if each.requires_grad or self.gathers}
        self.of = {name: self._shard(parameter) for name, parameter in self.whole.items()}
        self._seen, self._stepped = self._versions(), False

    def _shard(self, parameter: nn.Parameter) -> nn.Parameter:
        begin, end = part_of(parameter.numel(), self.replicas, self.coord)
        flat = parameter.detach().view(-1)[begin:end]
        if self.gathers:
            flat = flat.clone()
            parameter.data = parameter.new_zeros(()).expand(parameter.shape)
        shard = nn.Parameter(flat.view(-1, *[1] * (parameter.ndim - 1)), requires_grad=parameter.requires_grad)
        register_shard(shard, self)
        return shard

    @property
    def on_meta(self) -> bool:
        """True while the parameters have no values."""
        return any(shard.is_meta for shard in self.of.values())

    def stepped(self) -> None:
        """An optimizer has made a step on these shards."""
        self._stepped = True

    def _versions(self) -> list[int]:
        return [shard._version for shard in self.of.values()]

    @torch.no_grad()
    def refresh(self, axis: Axis) -> None:
        """Give all replicas what each has changed of its shards since the last time. All take part, or none."""
        if self.gathers:
            return
        changed = torch.tensor(float(self._stepped or self._versions() != self._seen), device=axis_device(self.of))
        if not axis.all_reduce(changed, "max").item():
            return
        for names in buckets_of(self.whole, self.whole, BUCKET_BYTES):
            parts = [part_size(self.whole[name].numel(), self.replicas) for name in names]
            mine = self.whole[names[0]].new_zeros(sum(parts))
            for piece, name in zip(mine.split(parts), names, strict=True):
                shard = self.of[name]
                piece[: shard.numel()].copy_(shard.view(-1))
            for coord, row in enumerate(axis.all_gather(mine)):
                if coord != self.coord:
                    for piece, name in zip(row.split(parts), names, strict=True):
                        begin, end = part_of(self.whole[name].numel(), self.replicas, coord)
                        self.whole[name].detach().view(-1)[begin:end].copy_(piece[: end - begin])
        self._seen, self._stepped = self._versions(), False

    @torch.no_grad()
    def gathered(self, names: Sequence[str], axis: Axis) -> dict[str, torch.Tensor]:
        """The values of some parameters of one dtype, from all replicas' shards. All take part."""
        parts = [part_size(self.whole[name].numel(), self.replicas) for name in names]
        mine = torch.cat([
            F.pad(self.of[name].detach().view(-1), (0, part - self.of[name].numel()))
            for name, part in zip(names, parts, strict=True)
        ])  # fmt: skip
        columns = axis.all_gather(mine).split(parts, 1)
        return {
            name: joined(column.unbind(0), self.whole[name].shape) for name, column in zip(names, columns, strict=True)
        }

    @torch.no_grad()
    def load(self, name: str, value: torch.Tensor) -> None:
        """Take a parameter's value."""
        if self.gathers:
            begin, end = part_of(value.numel(), self.replicas, self.coord)
            self.of[name].view(-1).copy_(value.reshape(-1)[begin:end])
        else:
            self.whole[name].copy_(value)

    def renew(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Shards of parameters that have taken the place of those without values."""
        for name, shard in self.of.items():
            if shard.is_meta and not parameters[name].is_meta:
                self.whole[name] = parameters[name]
                self.of[name] = self._shard(parameters[name])
        self._seen = self._versions()


def axis_device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Where these tensors are."""
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))


def joined(shards: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The whole from all replicas' shards (or their gradients), in the order of replicas."""
    return torch.cat([shard.detach().reshape(-1) for shard in shards])[: math.prod(shape)].view(tuple(shape))

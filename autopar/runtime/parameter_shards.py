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

An optimizer may update such shards only if it treats every element by itself. That is tried out, not looked up by name, at its
first step: an optimizer of the same class and options has to change two halves of a matrix as it changes the matrix.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from autopar.runtime.axis import Axis
from autopar.runtime.buckets import BUCKET_BYTES, buckets_of, part_of, part_size
from costmodel.errors import BadArgument


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
        _SHARDS[shard] = weakref.ref(self)
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


# ---- optimizers ---------------------------------------------------------------------------------------------------

_SHARDS = WeakTensorKeyDictionary()  # of each shard: a weak reference to its ParameterShards
_TRIED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """BadArgument for an optimizer of shards that is not element-wise."""
    if optimizer in _TRIED:
        return
    if any(parameter in _SHARDS for group in optimizer.param_groups for parameter in group["params"]):
        reason = _not_elementwise(optimizer)
        if reason is not None:
            raise BadArgument(
                f"{type(optimizer).__name__} cannot update shards of parameters", why=reason,
                use="zero=0, or an optimizer that treats every element by itself (SGD, Adam, AdamW, ...)",
            )  # fmt: skip
    _TRIED.add(optimizer)


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Tell the shards that an optimizer has updated."""
    owners = [_SHARDS.get(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for owner in {id(each): each for each in owners if each is not None}.values():
        if (shards := owner()) is not None:
            shards.stepped()


def _not_elementwise(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer of this class and these options cannot be given parts of parameters; None if it can."""
    device = next(parameter.device for group in optimizer.param_groups for parameter in group["params"] if parameter in _SHARDS)
    values, gradients = _numbers(1).to(device), _numbers(2).to(device)
    whole, halves = nn.Parameter(values.clone()), [nn.Parameter(half.clone()) for half in values.chunk(2)]
    try:
        pair = [_like(optimizer, [whole]), _like(optimizer, halves)]
        for _ in range(2):
            whole.grad = gradients.clone()
            for half, gradient in zip(halves, gradients.chunk(2), strict=True):
                half.grad = gradient.clone()
            for each in pair:
                type(each).step(each)
    except Exception as error:  # whatever a class of the user's raises
        return f"it cannot be tried out on a matrix and its halves ({type(error).__name__}: {error})"
    if not torch.allclose(whole, torch.cat([half.detach() for half in halves]), rtol=1e-5, atol=1e-7):
        return "it changes the two halves of a matrix otherwise than the matrix"
    return None


def _numbers(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def _like(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same kind with the same options, for other parameters."""
    made = copy.copy(optimizer)
    made.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}  # a scheduler's wrapper of `optimizer`'s
    made._optimizer_step_pre_hooks, made._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    made.state = type(optimizer.state)(dict)
    first = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")}
    rate = {"lr": torch.full_like(first["lr"], 0.1) if isinstance(first["lr"], torch.Tensor) else 0.1} if "lr" in first else {}
    made.param_groups = [{**first, **rate, "params": parameters}]  # a warm-up may begin at a rate of 0
    return made


register_optimizer_step_pre_hook(_check_optimizer)
register_optimizer_step_post_hook(_note_step)

"""ZeRO 3: the parameters of a stage, which are gathered from all replicas' shards when they are used, and let go after.

Design note. Between uses a whole parameter has no memory: it is the leaf that gradients are added to, of the right shape over one element.
`p(name)` in a program gathers the group that the parameter is in (`shard_groups.py`) and returns a view of it that autograd sees as the
leaf. The last `HELD_GROUPS` used are kept. What autograd would save of a gathered parameter is saved as a place in its group
instead, and gathered again in backward (`saving`). A gathered group is memory of its own, so whoever still uses one that has been let go
has what it had.

The next group is on its way while one is used. Which it is, is known from the step before, or for forwards alone from the one before: a
program asks for its groups in the same order each time. A run that asks for another one gathers it at once, and the rest of its
own as they are asked for.

All replicas run one program and so gather in one order, in autograd's backward too. torch's FSDP2 hooks modules' forward and backward,
and empties the storage of parameters; a stage has no modules, and a view of a storage that is emptied reads garbage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from autopar.runtime.axis import Axis, Pending
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.shard_groups import ShardGroup
from costmodel.buckets import HELD_GROUPS


class _Place(NamedTuple):
    """Part of a gathered group."""

    group: ShardGroup
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Use(torch.autograd.Function):
    """The gathered value, whose gradient is the leaf's."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, value: list[torch.Tensor]) -> torch.Tensor:
        return value[0].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class GatheredParameters:
    """A stage's `p`. `held`: what the rank holds, by name: leaves and buffers."""

    def __init__(self, axis: Axis, shards: ParameterShards, held: Callable[[str], torch.Tensor]) -> None:
        self._axis, self._shards, self._leaf = axis, shards, held
        self._held: OrderedDict[ShardGroup, torch.Tensor] = OrderedDict()
        self._group_at: dict[int, ShardGroup] = {}  # by the address of its storage, of what is held
        self._coming: tuple[ShardGroup, Pending] | None = None
        self._order: list[ShardGroup] = []  # what this run has asked for
        self._known: Sequence[ShardGroup] = ()  # what it will ask for
        self._of_run: dict[bool, Sequence[ShardGroup]] = {}  # what the last run asked for, with gradients and without
        self._with_gradients = False

    def __call__(self, name: str) -> torch.Tensor:
        group = self._shards.group_of.get(name)
        leaf = self._leaf(name)
        if group is None:
            return leaf
        begin = group.begins[name]
        value = self._value(group)[begin : begin + leaf.numel()].view(leaf.shape)
        if not (leaf.requires_grad and torch.is_grad_enabled()):
            return value
        used = _Use.apply(leaf, [value])
        used.leaf = leaf
        return used

    def _value(self, group: ShardGroup) -> torch.Tensor:
        """All elements of a group."""
        found = self._held.pop(group, None)
        if found is None:
            while len(self._held) >= HELD_GROUPS:
                _, let_go = self._held.popitem(last=False)
                del self._group_at[let_go.untyped_storage()._cdata]
            found = self._fetch(group)
            self._group_at[found.untyped_storage()._cdata] = group
        self._held[group] = found
        return found

    def _fetch(self, group: ShardGroup) -> torch.Tensor:
        coming, self._coming = self._coming, None
        pending = coming[1] if coming is not None and coming[0] is group else self._shards.start_gather(group, self._axis)
        found = pending.wait().view(-1)
        if not self._order:
            self._with_gradients = torch.is_grad_enabled()
            self._known = self._of_run.get(self._with_gradients, ())
        place = len(self._order)
        self._order.append(group)
        if place < len(self._known) and self._known[place] is not group:
            self._known = ()
        if place + 1 < len(self._known):
            following = self._known[place + 1]
            self._coming = (following, self._shards.start_gather(following, self._axis))
        return found

    def held_bytes(self) -> int:
        """Of the groups that are held now or on their way."""
        coming = self._shards.gathered_bytes(self._coming[0]) if self._coming is not None else 0
        return coming + sum(value.nbytes for value in self._held.values())

    def clear(self) -> None:
        """A run is over, and shards may change: hold nothing."""
        if self._order:
            self._of_run[self._with_gradients] = self._order
        self._order, self._known, self._coming = [], (), None
        self._held.clear()
        self._group_at.clear()

    def saving(self) -> AbstractContextManager[Any]:
        """Around a forward: autograd keeps no gathered parameter."""
        return saved_tensors_hooks(self._pack, self._unpack) if torch.is_grad_enabled() else nullcontext()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        group = self._group_at.get(tensor.untyped_storage()._cdata)
        if group is None or tensor.dtype != self._held[group].dtype:
            return tensor.detach()
        return _Place(group, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return self._value(saved.group).as_strided(saved.shape, saved.stride, saved.offset)


class RefreshedParameters:
    """A stage's `p` of ZeRO 1 and 2: `held`, each, and each cast of one, once it is up to date."""

    def __init__(self, shards: ParameterShards, held: Callable[..., torch.Tensor]) -> None:
        self._shards, self._held = shards, held

    def __call__(self, name: str, dtype: str | None = None) -> torch.Tensor:
        self._shards.wait_for(name)
        return self._held(name, dtype)

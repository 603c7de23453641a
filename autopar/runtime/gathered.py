"""ZeRO 3: the parameters of a stage, which are gathered from all replicas' shards when they are used, and let go after.

Design note. Between uses a whole parameter has no memory: it is the leaf that gradients are added to, of the right shape over one element.
`p(name)` in a program gathers the group that the parameter is in, a run of parameters in the order of their first use, and
returns a tensor that autograd sees as the leaf. The last `HELD_GROUPS` groups are kept. What autograd would save of a gathered
parameter is saved as a place in its group instead, and gathered again in backward (`saving`). A gathered group is memory of its
own, so whoever still uses one that has been let go has what it had.

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

from autopar.runtime.axis import Axis
from autopar.runtime.buckets import buckets_of
from autopar.runtime.parameter_shards import ParameterShards
from costmodel.buckets import HELD_GROUPS, parameter_group_bytes


class _Place(NamedTuple):
    """Part of a gathered parameter."""

    name: str
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
    """A stage's `p`. `names`: its parameters in the order of their first use; `held`: what the rank holds, by name: leaves and buffers."""

    def __init__(
        self, axis: Axis, shards: ParameterShards, names: Sequence[str], held: Callable[[str], torch.Tensor]
    ) -> None:
        self._axis, self._shards, self._leaf = axis, shards, held
        self._group_of: dict[str, list[str]] = {}
        shared = [name for name in names if name in shards.of]
        total = sum(shards.whole[name].nbytes for name in shared)
        for group in buckets_of(shared, shards.whole, parameter_group_bytes(total)):
            self._group_of.update(dict.fromkeys(group, group))
        self._held: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._name_at: dict[int, str] = {}  # by the address of its storage, of what is held

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._group_of:
            return self._leaf(name)
        leaf, value = self._leaf(name), self._value(name)
        if not (leaf.requires_grad and torch.is_grad_enabled()):
            return value
        used = _Use.apply(leaf, [value])
        used.leaf = leaf
        return used

    def _value(self, name: str) -> torch.Tensor:
        group = self._group_of[name]
        found = self._held.pop(group[0], None)
        if found is None:
            while len(self._held) >= HELD_GROUPS:
                self._let_go()
            found = self._shards.gathered(group, self._axis)
            self._name_at.update((value.untyped_storage()._cdata, each) for each, value in found.items())
        self._held[group[0]] = found
        return found[name]

    def _let_go(self) -> None:
        _, values = self._held.popitem(last=False)
        for value in values.values():
            self._name_at.pop(value.untyped_storage()._cdata, None)

    @property
    def held_bytes(self) -> int:
        """Of the groups that are held now."""
        return sum(value.nbytes for group in self._held.values() for value in group.values())

    def clear(self) -> None:
        """Hold nothing: shards may change."""
        self._held.clear()
        self._name_at.clear()

    def saving(self) -> AbstractContextManager[Any]:
        """Around a forward: autograd keeps no gathered parameter."""
        return saved_tensors_hooks(self._pack, self._unpack) if torch.is_grad_enabled() else nullcontext()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        name = self._name_at.get(tensor.untyped_storage()._cdata)
        if name is None or tensor.dtype != self._leaf(name).dtype:
            return tensor.detach()
        return _Place(name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return self._value(saved.name).as_strided(saved.shape, saved.stride, saved.offset)

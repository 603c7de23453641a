"""The user's model after its ranks have been made: theirs to keep or to delete.

Design note. A rank holds its shards; the whole model's values are needed no more. What still is: its code, for a call of another form
(which is traced anew), and the values that no rank holds (a parameter that forward does not use). So the ParallelModel keeps the user's
model by a weak reference, and beside it a copy without the values of the parameters that ranks hold. As long as the user keeps the model
it is the one that is asked; when they delete it, its memory is free. A model that `copy.deepcopy` cannot copy is kept.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def give_back() -> None:
    """Let the operating system have the memory that making a plan took and that is free again: a rank of a job plans once, then trains."""
    gc.collect()
    FakeTensorMode.cache_clear()  # what ops give, remembered for the next trace
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other allocators do it by themselves
    if trim is not None:
        trim(0)


def without_values(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, strides and dtype on meta."""
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


class HeldModel:
    """A model, whole until `release`. `on_meta`: the names of what had no values when it was given."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._weakly = weakref.ref(model)
        self.on_meta = {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta}

    def get(self) -> nn.Module:
        """The user's model, or once they have deleted it the copy without values."""
        found = self._model if (alive := self._weakly()) is None else alive
        assert found is not None
        return found

    def release(self, names: Collection[str]) -> None:
        """From now on keep no values of the parameters of these names."""
        model = self.get()
        memo: dict[int, object] = {id(tensor): tensor for tensor in _tensors(model)}
        for name, parameter in model.named_parameters():
            if name in names:
                memo[id(parameter)] = without_values(parameter)
        try:
            self._model = copy.deepcopy(model, memo)
        except Exception:  # whatever a class of the user's raises
            self._model = model


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """All that modules hold: parameters, buffers, plain attributes."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                yield value

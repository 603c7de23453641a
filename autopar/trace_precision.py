"""The model as it computes in a precision, while it is traced: parameters of another device or dtype, forward under autocast.

Autocast looks at the device of what an op gets, and a model's own code at dtypes. So where the model is not on the device that the ranks
compute on (it may be on meta), or is to have another dtype, export sees tensors without values in place of its parameters and buffers:
right in device and dtype, and as cheap as meta ones. The user's model gets its own back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autopar.precision import Precision


class InDtype(Mapping[str, torch.Tensor]):
    """A model's state with floating tensors in a dtype, each cast when it is asked for: no second copy of the model is held."""

    def __init__(self, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.held, self._dtype = state, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.held[name]
        if not tensor.is_floating_point() or tensor.dtype == self._dtype:
            return tensor
        cast = tensor.detach().to(self._dtype)
        return nn.Parameter(cast, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def traceable(device: torch.device | None) -> torch.device | None:
    """The device to trace for: a torch without CUDA has none of its autocast's casts, those for CPUs stand in for them."""
    return torch.device("cpu") if device is not None and device.type == "cuda" and not torch.cuda.is_available() else device


def autocast_device(device: torch.device | None) -> str:
    """Whose list of casts autocast follows for a model that computes there."""
    return device.type if device is not None and device.type != "meta" else "cpu"


def computing(precision: Precision, device: torch.device | None) -> Any:
    """The context that forward and loss run in."""
    return nullcontext() if precision.autocast is None else torch.autocast(autocast_device(device), dtype=precision.autocast)


def replacement(
    model: nn.Module, precision: Precision, device: torch.device | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What export is to see in place of each tensor of the model and its example arguments; None for the tensors themselves."""
    kinds = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    mixed = len(kinds) > 1 and "meta" in kinds  # a model that was let go of (`held_model.py`)
    moved = device is not None and (mixed or (precision.autocast is not None and kinds not in (set(), {device.type})))
    if not moved and precision.state is None:
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    made: dict[int, torch.Tensor] = {}

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            dtype = precision.state if precision.state is not None and tensor.is_floating_point() else tensor.dtype
            where = device if moved else tensor.device
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=where)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    return replaced


@contextmanager
def with_state(model: nn.Module, replaced: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[None]:
    """The model with other parameters and buffers, through its own `__setattr__`; its caller puts the modules' tables back."""
    if replaced is not None:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in list(table.items()):
                    if tensor is not None:
                        setattr(module, name, replaced(tensor))
    yield

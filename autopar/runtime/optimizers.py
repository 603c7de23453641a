"""Which optimizers may update parts of parameters, and what they are told.

Design note. An optimizer may update a part as it would the whole only if it treats every element by itself. That is tried out, not looked
up by name, at its first step: an optimizer of the same class and options has to change two halves of a matrix as it changes the
matrix. Parts over replicas (ZeRO) are autopar's doing, so one that fails is refused. Parts over tensor-parallel ranks are what a rank
has for its weights, and optimizers that look at a rank's part alone are in use: there a warning says that the result is another.

After every step the shards are told, since fused kernels change parameters without counting it in their versions.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from costmodel.errors import BadArgument


class Shards(Protocol):
    """What holds shards of parameters and hears of their updates."""

    def stepped(self) -> None: ...


_SHARDS = WeakTensorKeyDictionary()  # of each shard over replicas: a weak reference to what holds it
_PIECES = WeakTensorKeyDictionary()  # of each piece over tensor-parallel ranks: its name
_TRIED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def register_shard(shard: nn.Parameter, owner: Shards) -> None:
    """A replica's part of a parameter: only element-wise optimizers may update it, and `owner` is told when one has."""
    _SHARDS[shard] = weakref.ref(owner)


def register_piece(piece: nn.Parameter, name: str) -> None:
    """A tensor-parallel rank's part of a parameter: an optimizer that is not element-wise updates it with a warning."""
    _PIECES[piece] = name


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """BadArgument for an optimizer of shards that is not element-wise, a warning for one of pieces."""
    if optimizer in _TRIED:
        return
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        shard = next((each for each in group["params"] if each in _SHARDS), None)
        piece = next((each for each in group["params"] if each in _PIECES), None)
        part = piece if shard is None else shard
        reason = _not_elementwise(optimizer, group, part.device) if part is not None else None
        if reason is None:
            continue
        if shard is not None:
            raise BadArgument(
                f"{kind} cannot update shards of parameters", why=reason,
                use="zero=0, or an optimizer that treats every element by itself (SGD, Adam, AdamW, ...)",
            )  # fmt: skip
        warnings.warn(
            f"{kind} sees each rank's part of {_PIECES[piece]} (and of other parameters that tp splits) by itself; its updates are not "
            f"those of the whole parameter: {reason}. Optimizers that treat every element by itself (SGD, Adam, AdamW, ...) train to the "
            "same model.",
            stacklevel=2,
        )
        break
    _TRIED.add(optimizer)


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Tell the shards that an optimizer has updated them."""
    owners = [_SHARDS.get(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for owner in {id(each): each for each in owners if each is not None}.values():
        if (shards := owner()) is not None:
            shards.stepped()


def _not_elementwise(optimizer: torch.optim.Optimizer, group: dict[str, Any], device: torch.device) -> str | None:
    """Why an optimizer of this class and a group's options cannot be given parts of parameters; None if it can."""
    values, gradients = _numbers(1).to(device), _numbers(2).to(device)
    whole, halves = nn.Parameter(values.clone()), [nn.Parameter(half.clone()) for half in values.chunk(2)]
    try:
        pair = [_like(optimizer, group, [whole]), _like(optimizer, group, halves)]
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


def _like(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The same kind with a group's options, for other parameters."""
    made = copy.copy(optimizer)
    made.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}  # a scheduler's wrapper of `optimizer`'s
    made._optimizer_step_pre_hooks, made._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    made.state = type(optimizer.state)(dict)
    first = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    rate = {"lr": torch.full_like(first["lr"], 0.1) if isinstance(first["lr"], torch.Tensor) else 0.1} if "lr" in first else {}
    made.param_groups = [{**first, **rate, "params": parameters}]  # a warm-up may begin at a rate of 0
    return made


register_optimizer_step_pre_hook(_check_optimizer)
register_optimizer_step_post_hook(_note_step)

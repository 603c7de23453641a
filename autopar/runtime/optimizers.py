"""Which optimizers may update parts of a model, and what they are told.

Design note. What an optimizer does to a part need not be what it does to the whole: it may look at a matrix (Muon, Adafactor), or at all
parameters together (LBFGS, whatever takes a norm of its own). That is tried out, not looked up by name, at its first step: an optimizer of
the same class and options has to change a small matrix in parts, as a rank would have them, as it changes it whole (`PARTS`). Parts over
replicas (ZeRO) are autopar's doing, so an optimizer that fails is refused. Parts over tensor-parallel ranks and stages are what a rank
has, and optimizers that look at a rank's part alone are in use: there a warning says that the result is another.

After every step the shards are told, since fused kernels change parameters without counting it in their versions.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from costmodel.errors import BadArgument

Split = Callable[[torch.Tensor], Sequence[Sequence[torch.Tensor]]]  # a matrix -> the parameters of each of several optimizers


class Shards(Protocol):
    """What holds shards of parameters and hears of their updates."""

    def stepped(self) -> None: ...


@dataclass(frozen=True)
class PartKind:
    """Of what a model's parts may be: an optimizer that has them has to change the tried matrix `parted` as it does `whole`."""

    whole: Split
    parted: Split
    difference: str  # why it cannot, if it does not
    warning: str | None  # about the parameter {name}; None: it is refused


def _matrix(matrix: torch.Tensor) -> Sequence[Sequence[torch.Tensor]]:
    return [[matrix]]


def _halves(matrix: torch.Tensor) -> Sequence[Sequence[torch.Tensor]]:
    return [matrix.chunk(2)]


def _halves_apart(matrix: torch.Tensor) -> Sequence[Sequence[torch.Tensor]]:
    return [[half] for half in matrix.chunk(2)]


_OF_A_MATRIX = "it changes the two halves of a matrix otherwise than the matrix"
_OF_A_PIECE = (
    "sees each rank's part of {name} (and of other parameters that tp splits) by itself; its updates are not those of the whole parameter"
)
_OF_A_STAGE = "sees the parameters of each rank by themselves, on this one {name} and others; its updates are not those of the whole model"
PARTS = {
    "shard": PartKind(_matrix, _halves_apart, _OF_A_MATRIX, None),  # a replica's, by ZeRO
    "piece": PartKind(_matrix, _halves, _OF_A_MATRIX, _OF_A_PIECE),  # a tensor-parallel rank's; the optimizer has the others' too
    "piece apart": PartKind(_matrix, _halves_apart, _OF_A_MATRIX, _OF_A_PIECE),  # ... other processes have the others'
    "stage": PartKind(_halves, _halves_apart, "it changes two matrices otherwise together than each by itself", _OF_A_STAGE),
}

_SHARDS = WeakTensorKeyDictionary()  # of each shard over replicas: a weak reference to what holds it
_KINDS = WeakTensorKeyDictionary()  # of each other part: (a name in PARTS, the parameter's name)
_TRIED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def register_shard(shard: nn.Parameter, owner: Shards) -> None:
    """A replica's part of a parameter: only element-wise optimizers may update it, and `owner` is told when one has."""
    _SHARDS[shard] = weakref.ref(owner)


def register_part(parameter: nn.Parameter, kind: str, name: str) -> None:
    """A parameter that is a part of the model, of a kind in PARTS: an optimizer for which that matters updates it with a warning."""
    _KINDS[parameter] = (kind, name)


def _kind(parameter: nn.Parameter) -> str | None:
    return "shard" if parameter in _SHARDS else _KINDS[parameter][0] if parameter in _KINDS else None


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """BadArgument for an optimizer of shards that is not element-wise, a warning for one of other parts that they make a difference to."""
    if optimizer in _TRIED:
        return
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        kinds = [_kind(parameter) for parameter in group["params"]]
        for kind, row in PARTS.items():
            part = group["params"][kinds.index(kind)] if kind in kinds else None
            reason = _difference(optimizer, group, part.device, row) if part is not None else None
            if reason is None:
                continue
            if row.warning is None:
                raise BadArgument(
                    f"{name} cannot update shards of parameters", why=reason,
                    use="zero=0, or an optimizer that treats every element by itself (SGD, Adam, AdamW, ...)",
                )  # fmt: skip
            warnings.warn(
                f"{name} {row.warning.format(name=_KINDS[part][1])}: {reason}. Optimizers that treat every element by itself (SGD, Adam, "
                "AdamW, ...) train to the same model.",
                stacklevel=2,
            )
            _TRIED.add(optimizer)
            return
    _TRIED.add(optimizer)


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Tell the shards that an optimizer has updated them."""
    owners = [_SHARDS.get(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for owner in {id(each): each for each in owners if each is not None}.values():
        if (shards := owner()) is not None:
            shards.stepped()


def _difference(optimizer: torch.optim.Optimizer, group: dict[str, Any], device: torch.device, row: PartKind) -> str | None:
    """Why an optimizer of this class and a group's options cannot be given parts as the row has them; None if it can."""
    try:
        whole, parted = (_updated(optimizer, group, device, split) for split in (row.whole, row.parted))
    except Exception as error:  # whatever a class of the user's raises
        return f"it cannot be tried out on a matrix and its halves ({type(error).__name__}: {error})"
    return None if torch.allclose(whole, parted, rtol=1e-5, atol=1e-7) else row.difference


def _updated(optimizer: torch.optim.Optimizer, group: dict[str, Any], device: torch.device, split: Split) -> torch.Tensor:
    """A matrix after two steps of optimizers like this one that have its parts."""
    parts = [[nn.Parameter(part.clone()) for part in own] for own in split(_numbers(1).to(device))]
    slopes = split(_numbers(2).to(device))
    each = [(_like(optimizer, group, own), own, slopes_here) for own, slopes_here in zip(parts, slopes, strict=True)]
    for _ in range(2):
        for made, own, slopes_here in each:
            closure = _closure(own, slopes_here)
            closure()
            step = type(made).step
            needs_closure = inspect.signature(step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty
            step(made, *([closure] if needs_closure else []))  # type: ignore[arg-type]
    return torch.cat([part.detach() for own in parts for part in own])


_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _closure(parameters: Sequence[nn.Parameter], slopes: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Leaves gradients and returns the loss log(1 + exp(slope x parameter)), summed over elements: it has no minimum to find at once."""

    def closure() -> torch.Tensor:
        losses = []
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope * torch.sigmoid(slope * parameter.detach())
            losses.append(nn.functional.softplus(slope * parameter.detach()).sum())
        return torch.stack(losses).sum()

    return closure


def _numbers(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def _like(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The same kind with a group's options, for other parameters. TypeError if it keeps its parameters where they cannot be exchanged."""
    made = copy.copy(optimizer)
    own = {id(parameter) for each in optimizer.param_groups for parameter in each["params"]}
    made.__dict__ = {
        key: value if key in ("param_groups", "state") else _exchanged(key, value, own, parameters)
        for key, value in optimizer.__dict__.items()
        if key != "step"  # a scheduler's wrapper of `optimizer`'s
    }
    made._optimizer_step_pre_hooks, made._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    made.state = type(optimizer.state)(dict)
    first = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    rate = {"lr": torch.full_like(first["lr"], 0.1) if isinstance(first["lr"], torch.Tensor) else 0.1} if "lr" in first else {}
    made.param_groups = [{**first, **rate, "params": parameters}]  # a warm-up may begin at a rate of 0
    return made


def _exchanged(key: str, value: Any, own: set[int], parameters: list[nn.Parameter]) -> Any:
    """What a copy of an optimizer has for an attribute of it: a container of its own, other parameters in place of `own`."""
    if not any(id(leaf) in own for leaf in tree_leaves(value)):
        return copy.copy(value) if isinstance(value, (list, dict, set)) else value
    if isinstance(value, (list, tuple)) and all(id(each) in own for each in value):
        return type(value)(parameters)
    raise TypeError(f"it holds parameters in {key}")


register_optimizer_step_pre_hook(_check_optimizer)
register_optimizer_step_post_hook(_note_step)

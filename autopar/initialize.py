"""Deferred initialisation: the values of a model that was built on the meta device, by its own modules' init functions, module by module.

What is equalled is the whole model with the seed set, each module initialised after its children and in the order in which they are
registered. Where a model is built in that order and by `reset_parameters` alone, as plain PyTorch layers are, that is also what building it
with the seed gives. Every rank runs every function, since each takes up the random numbers where the one before left off,
but holds one module's tensors at a time, and keeps its shards of them.

A module's function is `_init_weights(module)` of the closest module around it that has one (the convention of Hugging Face), else its own
`reset_parameters()` or `_reset_parameters()`. One that reaches into submodules (scaled residual projections) is run again with the tensors
that it reaches for. Tensors begin as NaN, so what a function leaves as it is, or reads before it was written, is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from costmodel.errors import WeightsMissing

_USE = "a module with reset_parameters() that sets it, or par.load_state_dict(...)"


class _Reached(Exception):
    """An init function uses a tensor that has no values."""

    def __init__(self, key: int) -> None:
        self.key = key


class _NoValues(TorchDispatchMode):
    """Raises _Reached when an op gets memory of one of these tensors."""

    def __init__(self, keys: set[int]) -> None:
        super().__init__()
        self._keys = keys

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor) and value.is_meta and _key(value) in self._keys:
                raise _Reached(_key(value))
        return func(*args, **(kwargs or {}))


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def initialized(model: nn.Module, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole value) of the parameters and buffers of `model` that are on meta and that init functions set. Tied ones have their first
    name; a later value of a name replaces an earlier one. The model is left as it is.

    WeightsMissing, after all values, for parameters that no function sets.
    """
    named = {_key(t): name for name, t in [*model.named_buffers(), *model.named_parameters()] if t.is_meta}
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and _key(tensor) in named:
                    places.setdefault(_key(tensor), []).append((table, name))
    left = {_key(tensor): name for name, tensor in model.named_parameters() if tensor.is_meta}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, module, function in _functions(model, "", None):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for key, value in _values({_key(t) for t in own if t.is_meta}, function, places).items():
                unset = int((value.isnan() if value.is_floating_point() else value == _unset(value.dtype)).sum())
                if unset == 0:
                    yield named[key], value
                    left.pop(key, None)
                elif unset < value.numel():
                    raise WeightsMissing(
                        f"{named[key]} is not set as a whole by one init function",
                        where=f"{path or 'the model'} ({type(module).__name__})",
                        why="it leaves elements as they are, or reads what another has set", use=_USE,
                    )  # fmt: skip
                del value  # before the next module's are made
    if left:
        holder = model.get_submodule(next(iter(left.values())).rpartition(".")[0])
        raise WeightsMissing(
            f"{len(left)} parameters are set by no init function, {next(iter(left.values()))} first",
            where=f"{type(holder).__name__}", why="it has no reset_parameters() and no _init_weights(module) sets it", use=_USE,
        )  # fmt: skip


def _functions(
    module: nn.Module, path: str, around: Callable[[nn.Module], None] | None
) -> Iterator[tuple[str, nn.Module, Callable[[], Any]]]:
    """(path, module, init function) of each module that has one, children first."""
    around = getattr(module, "_init_weights", None) or around
    for name, child in module.named_children():
        yield from _functions(child, f"{path}.{name}" if path else name, around)
    own = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if around is not None:
        yield path, module, lambda: around(module)
    elif own is not None:
        yield path, module, own


def _unset(dtype: torch.dtype) -> float | int | bool:
    return float("nan") if dtype.is_floating_point or dtype.is_complex else False if dtype == torch.bool else torch.iinfo(dtype).min


@torch.no_grad()
def _values(
    keys: set[int], function: Callable[[], Any], places: dict[int, list[tuple[dict[str, Any], str]]]
) -> dict[int, torch.Tensor]:
    """The values that a function gives to the tensors of these keys, and to those that it reaches for."""
    start = torch.get_rng_state()
    keys = keys & places.keys()
    while True:
        made: dict[int, torch.Tensor] = {}
        before: list[tuple[dict[str, Any], str, Any]] = []
        for key in keys:
            for table, name in places[key]:
                old = table[name]
                if key not in made:
                    made[key] = torch.full(old.shape, _unset(old.dtype), dtype=old.dtype)
                before.append((table, name, old))
                table[name] = nn.Parameter(made[key], old.requires_grad) if isinstance(old, nn.Parameter) else made[key]
        try:
            with _NoValues(places.keys() - keys):
                function()
            return made
        except _Reached as reached:
            keys = keys | {reached.key}
            torch.set_rng_state(start)
        finally:
            for table, name, old in before:
                table[name] = old

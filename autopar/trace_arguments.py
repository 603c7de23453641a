"""How the arguments of a call get names: forward's own, whichever way they were passed, then keys and indices of nested
values."""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from autopar.trace_values import opened
from costmodel.errors import BadArgument
from passes.names import RESERVED

Path = tuple[str | int, ...]


class Signature:
    """How a call's arguments reach forward and the loss function: names for both, whichever way they were passed."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self.forward = inspect.signature(model.forward)
        self.takes_targets = loss_fn is not None
        parameters = self.forward.parameters.values()
        self.positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self.any_positional = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
        has_cache = _asks_for_cache(getattr(model, "config", None))
        self.switch_cache_off = "use_cache" in self.named or (any_keyword and has_cache)
        self.target_names = _parameter_names(loss_fn)[1:] if loss_fn is not None else []

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[inspect.BoundArguments, dict[str, Any]]:
        """forward's arguments, and the targets of the loss function by name in order."""
        rest, targets = dict(kwargs), {}
        if self.takes_targets:
            if not self.any_positional:
                extra = args[len(self.positional) :]
                names = [*self.target_names, *(f"target_{i}" for i in range(len(self.target_names), len(extra)))]
                targets = dict(zip(names, extra, strict=False))
                args = args[: len(self.positional)]
            targets |= {name: rest.pop(name) for name in list(rest) if name not in self.named}
        try:
            if self.switch_cache_off and "use_cache" not in self.forward.bind_partial(*args, **rest).arguments:
                rest.setdefault("use_cache", False)
            return self.forward.bind(*args, **rest), targets
        except TypeError as error:
            raise BadArgument(
                f"forward cannot take these arguments: {error}", use=f"the arguments of forward{self.forward}"
            ) from None

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Path, Any]:
        """Every leaf of the arguments and targets by path."""
        bound, targets = self.bind(args, kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self.forward.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        found = pytree.tree_flatten_with_path(opened({**named, **targets}))[0]
        return {tuple(_key_of(key) for key in path): leaf for path, leaf in found}

    def rebuild(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]
    ) -> tuple[inspect.BoundArguments, dict[str, Any]]:
        """The same call with its tensors replaced, in order of `leaves`."""
        bound, targets = self.bind(args, kwargs)
        leaves, spec = pytree.tree_flatten(opened((dict(bound.arguments), targets)))
        order = iter(tensors)
        new = [next(order) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        arguments, new_targets = pytree.tree_unflatten(new, spec)
        return inspect.BoundArguments(self.forward, arguments), new_targets


def _asks_for_cache(config: Any, depth: int = 2) -> bool:
    """True if a configuration, or one that it holds, has `use_cache` on."""
    if getattr(config, "use_cache", False) is True:
        return True
    inner = vars(config).values() if depth and hasattr(config, "__dict__") else ()
    return any(
        type(value).__module__ not in ("builtins", "torch") and _asks_for_cache(value, depth - 1) for value in inner
    )


def _parameter_names(function: Callable[..., Any]) -> list[str]:
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]


def _key_of(key: Any) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def dotted(path: Path) -> str:
    first, *rest = path
    return str(first) + "".join(f"[{key!r}]" for key in rest)


def input_names(paths: list[Path], taken: set[str]) -> list[str]:
    """A python identifier per input: `idx`, `batch_x` for batch["x"]; never a size's name or one that programs use."""
    names: list[str] = []
    taken = {*taken, *RESERVED, *keyword.kwlist, *dir(builtins)}
    for path in paths:
        name = re.sub(r"\W", "_", "_".join(map(str, path)))
        name = f"input_{name}" if not name or name[0].isdigit() else name
        while name in taken or name in names:
            name += "_"
        names.append(name)
    return names

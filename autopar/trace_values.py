"""Arguments and outputs that are objects: their tensors are found as those of dicts and tuples are.

`torch.utils._pytree` knows lists, tuples, dicts and registered classes. `opened` stands the fields of other objects that
hold tensors in their place: dataclasses, simple namespaces, mappings of one's own, objects with attributes. Flattened,
such an object gives its fields; unflattened, it is an object of the same class with the same fields, made without
calling its constructor. Nothing is registered for a user's class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

_DEEPEST = 8  # objects within objects; more is taken for a cycle


class _Opened:
    """Stands for an object: its class and its fields."""

    def __init__(self, kind: type, fields: dict[str, Any]) -> None:
        self.kind, self.fields = kind, fields


def opened(value: Any, depth: int = _DEEPEST) -> Any:
    """The value with every object that holds tensors made flattenable."""

    def visit(leaf: Any) -> Any:
        fields = _fields(leaf) if depth else None
        if not fields:
            return leaf
        inside = {name: opened(field, depth - 1) for name, field in fields.items()}
        found = any(isinstance(item, torch.Tensor) for item in pytree.tree_leaves(inside))
        return _Opened(type(leaf), inside) if found else leaf

    return pytree.tree_map(visit, value)


def _fields(leaf: Any) -> dict[str, Any] | None:
    if isinstance(leaf, (torch.Tensor, torch.nn.Module, type)) or callable(leaf):
        return None
    if isinstance(leaf, Mapping):
        return dict(leaf) if all(isinstance(key, str) for key in leaf) else None
    if dataclasses.is_dataclass(leaf):
        return {
            field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)
        }
    return dict(vars(leaf)) if hasattr(leaf, "__dict__") else None


def _flatten(value: _Opened) -> tuple[list[Any], Any]:
    return list(value.fields.values()), (value.kind, tuple(value.fields))


def _flatten_with_keys(value: _Opened) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(value)
    return [(pytree.MappingKey(name), child) for name, child in zip(value.fields, children, strict=True)], context


def _unflatten(children: Any, context: Any) -> Any:
    kind, names = context
    fields = dict(zip(names, children, strict=True))
    if issubclass(kind, Mapping):
        return kind(fields)
    made = kind.__new__(kind)
    for name, field in fields.items():
        object.__setattr__(made, name, field)
    return made


pytree.register_pytree_node(_Opened, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)

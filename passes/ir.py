"""Typed accessors for the torch.fx graphs that the passes read and write. The IR is torch.fx.Graph; this is its type system.

A canonical graph holds, in this order: placeholders (the model's tensor inputs, then one int per symbolic size such as `B` and `T`),
`get_attr` nodes (parameters, buffers, constants, under the user's own state_dict names), `call_function` nodes on ATen overloads,
`operator.*` functions on sizes, and one output. Every node that is a tensor has a `TensorType`; sizes have a sympy expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | sympy.Expr

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.complex64: "c64",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def size_symbol(name: str) -> sympy.Symbol:
    """The sympy symbol of a symbolic size; positive integer, so that expressions simplify and compare."""
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass(frozen=True)
class TensorType:
    """dtype and whole (unsplit) shape of a value; each size is an int or a sympy expression over size symbols."""

    dtype: torch.dtype
    shape: tuple[Size, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: module path ("h.0.attn"), the user's file, line and source text ("" and 0 where unknown)."""

    path: str = ""
    file: str = ""
    line: int = 0
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return "  ".join(part for part in (self.path, place, self.source) if part)


def tensor_type(node: fx.Node) -> TensorType | None:
    """The type of a tensor-valued node; None for sizes, tuples and the output."""
    return node.meta.get("tensor")


def output_types(node: fx.Node) -> tuple[TensorType, ...]:
    """The types of the tensors a node yields: one for most, several for ops that return a tuple (`meta["tensors"]`)."""
    single = tensor_type(node)
    return (single,) if single is not None else tuple(node.meta.get("tensors", ()))


def size_expr(node: fx.Node) -> sympy.Expr | None:
    """The expression of an int-valued node (a size); None for tensors."""
    return node.meta.get("size")


def origin(node: fx.Node) -> Origin:
    return node.meta.get("origin", Origin())


def is_trainable(node: fx.Node) -> bool:
    """True if a gradient flows through this value: it is, or is computed from, a parameter that requires grad."""
    return bool(node.meta.get("trainable", False))


def is_state(node: fx.Node) -> bool:
    """True for get_attr nodes: a parameter, buffer or constant."""
    return node.op == "get_attr"


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor-valued argument nodes in order of appearance, repeats kept (`mul(x, x)` gives x twice)."""
    found: list[fx.Node] = []

    def visit(arg: object) -> None:
        if isinstance(arg, fx.Node):
            if tensor_type(arg) is not None:
                found.append(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)
        elif isinstance(arg, dict):
            for item in arg.values():
                visit(item)
        elif isinstance(arg, slice):
            for item in (arg.start, arg.stop, arg.step):
                visit(item)

    visit(node.args)
    visit(node.kwargs)
    return found


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The call_function nodes in order."""
    return (node for node in graph.nodes if node.op == "call_function")


def is_kept(node: fx.Node) -> bool:
    """For fx's dead-code removal: nodes to keep though nothing uses them (updates of buffers). Random ops may go."""
    return node.op in ("placeholder", "output") or bool(node.meta.get("mutates"))

"""Static causal masks become `is_causal=True`: the mask is neither built nor read, a third of attention's time.

Model libraries build a [B, 1, T, T] boolean (or 0 / -inf) mask from aranges and comparisons, through vmapped predicates
and packed sequence detection on the position ids. No pattern would keep up with that. Instead the subgraph of the mask
is *evaluated*: if it depends on no model input and no trainable value, it is a function of the sizes alone, and it is
run for several sizes and compared with the lower triangle. Constants inside the subgraph that exceed the sizes tried (a
sliding window of 4096) could change the mask beyond them; they become an upper limit of the size, kept in
meta["size_limits"] of the attention, and no fold happens if the traced size is already above.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import sympy
import torch
from torch import fx

from passes.canonical_rewrite import Builder, argument, op_name, rewrite
from passes.grouped_heads import MASK_FOLDED
from passes.ir import TensorType, is_trainable, size_expr, tensor_type

aten = torch.ops.aten

# Reads only dtype and shape of its first argument, never the values.
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_TRIED_BATCHES = (2, 3)
_TRIED_LENGTHS = (7, 66)  # the second: longer than small windows and chunks
_MOST_ELEMENTS = 2**26


class _NotStatic(Exception):
    """The mask depends on something other than sizes."""


class _Evaluator:
    """Values of a subgraph for given sizes; memory is the memo, so one evaluator lives for one assignment of sizes."""

    def __init__(self, sizes: Mapping[sympy.Symbol, int], updated: Set[str]) -> None:
        self.sizes = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        self.updated = updated  # buffers that forward changes: their values now say nothing of a later step
        self.memo: dict[fx.Node, Any] = {}
        self.constants: set[int] = set()

    def size(self, expr: Any) -> int:
        return int(sympy.sympify(expr).xreplace(self.sizes))

    def value(self, node: fx.Node) -> Any:
        if node not in self.memo:
            self.memo[node] = self._value(node)
        return self.memo[node]

    def _value(self, node: fx.Node) -> Any:
        expr = size_expr(node)
        if expr is not None:
            return float(expr.xreplace(self.sizes)) if not expr.is_integer else self.size(expr)
        if node.op == "get_attr" and node.meta["kind"] != "parameter" and str(node.target) not in self.updated:
            value = node.meta["value"]
            if value.device.type == "meta" or value.numel() > _MOST_ELEMENTS:
                raise _NotStatic
            return value.detach().cpu()
        if node.op != "call_function" or node.meta.get("random") or node.meta.get("mutates") or is_trainable(node):
            raise _NotStatic
        kind = tensor_type(node)
        if kind is not None and sympy.prod([self.size(size) for size in kind.shape]) > _MOST_ELEMENTS:
            raise _NotStatic
        args, kwargs = list(node.args), dict(node.kwargs)
        if op_name(node.target) in _SHAPE_ONLY and isinstance(args[0], fx.Node):
            args[0] = self.empty(tensor_type(args[0]))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        self.constants |= set(_integers(args))
        target: Any = node.target
        return target(*fx.node.map_arg(args, self.value), **fx.node.map_arg(kwargs, self.value))

    def empty(self, kind: TensorType | None) -> torch.Tensor:
        assert kind is not None
        return torch.empty((), dtype=kind.dtype).expand([self.size(size) for size in kind.shape])


def _integers(arg: Any) -> list[int]:
    if isinstance(arg, (list, tuple)):
        return [found for item in arg for found in _integers(item)]
    return (
        [abs(int(arg))] if isinstance(arg, (int, float)) and not isinstance(arg, bool) and 8 < abs(arg) < 2**62 else []
    )


def _is_lower_triangle(mask: torch.Tensor) -> bool:
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    if not mask.dtype.is_floating_point:
        return False
    return bool(torch.where(lower, mask == 0, mask <= torch.finfo(mask.dtype).min).all())


def causal_limits(
    mask: fx.Node, length: Any, hints: Mapping[sympy.Symbol, int], updated: Set[str]
) -> dict[str, int] | None:
    """None if the mask is not provably causal; else the largest value of each size for which it was proved (usually
    {})."""
    free = sympy.sympify(length).free_symbols
    shape = mask.meta["tensor"].shape
    used = set().union(*(sympy.sympify(size).free_symbols for size in shape), free)
    constants: set[int] = set()
    longest = 0
    tries = zip(_TRIED_BATCHES, _TRIED_LENGTHS, strict=True) if used else [(2, 2)]
    for batch, tokens in tries:
        sizes = {symbol: tokens if symbol in free else batch for symbol in hints}
        evaluator = _Evaluator(sizes, updated)
        try:
            if not _is_lower_triangle(evaluator.value(mask)):
                return None
        except (_NotStatic, RuntimeError, IndexError, TypeError, ValueError):
            return None
        constants |= evaluator.constants
        longest = max(longest, evaluator.size(length))
    if not free:
        return {}
    bounds = [constant for constant in constants if constant > longest]
    if not bounds:
        return {}
    if len(free) > 1 or length not in free or hints[next(iter(free))] > min(bounds):
        return None
    return {str(length): min(bounds)}


def fold_causal_masks(graph: fx.Graph) -> fx.Graph:
    """Every attention whose mask is a lower triangle for all sizes gets `is_causal=True` and no mask."""
    known: dict[fx.Node, dict[str, int] | None] = {}
    hints = {
        node.meta["size"]: node.meta["hint"] for node in graph.nodes if node.op == "placeholder" and "size" in node.meta
    }
    updated = {name for node in graph.nodes for name in node.meta.get("mutates", ())}

    def rule(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op_name(node.target) != "scaled_dot_product_attention":
            return builder.copy(node, args, kwargs)
        mask, causal = argument(node, "attn_mask"), argument(node, "is_causal")
        query, key = argument(node, "query").meta["tensor"].shape, argument(node, "key").meta["tensor"].shape
        if not isinstance(mask, fx.Node) or causal or is_trainable(mask) or query[-2] != key[-2]:
            return builder.copy(node, args, kwargs)
        if mask not in known:
            known[mask] = causal_limits(mask, query[-2], hints, updated)
        limits = known[mask]
        if limits is None:
            return builder.copy(node, args, kwargs)
        dropout = argument(node, "dropout_p")
        rest = {name: value for name, value in kwargs.items() if name not in ("attn_mask", "dropout_p", "is_causal")}
        return builder.copy(node, (*args[:3], None, dropout, True), rest, size_limits=limits, **{MASK_FOLDED: True})

    return rewrite(graph, rule)

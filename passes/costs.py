"""What nodes cost on a given device: the bridge from fx nodes and placements to the numbers of `costmodel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy

from costmodel.cost import Cost
from costmodel.hardware import Hardware, Link
from costmodel.ops import TensorShape, op_cost
from costmodel.roofline import backward_seconds, forward_seconds
from passes.ir import DTYPE_NAMES, Size, TensorType, size_symbol
from passes.op_rule import Strategy
from passes.patterns import Call
from passes.placement import Placement, Replicate, Shard, local_size
from passes.reshard import reshard_seconds

MATMUL_DTYPES = ("f64", "f32", "bf16", "f16")


def op_name(op: Any) -> str:
    """The name of an ATen overload as `costmodel.ops` spells it: "aten.linear"."""
    schema = getattr(op, "_schema", None)
    return schema.name.replace("::", ".") if schema is not None else getattr(op, "__name__", str(op))


def symbolic_cost(call: Call, differentiable: tuple[bool, ...]) -> Cost:
    """The cost of a call as expressions in the size symbols."""
    return op_cost(op_name(call.op), _shapes(call.inputs), _shapes(call.outputs), differentiable, _is_causal(call))


def _is_causal(call: Call) -> bool:
    return "scaled_dot_product_attention" in str(call.op) and bool(call.argument(5, "is_causal", False))


def _shapes(values: tuple[TensorType, ...]) -> tuple[TensorShape, ...]:
    return tuple(TensorShape(value.shape, value.dtype.itemsize, value.is_floating) for value in values)


@dataclass(frozen=True)
class Pricing:
    """Seconds and bytes on one device: the hardware, and the numbers that the symbolic sizes have (one microbatch)."""

    hardware: Hardware
    sizes: Mapping[str, int]
    product_dtype: str | None = None  # what products with weights run in, where not in their values' dtype (fp8)
    stride: int = 1  # ranks from one rank of the axis that values are split over to the next
    _numbers: dict[Size, int] = field(default_factory=dict, compare=False, repr=False)

    def number(self, size: Size) -> int:
        """A size as a number."""
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            self._numbers[size] = int(size.subs({size_symbol(name): value for name, value in self.sizes.items()}))
        return self._numbers[size]

    def shape(self, value: TensorType, placement: Placement | None = None, axis_size: int = 1) -> TensorShape:
        """One rank's numeric shape of a value."""
        numbers = [self.number(size) for size in value.shape]
        if isinstance(placement, Shard):
            size, dim = value.shape[placement.dim], placement.dim
            numbers[dim] = self.number(local_size(size, placement, dim, axis_size)) if isinstance(size, int) else numbers[dim] // axis_size
        return TensorShape(tuple(numbers), value.dtype.itemsize, value.is_floating)

    def num_bytes(self, value: TensorType) -> int:
        """Bytes of the whole value."""
        total = value.dtype.itemsize
        for size in value.shape:
            total *= self.number(size)
        return total

    def cost(
        self, call: Call, differentiable: tuple[bool, ...], strategy: Strategy | None = None, axis_size: int = 1
    ) -> Cost:
        """The numeric cost of a call on one rank under a strategy (None: whole)."""
        placements = (
            strategy.inputs + strategy.outputs if strategy else (None,) * (len(call.inputs) + len(call.outputs))
        )
        shapes = [
            self.shape(value, placement, axis_size)
            for value, placement in zip((*call.inputs, *call.outputs), placements, strict=True)
        ]
        return op_cost(
            op_name(call.op), shapes[: len(call.inputs)], shapes[len(call.inputs) :], differentiable, _is_causal(call)
        )

    def seconds(self, cost: Cost, value: TensorType | None, weights: bool = False) -> tuple[float, float]:
        """(forward, backward) seconds of a numeric cost; `value` gives the dtype of the arithmetic, unless `weights` says that it is a
        product with weights and `product_dtype` is another."""
        dtype = (
            DTYPE_NAMES[value.dtype] if value is not None and DTYPE_NAMES.get(value.dtype) in MATMUL_DTYPES else "f32"
        )
        if weights and self.product_dtype in self.hardware.peak_flops:
            dtype = str(self.product_dtype)
        return (
            forward_seconds(cost, dtype=dtype, hardware=self.hardware),
            backward_seconds(cost, dtype=dtype, hardware=self.hardware),
        )

    def link(self, axis_size: int) -> Link:
        """The links that the axis which values are split over uses if it has this size."""
        return self.hardware.axis_link(axis_size, self.stride)  # type: ignore[return-value]

    def reshard_seconds(
        self, value: TensorType, have: Placement, want: Placement, axis_size: int, trainable: bool, regroup: bool = True
    ) -> float:
        """Forward plus backward seconds of a reshard of one value."""
        return reshard_seconds(
            have, want, num_bytes=self.num_bytes(value), axis_size=axis_size, hardware=self.hardware,
            link=self.link(axis_size), trainable=trainable, regroup=regroup,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def is_number(size: Size) -> bool:
    """True if a size is the same for every batch and sequence."""
    return isinstance(size, int) or not sympy.sympify(size).free_symbols


def whole(count: int) -> tuple[Placement, ...]:
    """`count` times Replicate."""
    return (Replicate(),) * count

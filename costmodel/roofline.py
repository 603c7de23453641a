"""Seconds of an op's forward and backward on a device: the roofline model with a constant launch time.

seconds = max(FLOPs / (peak · matmul_efficiency), bytes / (bandwidth · memory_efficiency)) + kernels · launch; where the cost says
which matrix products the FLOPs are, their shapes decide instead (`costmodel.kernels`). Source: Williams, Waterman and Patterson,
"Roofline", CACM 2009. Price op by op and add the seconds up: of a sum of costs this
gives the maximum of two sums, which is less than the sum of the maxima. The matmul efficiency applies to all FLOPs: an
element-wise op does so few per byte that its bytes decide.
"""

from __future__ import annotations

from typing import Any

from costmodel.cost import Cost, Product
from costmodel.errors import BadArgument
from costmodel.kernels import product_seconds
from costmodel.machine import Hardware

# Types that torch computes with but no profile rates: integer and boolean ops run at the f32 rate, complex ones as
# pairs of f32.
RATED_AS = {"i64": "f32", "i32": "f32", "i16": "f32", "i8": "f32", "u8": "f32", "bool": "f32", "c64": "f32"}


def flops_per_second(dtype: str, hardware: Hardware) -> float:
    """The rate of the best matmuls in `dtype`, efficiency included. BadArgument if the profile has no rate for it."""
    rated = RATED_AS.get(dtype, dtype)
    if rated not in hardware.peak_flops:
        raise BadArgument(f"{hardware.name} has no rate for {dtype}", use=f"one of {', '.join(hardware.peak_flops)}")
    return hardware.peak_flops[rated] * hardware.kernels.dtype_efficiency.get(rated, hardware.matmul_efficiency)


def forward_seconds(cost: Cost, *, dtype: str, hardware: Hardware) -> float:
    """Seconds of the forward of an op with numeric `cost`, communication apart. BadArgument for a symbolic cost: use
    Cost.at first.
    """
    moved = cost.read_bytes + cost.written_bytes
    return _seconds(cost.forward_flops, moved, cost.forward_kernels, cost.forward_products, dtype, hardware, False)


def backward_seconds(cost: Cost, *, dtype: str, hardware: Hardware) -> float:
    """Seconds of the backward of an op with numeric `cost`, communication apart. BadArgument for a symbolic cost: use
    Cost.at first.
    """
    moved = cost.backward_read_bytes + cost.backward_written_bytes
    return _seconds(cost.backward_flops, moved, cost.backward_kernels, cost.backward_products, dtype, hardware, True)


def _seconds(
    flops: Any, moved_bytes: Any, kernels: int, products: tuple[Product, ...], dtype: str, hardware: Hardware, backward: bool
) -> float:
    if not isinstance(flops, (int, float)) or not isinstance(moved_bytes, (int, float)):
        raise BadArgument(
            "a symbolic cost has no seconds",
            why=f"it depends on sizes: {flops} FLOPs",
            use="cost.at({...}) with numbers",
        )
    if not flops and not moved_bytes:
        return 0.0
    rate = flops_per_second(dtype, hardware)
    if products:
        share = flops / len(products)
        compute = sum(product_seconds(product, share, dtype, rate, hardware, backward=backward) for product in products)
    else:
        compute = flops / rate
    memory = moved_bytes / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)
    # A cost put together by hand may not count kernels; work takes one at least.
    return max(compute, memory) + max(kernels, 1) * hardware.launch_seconds

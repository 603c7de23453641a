"""Seconds of a matrix product from its shape: tiles, waves, and the contracted dim's loop.

A kernel computes an output tile [tile_m, tile_n] on one multiprocessor at a time; a device with P of them works in waves of P tiles, and
the last wave takes as long as a full one. A tile of k steps takes k + fill steps' time: filling the pipeline, writing the result. A small
tile loads more bytes a FLOP, so it runs at 1 / (1 + c (1 / tile_m + 1 / tile_n)) of the rate (`_TILE_LOAD`), here relative to the largest.
Where few tiles would leave the device idle, the contracted dim is split over several (`_SPLITS`), which adds the sums' traffic. The
library's heuristic is taken to find the fastest combination. Rows that 16 bytes do not divide need narrower loads
(`misaligned_efficiency`). Sources: NVIDIA, "Matrix Multiplication Background" (tile and wave quantisation) and CUTLASS's efficient GEMM
notes; Dao 2023 (FlashAttention-2, section 3) for attention's blocks of 128 queries.
"""

from __future__ import annotations

import math
from functools import lru_cache

from costmodel.cost import Product
from costmodel.machine import Hardware

# tile_m, tile_n; square and oblong ones of CUTLASS's and cuBLAS's default set
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
_TILE_LOAD = 20.0  # CUTLASS profiler, A100 f16: 128 x 128 at 0.94, 64 x 64 at 0.76 of 256 x 128
_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
_QUERY_BLOCK = 128  # rows of queries that a block of fused attention holds
_ROW_BYTES = 16  # one load of a thread
ELEMENT_BYTES = {"f64": 8, "f32": 4, "tf32": 4, "bf16": 2, "f16": 2, "fp8": 1}


def _tile_rate(tile_m: int, tile_n: int) -> float:
    return (1 + _TILE_LOAD * (1 / 256 + 1 / 128)) / (1 + _TILE_LOAD * (1 / tile_m + 1 / tile_n))


_RATED_TILES = tuple((m, n, 2 * m * n / _tile_rate(m, n)) for m, n in _TILES)


@lru_cache(maxsize=65536)
def product_seconds(product: Product, flops: float, dtype: str, rate: float, hardware: Hardware, *, backward: bool = False) -> float:
    """Seconds of a matrix product's arithmetic where the best shape runs at `rate` FLOPs a second; its memory traffic apart.

    `flops` is what fused attention does (half of the square if causal); the sizes of the other products say it themselves.
    """
    kernels = hardware.kernels
    if product.fused:
        return _attention_seconds(product, flops, hardware.peak_flops.get(dtype, rate), rate, hardware, backward=backward)
    m, n, k, batch = product.m, product.n, product.k, product.batch
    if kernels.multiprocessors == 1:
        return 2.0 * m * n * k * batch / rate
    width = ELEMENT_BYTES.get(dtype, 4)
    if any(row * width % _ROW_BYTES for row in product.rows):
        slow = kernels.misaligned_batched_efficiency if batch > 1 else kernels.misaligned_efficiency
        rate = rate * slow
    each = rate / kernels.multiprocessors
    best = math.inf
    for tile_m, tile_n, tile_flops in _RATED_TILES:
        tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n) * batch
        for split in _SPLITS:
            waves = math.ceil(tiles * split / kernels.multiprocessors)
            seconds = waves * tile_flops * (k / split + kernels.fill_k) / each
            if split > 1:
                seconds += 2 * split * 4 * m * n * batch / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)
            best = min(best, seconds)
            if tiles * split >= kernels.multiprocessors:
                break
    return best


def _attention_seconds(product: Product, flops: float, peak: float, rate: float, hardware: Hardware, *, backward: bool) -> float:
    kernels = hardware.kernels
    efficiency = kernels.attention_backward_efficiency if backward else kernels.attention_forward_efficiency
    reached = rate if efficiency is None else peak * efficiency
    if kernels.multiprocessors == 1:
        return flops / reached
    # Forward blocks hold queries, backward blocks keys; each passes over the other side in its loop.
    held, passed = (product.n, product.m) if backward else (product.m, product.n)
    blocks = math.ceil(held / _QUERY_BLOCK) * product.batch
    waves = math.ceil(blocks / kernels.multiprocessors) * kernels.multiprocessors / blocks
    padding = math.ceil(held / _QUERY_BLOCK) * _QUERY_BLOCK / held
    return flops / reached * waves * padding * (1 + kernels.attention_fill / passed)

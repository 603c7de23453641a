"""Random ops in emitted programs: dropout whose masks agree, or differ, between tensor-parallel ranks as they must.

A whole value gets the same mask on every tp rank, a split one a mask of its own on each; every call draws fresh numbers, so every
microbatch has its own mask. The numbers come from generators seeded once per job (`StageModule.seed`), hence a run can be repeated;
they are not the numbers that the untouched model would draw from torch's global generator.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from autopar.program import StageModule


def dropout(x: torch.Tensor, p: float, stage: StageModule, *, sharded: bool = False) -> torch.Tensor:
    """`x` with each element zeroed with probability `p` and the rest scaled by 1 / (1 - p); `x` itself in evaluation."""
    if not stage.training or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=stage.generator(sharded))
    return x * keep.div_(1 - p)


def attention_with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, stage: StageModule, *,
    attn_mask: torch.Tensor | None = None, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, sharded: bool = False,
) -> torch.Tensor:  # fmt: skip
    """scaled_dot_product_attention with dropout on the probabilities, drawn as `dropout` draws; torch's own without it (in evaluation)."""
    if not stage.training or dropout_p == 0.0:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return dropout(scores.softmax(-1), dropout_p, stage, sharded=sharded) @ value

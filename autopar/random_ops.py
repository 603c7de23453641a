"""Random ops in emitted programs: numbers that agree, or differ, between tensor-parallel ranks as they must.

Each stage has two generators, started from one seed per job (`StageModule.seed`, parallelize(seed=...)): one that is the same on all
tp ranks, for whole values, and one of each tp rank's own, for split values. A rank runs the same random ops in the same order as its
tp peers, so whole values stay equal. Every call draws fresh numbers: each microbatch and each step has its own.

Identical to the single-device model: the distributions, the fraction dropped, the scaling, that a gradient passes through the mask of its
own forward, and that evaluation drops nothing. A job repeated with the same seed, mesh and plan draws the same numbers, in threads as in
processes. Not identical: the numbers. The untouched model draws from torch's global generator, once for the whole batch; here
microbatches, stages and shards draw their own, so another seed, mesh, schedule or number of microbatches gives other masks.
`torch.manual_seed` has no effect on a job, and a job leaves torch's global generator as it was.

A random value that several stages use (noise, a mask) is drawn by one of them and sent to the others.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from autopar.program import StageModule

_DEFAULT_GENERATOR = threading.Lock()  # torch has one for all threads; while an op draws from it, it is one stage's own


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
    attn_mask: torch.Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, sharded: bool = False,
) -> torch.Tensor:  # fmt: skip
    """scaled_dot_product_attention with dropout on the probabilities, drawn as `dropout` draws; torch's own without it (in evaluation)."""
    if not stage.training or dropout_p == 0.0:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = torch.ops.aten._safe_softmax.default(
        scores, -1
    )  # rows that see nothing give zeros, as torch's own do
    return dropout(probabilities, dropout_p, stage, sharded=sharded) @ value


def draw(op: torch._ops.OpOverload, *args: Any, stage: StageModule, sharded: bool = False, **kwargs: Any) -> Any:
    """Any other random op, such as `aten.rand_like.default`, drawing from the stage's generator. Its `train` flag is off in evaluation."""
    if not stage.training:
        args, kwargs = _in_evaluation(op, args, kwargs)
    own = stage.generator(sharded)
    cuda = own.device.type == "cuda"
    default = torch.cuda.default_generators[own.device.index or 0] if cuda else torch.default_generator
    with _DEFAULT_GENERATOR:
        before = default.get_state()
        default.set_state(own.get_state())
        try:
            return op(*args, **kwargs)
        finally:
            own.set_state(default.get_state())
            default.set_state(before)


def _in_evaluation(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for position, argument in enumerate(op._schema.arguments):
        if argument.name in ("train", "training"):
            if position < len(args):
                return (*args[:position], False, *args[position + 1 :]), kwargs
            return args, {**kwargs, argument.name: False}
    return args, kwargs

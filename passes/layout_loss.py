"""A loss that one kernel computes from logits as they are: what a layout's `fused_loss` makes of a rank's calls.

PyTorch's cross entropy of f32 logits holds 10 bytes of 16-bit logits forward and 12 backward: the logits, their copy in f32, log
probabilities and their gradient, the copy's gradient. A fused kernel reads the logits, converts in registers, and writes their gradient
in their own dtype: 4 bytes. Source: Dao et al., flash-attention's `CrossEntropyLoss`; apex's `xentropy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from passes.layout_recompute import LineCall
from passes.local_ops import sharded_cross_entropy

LOSSES = frozenset({torch.ops.aten.cross_entropy_loss.default, sharded_cross_entropy})
_CASTS = frozenset({torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default})


def with_fused_loss(calls: Sequence[LineCall]) -> list[LineCall]:
    """The calls with every cross entropy reading what its logits were cast from; it keeps that and nothing else."""
    found = list(calls)
    for place, call in enumerate(calls):
        if call.node.target not in LOSSES:
            continue
        read = call.used
        for before in range(place - 1, -1, -1):
            cast = calls[before]
            if cast.node.target in _CASTS and cast.made & read:
                read = read & ~cast.made | cast.used
                for k in range(before, place):
                    if found[k].used & cast.made:  # views of the copy
                        found[k] = replace(found[k], used=found[k].used & ~cast.made | cast.used)
                found[before] = replace(cast, made=0, saved=0, used=0)
        found[place] = replace(call, made=call.made & ~call.saved, saved=read, used=read)
    return found

"""The precisions that a model can be trained in: one row each.

The single-device reference of the mixed ones is PyTorch's own: parameters and gradients as the model has them (float32), forward and
loss under `torch.autocast`, and for fp16 a `torch.amp.GradScaler`. The model is traced under autocast, so that each cast is an ordinary
node: sharded with the tensor it casts (a weight's cast is done on the shard), printed by the plan and in the programs. So which ops
compute in which dtype is what autocast says for the device that the ranks compute on; its lists for CPUs and for CUDA differ.

What follows from the casts: an all_reduce or a send moves a value in the dtype that the value has, so sums over tp of bf16 products are
made in bf16 (by NCCL and gloo alike); gradients of parameters arrive in the parameter's dtype, and are accumulated over microbatches and
summed over ranks in it (float32 under mixed precision).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from costmodel.errors import BadArgument


@dataclass(frozen=True)
class Precision:
    """A row of PRECISIONS. `autocast`: the dtype of torch.autocast, None without it; `state`: the dtype of floating parameters,
    buffers and inputs, None for what the user's have; `scales_loss`: whether gradients are kept from underflow by loss scaling."""

    name: str
    autocast: torch.dtype | None
    state: torch.dtype | None
    scales_loss: bool
    note: str  # for the printed plan


_MIXED = (
    "matmuls in {0} by torch.autocast's casts; parameters, their gradients, accumulation and sums of them over ranks in the "
    "parameters' dtype; activations summed and sent in their own"
)

PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", None, None, False, ""),
        Precision("bf16-mixed", torch.bfloat16, None, False, "bf16-mixed: " + _MIXED.format("bf16")),
        Precision("fp16-mixed", torch.float16, None, True, "fp16-mixed: " + _MIXED.format("f16") + "; the loss is scaled"),
        Precision("bf16", None, torch.bfloat16, False, "bf16: parameters, gradients, activations and all sums of them in bf16"),
    )
}  # fmt: skip


def precision_named(name: str) -> Precision:
    """The row of a name. BadArgument for another."""
    if not isinstance(name, str) or name not in PRECISIONS:
        raise BadArgument(f"precision = {name!r}", use=f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]

"""The loop over RULES: every legal way to run every op, on 2 and 3 shards, equals the whole op, forward and gradient.

A row needs an example below; deliberately wrong rows must be caught by the same loop.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_check import Case, Example, above, below, buffer, call, check, f, flags, offsets, unit
from rule_examples import FURTHER

from costmodel.errors import BadArgument
from passes import contraction_patterns, index_patterns, patterns, rules
from passes.contraction_patterns import NONE, SUM
from passes.op_rule import OpRule
from passes.patterns import elementwise
from passes.rules import RULES, register, rule_of

aten = torch.ops.aten
F32, F64 = torch.float32, torch.float64

# ---- examples: op -> calls -------------------------------------------------------------------------------------------

_POSITIVE = {
    "log",
    "log10",
    "log1p",
    "log2",
    "sqrt",
    "rsqrt",
    "acos",
    "asin",
    "atanh",
    "logit",
    "erfinv",
    "digamma",
    "lgamma",
    "reciprocal",
}
_EXTRA: dict[str, tuple[Any, ...]] = {
    "clamp": (-0.5, 0.5), "clamp_max": (0.3,), "clamp_min": (0.3,), "dropout": (0.5, False), "threshold": (0.1, 0.2),
        "full_like": (2.0,),
    "pow.Tensor_Scalar": (3,), "remainder.Scalar": (0.7,), "fmod.Scalar": (0.7,), "rsub.Scalar": (2.0,),
        "add.Scalar": (2.0,),
    "sub.Scalar": (2.0,), "mul.Scalar": (2.0,), "div.Scalar": (2.0,), "to.dtype": (F64,),
    "eq.Scalar": (0.1,), "ne.Scalar": (0.1,), "lt.Scalar": (0.1,), "le.Scalar": (0.1,), "gt.Scalar": (0.1,),
        "ge.Scalar": (0.1,),
}  # fmt: skip

X, XC, ROWS = f(6, 12), f(12, 6), f(6, 2, 12)

EXAMPLES: dict[str, list[Example]] = {
    "pow.Scalar": [call(2.0, X)],
    "acosh": [call(above(6, 12))],
    "div.Scalar_mode": [call(X, 0.3, rounding_mode="floor")],
    "empty_like": [call(X, values=False)],
    "floor_divide.Scalar": [call(buffer(6, 12), 0.3)],
    "bitwise_not": [call(flags(6, 12))],
    **{name: [call(below(9, 6, 12), 2)] for name in ("bitwise_and.Scalar", "bitwise_or.Scalar", "bitwise_xor.Scalar",
                                                     "bitwise_left_shift.Tensor_Scalar",
                                                     "bitwise_right_shift.Tensor_Scalar")},
    **{name: [call(flags(6, 12), flags(12))] for name in ("bitwise_and.Tensor", "bitwise_or.Tensor",
        "bitwise_xor.Tensor",
                                                          "logical_and", "logical_or", "logical_xor")},
    "to.dtype_layout": [call(X, dtype=F64)],
    "to.device": [call(X, "cpu", F64)],
    "_to_copy": [call(X, dtype=F64)],
    "broadcast_tensors": [call([f(6, 1), f(12)])],
    "type_as": [call(X, f(3))],
    "prelu": [call(f(6, 12, 2), f(12)), call(X, f(1))],
    "add.Tensor": [call(X, X), call(f(6, 1, 12), f(6, 1)), call(f(12), X), call(X, 2.0), call(X, f(), alpha=2)],
    "sub.Tensor": [call(X, f(12)), call(X, 2.0)],
    "mul.Tensor": [call(X, X), call(f(6, 1), X), call(X, 2.0), call(f(6, 12), flags(12))],
    "div.Tensor": [call(X, unit(12)), call(X, 2.0)],
    "pow.Tensor_Tensor": [call(unit(6, 12), f(12))],
    "floor_divide": [call(buffer(6, 12), buffer(12))],
    "div.Tensor_mode": [call(X, unit(12), rounding_mode="floor")],
    "remainder.Tensor": [call(buffer(6, 12), unit(12))],
    "fmod.Tensor": [call(buffer(6, 12), unit(12))],
    "addcmul": [call(X, X, f(12))],
    "addcdiv": [call(X, X, unit(12))],
    "lerp.Tensor": [call(X, X, f(12))],
    "lerp.Scalar": [call(X, X, 0.3)],
    "clamp.Tensor": [call(X, unit(12), f(6, 12))],
    "where.self": [call(flags(6, 1), X, f(12))],
    "where.ScalarSelf": [call(flags(6, 12), 1.0, X)],
    "where.ScalarOther": [call(flags(6, 12), X, 1.0)],
    "where.Scalar": [call(flags(6, 12), 1.0, 2.0)],
    "masked_fill.Scalar": [call(f(2, 6, 12), flags(6, 12), float("-inf"))],
    "masked_fill.Tensor": [call(X, flags(12), f())],
    # views
    "view": [call(f(6, 2, 12), [6, 24]), call(f(6, 24), [6, 2, 12]), call(f(36, 4), [6, 6, 2, 2]),
        call(f(6, 1, 12), [6, 12, 1]), call(f(6, 12), [-1])],
    "reshape": [call(f(6, 36), [6, 3, 12]), call(f(6, 4), [4, 6]), call(f(12, 6), [6, 12]), call(f(24, 2), [2, 12, 2])],
    "_unsafe_view": [call(f(6, 2, 12), [12, 12])],
    "unsqueeze": [call(X, 1), call(X, -1)],
    "squeeze.dim": [call(f(6, 1, 12), 1), call(f(2, 12), 0), call(f(3, 12), 0)],
    "squeeze.dims": [call(f(1, 6, 1, 12), [0, 2]), call(f(2, 1, 3, 12), [0, 1, 2])],
    "squeeze.default": [call(f(1, 6, 1)), call(f(2, 6, 3))],
    "flatten.using_ints": [call(f(6, 2, 12), 1), call(f(6, 2, 12), 0, 1)],
    "expand": [call(f(6, 1, 12), [6, 4, 12]), call(f(12), [6, 12]), call(f(6, 1), [2, -1, 12])],
    "repeat": [call(f(6, 12), [1, 2]), call(f(6, 12), [2, 1, 1]), call(f(6, 12), [3, 2])],
    "repeat_interleave.self_int": [call(f(6, 12), 2, 1), call(f(6, 12), 3, 0), call(f(6, 12), 2)],
    "transpose.int": [call(f(6, 2, 12), 0, 2), call(f(6, 2, 12), -1, 1)],
    "permute": [call(f(6, 2, 12), [2, 0, 1])],
    "t": [call(X), call(f(6))],
    "split_with_sizes": [call(f(6, 36), [12, 12, 12], 1), call(f(6, 24), [12, 6, 6], -1), call(f(12, 2), [6, 6])],
    "cat": [call([f(6, 6), f(6, 12)], 1), call([f(6, 6), f(6, 6)], -1), call([f(6), f(12)])],
    "stack": [call([X, X], 1), call([X, X, X])],
    "glu": [call(f(6, 24)), call(f(12, 6), 0)],
    "slice.Tensor": [call(X, 1, 2, 7), call(X, 0, 0, 3), call(X), call(f(6, 24), 1, 0, 24, 2),
        call(f(6, 24), -1, 1, 2**63 - 1, 2), call(f(6, 24), 1, 2, 24, 2), call(f(6, 24), 1, 0, 12, 2), call(f(18, 6), 0, 2, None, 3)],
    "select.int": [call(f(6, 3, 12), 1, 1)],
    "slice_scatter": [call(X, f(6, 4), 1, 2, 6), call(X, f(3, 12), 0, 1, 4)],
    "select_scatter": [call(X, f(6), 1, 3)],
    "flip": [call(f(6, 2, 12), [1]), call(X, [0, 1])],
    "roll": [call(f(6, 2, 12), [1], [1]), call(X, [1])],
    "pad": [call(f(6, 2, 12), [0, 0, 1, 2]), call(X, [1, 1], "constant", 3.0), call(f(6, 12, 4), [1, 1], "reflect")],
    "constant_pad_nd": [call(f(6, 2, 12), [0, 0, 1, 2], 1.0)],
    # contractions
    "linear": [call(ROWS, f(12, 12)), call(ROWS, f(6, 12), f(6)), call(f(12), f(6, 12))],
    "mm": [call(f(6, 12), f(12, 6))],
    "mv": [call(f(6, 12), f(12))],
    "dot": [call(f(12), f(12))],
    "outer": [call(f(6), f(12))],
    "bmm": [call(f(6, 12, 6), f(6, 6, 12))],
    "matmul": [call(f(6, 2, 12), f(12, 6)), call(f(6, 12), f(12)), call(f(12), f(6, 12, 6)), call(f(12), f(12)),
        call(f(6, 1, 2, 12), f(12, 12, 2)),
               call(f(12), f(12, 6)), call(f(6, 12, 2), f(2))],
    "addmm": [call(f(6), f(12, 6), f(6, 6)), call(f(12, 6), f(12, 12), f(12, 6)),
        call(f(1, 6), f(12, 6), f(6, 6), beta=2)],
    "baddbmm": [call(f(6, 2, 12), f(6, 2, 6), f(6, 6, 12)), call(f(12), f(6, 6, 6), f(6, 6, 12)),
        call(f(6, 1, 12), f(6, 6, 6), f(6, 6, 12))],
    "einsum": [call("bqhd,bkhd->bhqk", [f(6, 2, 12, 4), f(6, 3, 12, 4)]),
        call("...d,de->...e", [f(6, 2, 12), f(12, 6)]), call("ij,jk", [f(6, 12), f(12, 6)]),
               call("ii->i", [f(6, 6)]), call("abc,ac,b->cb", [f(6, 12, 2), f(6, 2), f(12)])],
    "scaled_dot_product_attention": [
        call(f(6, 12, 4, 2), f(6, 12, 4, 2), f(6, 12, 4, 6), None, 0.0, True),
        call(f(6, 12, 4, 2), f(6, 6, 5, 2), f(6, 6, 5, 2), enable_gqa=True),
        call(f(6, 12, 4, 2), f(6, 2, 5, 2), f(6, 2, 5, 2), None, 0.0, True, enable_gqa=True),
        call(f(6, 12, 4, 2), f(6, 1, 5, 2), f(6, 1, 5, 2), enable_gqa=True),
        call(f(6, 12, 4, 2), f(6, 12, 5, 2), f(6, 12, 5, 2), flags(6, 1, 4, 5)),
        call(f(6, 12, 4, 2), f(6, 12, 5, 2), f(6, 12, 5, 2), f(12, 4, 5)),
        call(f(6, 12, 4, 2), f(6, 6, 5, 2), f(6, 6, 5, 2), f(6, 12, 1, 5), enable_gqa=True),
        call(f(6, 4, 2), f(6, 5, 2), f(6, 5, 2), f(4, 5)),
    ],
    "_grouped_mm": [
        call(f(7, 24), f(3, 24, 48), offsets(7, 3), floats=F32), call(f(24, 8), f(8, 48), offsets(8, 2), floats=F32),
        call(f(3, 24, 48), f(48, 8), offsets(8, 3), floats=F32), call(f(3, 24, 48), f(3, 48, 24), floats=F32),
    ],
    "conv_transpose1d": [call(f(6, 6, 8), f(6, 12, 3)), call(f(6, 6, 8), f(6, 12, 3), f(12), [2], [1])],
    "conv_transpose2d.input": [
        call(f(2, 12, 4, 4), f(12, 6, 3, 3), f(12), [2, 2], [1, 1], [1, 1], 2),
        call(f(2, 12, 4, 4), f(12, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], 6),
        call(f(12, 4, 4), f(12, 1, 3, 3), None, groups=12)],
    "conv_transpose3d.input": [call(f(2, 6, 3, 3, 3), f(6, 6, 2, 2, 2))],
    "conv1d": [call(f(6, 6, 8), f(12, 6, 3)), call(f(6, 6, 8), f(12, 6, 3), f(12), [2], [1]),
        call(f(6, 24, 8), f(12, 12, 3), None, [1], [1], [1], 2)],
    "conv2d": [call(f(2, 6, 5, 5), f(12, 6, 3, 3)), call(f(6, 6, 5, 5), f(6, 6, 3, 3), f(6), [2, 2], [1, 1]),
        call(f(6, 5, 5), f(12, 6, 3, 3)),
               call(f(2, 12, 4, 4), f(24, 6, 3, 3), f(24), [1, 1], [1, 1], [1, 1], 2),
               call(f(2, 6, 4, 4), f(6, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 6),
               call(f(2, 24, 4, 4), f(12, 2, 3, 3), f(12), groups=12)],
    "conv3d": [call(f(2, 6, 3, 3, 3), f(6, 6, 2, 2, 2))],
    # reductions
    "sum": [call(X)],
    "sum.dim_IntList": [call(f(6, 2, 12), [1]), call(f(6, 2, 12), [0, -1], True), call(X, [])],
    "mean": [call(X)],
    "mean.dim": [call(f(6, 2, 12), [1]), call(f(6, 2, 12), [-1], True), call(f(6, 12), [0, 1])],
    "amax": [call(f(6, 2, 12), [1]), call(X, [1], True), call(X)],
    "amin": [call(f(6, 2, 12), [1]), call(X)],
    "argmax": [call(X, 1), call(X, 0, True), call(X)],
    "argmin": [call(X, -1)],
    "max.dim": [call(f(6, 2, 12), 1), call(X, 0, True)],
    "min.dim": [call(f(6, 2, 12), 1)],
    "any.dim": [call(flags(6, 12), 1)],
    "any.dims": [call(flags(6, 2, 12), [1])],
    "all.dim": [call(flags(6, 12), 1)],
    "all.dims": [call(flags(6, 2, 12), [1])],
    "prod.dim_int": [call(f(6, 2, 12), 1)],
    "logsumexp": [call(f(6, 2, 12), [1], True)],
    "std.dim": [call(f(6, 2, 12), [1])],
    "std.correction": [call(f(6, 2, 12), [1], correction=0), call(X)],
    "var.dim": [call(f(6, 2, 12), [1], False, True)],
    "var.correction": [call(f(6, 3, 12), [1], correction=1, keepdim=True)],
    "var_mean.dim": [call(f(6, 2, 12), [1])],
    "var_mean.correction": [call(f(6, 2, 12), [1])],
    **{name: [call(X)] for name in ("max", "min", "prod", "std", "var", "var_mean", "norm.Scalar")},
    "any": [call(flags(6, 12))],
    "all": [call(flags(6, 12))],
    "linalg_vector_norm": [call(f(6, 3, 12), 2, [1], True), call(X, 1)],
    "norm.ScalarOpt_dim": [call(f(6, 3, 12), 2, [1])],
    "softmax.int": [call(f(6, 3, 12), 1), call(X, -1, F64)],
    "_softmax": [call(f(6, 3, 12), 1, False)],
    "log_softmax.int": [call(f(6, 3, 12), 1)],
    "_log_softmax": [call(f(6, 3, 12), 1, False)],
    "cumprod": [call(f(6, 3, 12), 1)],
    "logcumsumexp": [call(f(6, 3, 12), 1)],
    "cumsum": [call(f(6, 3, 12), 1)],
    "layer_norm": [call(f(6, 2, 12), [12], f(12), f(12)), call(f(6, 2, 12), [2, 12]), call(X, [12], f(12))],
    "rms_norm": [call(f(6, 2, 12), [12], f(12), 1e-5), call(X, [12])],
    "group_norm": [call(f(6, 12, 3, 3), 2, f(12), f(12)), call(f(6, 12, 3), 3), call(f(2, 12, 3), 6, f(12), f(12)),
        call(f(6, 12), 12, f(12))],
    "batch_norm": [call(f(6, 12, 3, 3), f(12), f(12), buffer(12), buffer(12), training, 0.1, 1e-5,
        False) for training in (True, False)]
                  + [call(f(6, 12), f(12), f(12), None, None, True, 0.1, 1e-5, False),
                  call(f(6, 12), None, None, buffer(12), buffer(12), True, 0.1, 1e-5, False)],
    "max_pool1d": [call(f(6, 12, 4), [2])],
    "max_pool2d": [call(f(6, 12, 4, 4), [2, 2]), call(f(6, 4, 4), [3, 3], [1, 1], [1, 1])],
    "max_pool3d": [call(f(6, 12, 2, 2, 2), [2, 2, 2])],
    "adaptive_max_pool1d": [call(f(6, 12, 4), [2])],
    "adaptive_max_pool2d": [call(f(6, 12, 4, 4), [2, 2])],
    "max_pool1d_with_indices": [call(f(6, 12, 4), [2])],
    "max_pool2d_with_indices": [call(f(6, 12, 4, 4), [2, 2])],
    "pixel_shuffle": [call(f(6, 2, 4, 3, 3), 2)],
    "pixel_unshuffle": [call(f(6, 2, 1, 4, 4), 2)],
    "avg_pool1d": [call(f(6, 12, 4), [2])],
    "avg_pool2d": [call(f(6, 12, 4, 4), [2, 2])],
    "avg_pool3d": [call(f(6, 12, 2, 2, 2), [2, 2, 2])],
    "adaptive_avg_pool1d": [call(f(6, 12, 4), [1])],
    "adaptive_avg_pool2d": [call(f(6, 12, 4, 4), [1, 1])],
    "upsample_nearest1d.vec": [call(f(6, 12, 4), None, [2.0])],
    "upsample_nearest2d.vec": [call(f(6, 12, 2, 2), None, [2.0, 2.0])],
    "upsample_linear1d.vec": [call(f(6, 12, 4), [8], False, None)],
    "upsample_bilinear2d.vec": [call(f(6, 12, 2, 2), [4, 4], False, None)],
    "upsample_bicubic2d.vec": [call(f(6, 12, 2, 2), [4, 4], False, None)],
    "tril": [call(f(6, 12, 3, 3)), call(f(3, 3), 1)],
    "triu": [call(f(6, 12, 3, 3), 1)],
    # lookups and losses
    "embedding": [call(f(12, 6), below(12, 6, 2)), call(f(12, 6), below(12, 6, 12), 7),
        call(f(12, 6), below(4, 6), -1, True)],
    "cross_entropy_loss": [call(f(6, 12), below(12, 6)), call(f(6, 12), below(12, 6), None, NONE),
        call(f(6, 12), below(12, 6), None, SUM, 3),
                           call(f(6, 12, 6), below(12, 6, 6), None, 1, 3, 0.1), call(f(6, 12), unit(6, 12)),
                           call(f(6, 12), below(12, 6), buffer(12)),
                           call(f(12), below(12))],
    "nll_loss_nd": [call(f(6, 12), below(12, 6)), call(f(6, 12, 6), below(12, 6, 6), None, NONE),
        call(f(6, 12), below(12, 6), None, SUM, 3),
                    call(f(6, 12), below(12, 6), buffer(12))],
    **{name: [call(X, X), call(X, X, NONE), call(X, X, SUM)] for name in ("mse_loss", "l1_loss", "smooth_l1_loss",
        "huber_loss")},
    "kl_div": [call(X, unit(6, 12), reduction) for reduction in (NONE, 1, SUM)],
    "soft_margin_loss": [call(X, buffer(6, 12), reduction) for reduction in (NONE, 1, SUM)],
    "binary_cross_entropy": [call(unit(6, 12), unit(6, 12)), call(unit(6, 12), unit(6, 12), None, SUM),
        call(unit(6, 12), unit(6, 12), buffer(6, 12), NONE)],
    "binary_cross_entropy_with_logits": [call(X, unit(6, 12)), call(X, unit(6, 12), None, None, SUM),
        call(X, unit(6, 12), None, buffer(12), SUM),
                                         call(X, unit(6, 12), None, buffer(12), NONE)],
    "poisson_nll_loss": [call(X, unit(6, 12), True, False, 1e-8, 1), call(X, unit(6, 12), True, False, 1e-8, SUM),
        call(X, unit(6, 12), True, False, 1e-8, NONE)],
    "index.Tensor": [call(f(5, 6, 12), [below(5, 6, 2)]), call(f(6, 5, 12), [None, below(5, 6)]),
        call(f(6, 5, 4, 12), [None, below(5, 6, 1), below(4, 12)]),
                     call(f(5, 6, 4, 12), [below(5, 6), None, below(4, 6)]), call(f(6, 5), [None, below(5)])],
    "index_select": [call(f(6, 5, 12), 1, below(5, 6))],
    "gather": [call(f(6, 5, 12), 1, below(5, 6, 2, 12)), call(f(6, 5), 1, below(5, 4, 2))],
    "scatter.src": [call(f(6, 2, 12), 1, below(1, 6, 1, 12), f(6, 1, 12))],
    "scatter.value": [call(f(6, 3, 12), 1, below(3, 6, 2, 12), 2.0)],
    "scatter_add": [call(f(6, 3, 12), 1, below(3, 6, 2, 12), f(6, 2, 12))],
    "scatter_reduce.two": [call(f(6, 3, 12), 1, below(3, 6, 2, 12), f(6, 2, 12), "sum")],
    "one_hot": [call(below(5, 6, 12), 5)],
    "sort": [call(f(6, 3, 12), 1), call(X)],
    "argsort": [call(f(6, 3, 12), 1)],
    "sort.stable": [call(f(6, 3, 12), stable=True, dim=1)],
    "argsort.stable": [call(f(6, 3, 12), stable=True, dim=1)],
    "topk": [call(f(6, 5, 12), 2, 1), call(X, 3)],
    "lstm.input": [call(f(2, 3, 6), [f(1, 2, 6), f(1, 2, 6)], [f(24, 6), f(24, 6), f(24), f(24)], True, 1, 0.0, False,
        False, True)],
    "gru.input": [call(f(2, 3, 6), f(1, 2, 6), [f(18, 6), f(18, 6), f(18), f(18)], True, 1, 0.0, False, False, True)],
    **{name: [call(f(2, 3, 6), f(1, 2, 6), [f(6, 6), f(6, 6), f(6), f(6)], True, 1, 0.0, False, False,
        True)] for name in ("rnn_tanh.input", "rnn_relu.input")},
    "diagonal_scatter": [call(f(6, 6), f(6))],
    "diag_embed": [call(f(6, 12))],
    "index_put": [call(X, [below(6, 4)], f(4, 12))],
    "index_add": [call(X, 0, below(6, 4), f(4, 12))],
    "histc": [call(buffer(12), 4, 0, 2)],
}  # fmt: skip


def examples(op: Any) -> list[Example]:
    """The example calls of an op: those of the table, or an elementwise one."""
    overload = op._overloadname
    name = op._schema.name.removeprefix("aten::")
    full = name if overload == "default" else f"{name}.{overload}"
    for key in (full, f"{name}.{overload}"):
        if key in EXAMPLES:
            return EXAMPLES[key]
        if key in FURTHER:
            return FURTHER[key]
    if RULES[op].annotation is not elementwise:
        return []
    tensors = [a for a in op._schema.arguments if str(a.type) == "Tensor" and not a.kwarg_only]
    first = unit(6, 12) if name in _POSITIVE else f(6, 12)
    return [call(first, *([f(12)] if len(tensors) == 2 else []), *_EXTRA.get(full, ()))]


@pytest.mark.parametrize("row", RULES.values(), ids=lambda row: str(row.op).removeprefix("aten."))
def test_every_strategy_of_every_row_equals_the_whole_op(row):
    calls = examples(row.op)
    assert calls, f"{row.op} has a rule and no example: add one to EXAMPLES"
    for example in calls:
        for axis_size in (2, 3):
            check(row, example, axis_size)
    bindings = [row.binding(Case(row.op, example).call) for example in calls]
    free = [name for binding in bindings for group in binding.choices for name in group]
    assert not free or any(
        binding.sizes[name] % 6 == 0 for binding in bindings for group in binding.choices for name in group
    ), f"no example of {row.op} can be split: give it dims of 6 or 12"


def _library_op(name: str) -> Any:
    import transformers.integrations.moe  # noqa: F401 - it makes the ops

    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op).default


LIBRARY_EXAMPLES = {
    "transformers::grouped_mm_fallback": [call(f(7, 12), f(3, 12, 6), offsets(7, 3)),
        call(f(7, 6), f(3, 6, 12), offsets(5, 3))],
}  # fmt: skip


@pytest.mark.parametrize("name", rules.LIBRARY_ROWS)
def test_rows_of_ops_that_other_libraries_bring(name):
    op = _library_op(name)
    row = rule_of(op)
    for example in LIBRARY_EXAMPLES[name]:
        for axis_size in (2, 3):
            assert {("k",), ("n",)} == check(row, example, axis_size)
    assert op not in RULES
    wrong = OpRule(op, "t k, [e] k n, [e] -> t n")
    with pytest.raises(AssertionError, match=r"ranks, Strategy"):
        check(wrong, call(f(6, 12), f(3, 12, 6), offsets(6, 3)), 2)


# ---- rows that are wrong ---------------------------------------------------------------------------------------------


def _transposed_wrongly(call: Any) -> str:
    return "a b c -> b a c"


def _unscaled_mean(call: Any) -> str:
    return patterns.reduce()(call).replace("[", "").replace("]", "")


_other_rows = rules.Local(
    lambda node: (
        lambda weight, indices, axis: aten.embedding.default(weight, indices % weight.shape[0]),
        (*node.args[:2], "axis"),
        {},
    ),
    rules.PARTIAL,
)

WRONG: list[tuple[str, OpRule, Example]] = [
    ("softmax along a split dim", OpRule(aten.softmax.int, elementwise), call(X, -1)),
    ("layer norm of a part of a row", OpRule(aten.layer_norm.default, "... n, n, n -> ... n"),
        call(f(6, 12), [12], f(12), f(12))),
    ("a number added on every rank", OpRule(aten.add.Tensor, elementwise, linear="sum"), call(X, 2.0)),
    ("a bias added on every rank", OpRule(aten.linear.default, contraction_patterns.linear, linear="each"),
        call(X, f(6, 12), f(6))),
    ("a bias beside a split contraction", OpRule(aten.linear.default, "... k, n k, n -> ... n"),
        call(X, f(6, 12), f(6))),
    ("the wrong dims exchanged", OpRule(aten.transpose.int, _transposed_wrongly), call(f(6, 6, 6), 0, 2)),
    ("gelu of partial sums", OpRule(aten.gelu.default, elementwise, linear="sum"), call(X)),
    ("a product of two partial sums", OpRule(aten.mul.Tensor, elementwise, linear="sum"), call(X, X)),
    ("a quotient by partial sums", OpRule(aten.div.Tensor, elementwise, linear="each"), call(X, unit(6, 12))),
    ("a split vocabulary without its rewrite", OpRule(aten.embedding.default, patterns.embedding),
        call(f(12, 6), below(12, 6))),
    ("rows of another shard", OpRule(aten.embedding.default, patterns.embedding, local={"v": _other_rows}),
        call(f(12, 6), below(12, 6))),
    ("letters exchanged in a matmul", OpRule(aten.mm.default, "k m, n k -> m n"), call(f(6, 6), f(6, 6))),
    ("a sum that is a maximum", OpRule(aten.amax.default, patterns.summed), call(X, [1])),
    ("a mean of parts", OpRule(aten.mean.dim, _unscaled_mean), call(X, [1])),
    ("heads that take no part in their groups",
        OpRule(aten.scaled_dot_product_attention.default, "b h [t] [d], b k [s] [d], b k [s] [d] -> b h [t] [d]"),
     call(f(2, 12, 4, 2), f(2, 6, 4, 2), f(2, 6, 4, 2), enable_gqa=True)),
    ("a fused dim split in halves",
        OpRule(aten.split_with_sizes.default, lambda call: ("a (d [k]) -> a d, a d", (("k", 2),)), sizes=1),
        call(f(6, 12), [6, 6], 1)),
    ("sizes spelled and not localised", OpRule(aten.view.default, patterns.reshape, linear="sum"),
        call(f(6, 24), [6, 2, 12])),
    ("both halves of a gate as one", OpRule(aten.glu.default, lambda call: ("a (d [k]) -> a d", (("k", 2),))),
        call(f(6, 24))),
    ("statistics of a part of the batch", OpRule(aten.batch_norm.default, "n c, c, c, [m], [v] -> n c"),
     call(f(6, 12), f(12), f(12), buffer(12), buffer(12), True, 0.1, 1e-5, False)),
    ("groups split and not counted", OpRule(aten.conv2d.default, contraction_patterns.convolution),
        call(f(2, 12, 4, 4), f(12, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 12)),
    ("channels of other groups", OpRule(aten.conv2d.default, "n c [x] [y], o i [k] [l] -> n o [z] [w]"),
        call(f(2, 12, 4, 4), f(12, 6, 3, 3), None, [1, 1], [1, 1], [1, 1], 2)),
    ("a bias of a convolution on every rank", OpRule(aten.conv_transpose1d.default, "n i [x], i o [k], o -> n o [y]"),
        call(f(6, 6, 8), f(6, 12, 3), f(12))),
    ("tokens of other experts", OpRule(aten._grouped_mm.default, "t k, [e] k n, [e] -> t n"),
        call(f(12, 24), f(3, 24, 48), offsets(12, 3), floats=F32)),
    ("every second entry of another half", OpRule(aten.slice.Tensor, lambda call: ("a ([s] d) -> a d", (("s", 2),))),
        call(f(6, 24), 1, 0, 24, 2)),
    ("a transform of a part", OpRule(aten._fft_r2c.default, lambda call: ("a (d [k]) -> a d", (("k", 1),))),
        call(f(6, 12), [1], 0, False)),
    ("a norm of a part of a row", OpRule(aten._weight_norm_interface.default, "a b, a 1 -> a b, a 1"), call(f(6, 12), f(6, 1))),
    ("places in bags as sums", OpRule(aten.embedding_bag.default, index_patterns.bags),
        call(f(5, 12), below(5, 9), Example.counts(0, 4), False, 1)),
    ("a matrix split in rows", OpRule(aten._linalg_det.default, lambda call: "b m [n] -> b, b m [n], b [n]"), call(f(1, 6, 6))),
    ("written rows of another shard", OpRule(aten.index_copy.default, "d c, [s], [s] c -> d c"),
        call(X, 0, Example.counts(0, 3), f(2, 12))),
    ("groups of channels", OpRule(aten.group_norm.default, "n c [d], c, c -> n c [d]"),
        call(f(6, 12, 4), 2, f(12), f(12))),
    ("a dim that a shard makes vanish", OpRule(aten.squeeze.dim, patterns.reshape, linear="sum"), call(f(2, 12), 0)),
    ("a mean over rows and classes", OpRule(aten.mse_loss.default, "a b, a b -> "), call(X, X)),
    ("whole weights of a sum", OpRule(aten.cross_entropy_loss.default, "n [c], n -> "), call(f(6, 12), below(12, 6))),
    ("a rolled dim", OpRule(aten.roll.default, elementwise), call(X, [1], [1])),
    ("sorted parts", OpRule(aten.sort.default, "... -> ..., ..."), call(X)),
]  # fmt: skip


@pytest.mark.parametrize(("why", "row", "example"), WRONG, ids=[why for why, _, _ in WRONG])
def test_a_wrong_row_is_caught(why, row, example):
    with pytest.raises(AssertionError, match=r"ranks, Strategy"):
        for axis_size in (2, 3):
            check(row, example, axis_size)


def test_a_row_added_from_outside_and_a_row_that_exists():
    with pytest.raises(BadArgument, match="already has a rule"):
        register(aten.relu.default, "... -> ...")
    op = aten.special_modified_bessel_k0.default
    assert op not in RULES
    try:
        register(op, "... -> ...")
        check(RULES[op], call(unit(6, 12)), 2)
    finally:
        RULES.pop(op, None)

"""RULES: how each ATen op may be split over a mesh axis. One row an op, in the notation of `passes.annotation`.

A row gives an annotation; splitting one of its names is one legal way to run the op: arguments that have the name are
split, the others are whole with a partial gradient, results that lack it are partial sums. On top of that every op may run whole
(all `Replicate`, or all `Copied`), and ops marked `linear` pass partial sums on:

- "sum":   all arguments partial -> result partial (add, views, casts)
- "first": the first partial, the others whole -> partial (division)
- "each":  any one partial, the others whole -> partial (multiplication, matmul)

`local` names what one rank computes instead where its shard alone is not enough (a split vocabulary). An op without a row
stays whole; `register` adds a row from user code.

Padding. A name that the axis does not divide may be split only by rows that say so, because the last ranks' pieces then
have entries that are not the model's (`passes.placement`). Every such row keeps two things true of them: they are finite,
and a gradient of zero gives a gradient of zero. `padding` of a row:

- "keeps": results that have the name are finite there, and so is the derivative; nothing is summed over the name
- "first": where only the first argument has the name (a quotient: every entry is divided by what true entries are)
- "mask": where no boolean argument has the name (what a mask puts in is infinite; it may see nothing in padding)
- "zeros": and zeros stay zeros: views, casts, multiples. What such ops make of a parameter is zero in its padding
- "product": and a name that the results lack is summed over products, so it may be padded where an argument is zero
  there: a parameter, whose padding is zeros. (What comes back to *its* padding is no gradient of anything; it is dropped.)

With `local`, the function is told the true size of the name (`size=`) and takes a parameter as the rank holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from costmodel.errors import BadArgument
from passes import contraction_patterns, patterns
from passes.local_ops import sharded_batch_norm, sharded_cross_entropy, sharded_embedding
from passes.op_rule import Annotation, Local, OpRule
from passes.patterns import Call, Op, elementwise, reduce, spatial, whole_dims
from passes.placement import PARTIAL, REPLICATE
from passes.rule_table import TABLE

aten = torch.ops.aten

# ---- what one rank computes where its shard is not enough ------------------------------------------------------------


def _rewrite_embedding(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    weight, indices, *rest = node.args
    padding_idx = rest[0] if rest else node.kwargs.get("padding_idx", -1)
    return sharded_embedding, (weight, indices, "axis"), {} if padding_idx == -1 else {"padding_idx": padding_idx}


def _rewrite_batch_norm(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return sharded_batch_norm, (*(given[name] for name in names[:5]), "axis"), {name: given[name] for name in names[5:]}


def _rewrite_cross_entropy(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    names = ("weight", "reduction", "ignore_index", "label_smoothing")
    given = dict(zip(names, node.args[2:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in names}
    given.pop("weight", None)
    defaults = {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    kwargs = {key: value for key, value in given.items() if value != defaults[key]}
    return sharded_cross_entropy, (*node.args[:2], "axis"), kwargs


# ---- the table -------------------------------------------------------------------------------------------------------

_UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "ceil", "celu", "clamp", "clamp_max",
        "clamp_min", "cos",
    "cosh", "digamma", "dropout", "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac", "gelu",
        "hardshrink",
    "hardsigmoid", "hardswish", "hardtanh", "isfinite", "isinf", "isnan", "leaky_relu", "lgamma", "log", "log10",
        "log1p", "log2",
    "log_sigmoid", "logical_not", "logit", "mish", "nan_to_num", "reciprocal", "relu", "relu6", "round", "rsqrt",
        "selu", "sigmoid",
    "sign", "silu", "sin", "sinc", "sinh", "softplus", "softshrink", "sqrt", "square", "tan", "tanh", "threshold",
        "trunc",
    "pow.Tensor_Scalar", "pow.Scalar", "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar",
    "remainder.Scalar", "fmod.Scalar", "rsub.Scalar", "add.Scalar", "sub.Scalar", "floor_divide.Scalar",
        "div.Scalar_mode",
    "bitwise_and.Scalar", "bitwise_or.Scalar", "bitwise_xor.Scalar", "bitwise_left_shift.Tensor_Scalar",
    "bitwise_right_shift.Tensor_Scalar", "ones_like", "full_like", "empty_like",
)  # fmt: skip
_BINARY = (
    "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "maximum", "minimum", "max.other",
        "min.other",
    "fmax", "fmin", "pow.Tensor_Tensor", "atan2", "hypot", "logaddexp", "fmod.Tensor", "remainder.Tensor",
        "floor_divide",
    "div.Tensor_mode", "rsub.Tensor", "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "logical_and",
        "logical_or",
    "logical_xor", "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar", "masked_fill.Scalar",
        "masked_fill.Tensor",
    "addcmul", "addcdiv", "lerp.Tensor", "lerp.Scalar", "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor",
)  # fmt: skip
_LINEAR_UNARY = ("neg", "clone", "detach", "alias", "contiguous", "to.dtype", "to.dtype_layout", "to.device",
    "_to_copy", "mul.Scalar",
                 "div.Scalar", "zeros_like", "positive", "broadcast_tensors")  # fmt: skip
_SOFTMAX = ("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "cumprod", "logcumsumexp")
_REDUCTIONS = ("amax", "amin", "argmax", "argmin", "max.dim", "min.dim", "any.dim", "any.dims", "all.dim", "all.dims",
    "prod.dim_int",
               "logsumexp", "std.dim", "std.correction", "var.dim", "var.correction", "var_mean.dim",
               "var_mean.correction")  # fmt: skip
_FULL_REDUCTIONS = ("max", "min", "any", "all", "prod", "std", "var", "var_mean", "linalg_vector_norm", "norm.Scalar")
_LOSSES = (("mse_loss", 2), ("l1_loss", 2), ("smooth_l1_loss", 2), ("huber_loss", 2), ("kl_div", 2),
    ("soft_margin_loss", 2),
           ("binary_cross_entropy", 3), ("binary_cross_entropy_with_logits", 4), ("poisson_nll_loss", 5))  # fmt: skip
_POOLS = (("max_pool1d", 1), ("max_pool2d", 2), ("max_pool3d", 3), ("adaptive_max_pool1d", 1),
    ("adaptive_max_pool2d", 2),
          ("max_pool1d_with_indices", 1), ("max_pool2d_with_indices", 2))  # fmt: skip
_LINEAR_POOLS = (("avg_pool1d", 1), ("avg_pool2d", 2), ("avg_pool3d", 3), ("adaptive_avg_pool1d", 1),
    ("adaptive_avg_pool2d", 2),
                 ("upsample_nearest1d.vec", 1), ("upsample_nearest2d.vec", 2), ("upsample_linear1d.vec", 1),
                 ("upsample_bilinear2d.vec", 2), ("upsample_bicubic2d.vec", 2), ("tril", 2), ("triu", 2))  # fmt: skip
_WHOLE = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", "diagonal_scatter", "histc")


def _op(name: str) -> Op:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and (overload or "default") in getattr(aten, packet).overloads()


def _rows(names: Sequence[str], annotation: Annotation, linear: str = "", padding: Any = "") -> tuple[OpRule, ...]:
    """A row for each op of the names that this torch has."""
    return tuple(OpRule(_op(name), annotation, linear=linear, padding=padding) for name in names if _exists(name))


# Elementwise ops that are finite, with a finite derivative, wherever their arguments are finite. Not log, sqrt, division
# by a tensor and other powers, which zeros break; nor exp and its kin, which large values break.
_FINITE = frozenset((
    "abs", "asinh", "atan", "bitwise_not", "ceil", "clamp", "clamp_max", "clamp_min", "cos", "dropout", "elu", "erf", "erfc", "floor",
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "isfinite", "isinf", "isnan", "leaky_relu", "log_sigmoid",
    "logical_not", "mish", "nan_to_num", "relu", "relu6", "round", "selu", "celu", "sigmoid", "sign", "silu", "sin", "softplus",
    "softshrink", "square", "tanh", "threshold", "trunc", "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar",
    "rsub.Scalar", "add.Scalar", "sub.Scalar", "ones_like", "full_like", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor",
    "gt.Tensor", "ge.Tensor", "maximum", "minimum", "max.other", "min.other", "fmax", "fmin", "rsub.Tensor", "bitwise_and.Tensor",
    "bitwise_or.Tensor", "bitwise_xor.Tensor", "logical_and", "logical_or", "logical_xor", "addcmul", "lerp.Tensor", "lerp.Scalar",
    "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor",
))  # fmt: skip


def _finite(call: Call) -> str:
    """Of an elementwise op by its name."""
    name = str(call.op).removeprefix("aten.").removesuffix(".default")
    power = call.args[1] if name == "pow.Tensor_Scalar" else 0.5
    whole = isinstance(power, (int, float)) and power >= 1 and power == int(power)
    masks = name.startswith(("where.", "masked_fill."))
    return "keeps" if name in _FINITE or whole else "mask" if masks else ""


def _finite_reduction(call: Call) -> str:
    """Of an op that looks across whole dims: of rows of zeros, the same. Roots (std, norms) and products of rows are not."""
    names = ("amax", "amin", "argmax", "argmin", "max", "min", "any", "all", "logsumexp", "var", "softmax", "log_softmax")
    return "keeps" if str(call.op).removeprefix("aten.").partition(".")[0].removeprefix("_") in names else ""


def _quotient(call: Call) -> str:
    return "zeros" if len(call.inputs) == 1 else "first"


def _only_number(kind: str) -> Callable[[Call], str]:
    """Where one argument is a tensor and the other a number."""
    return lambda call: kind if len(call.inputs) == 1 else ""


def _with_eps(position: int) -> Callable[[Call], str]:
    """Of a norm: rows of zeros are finite where something is added before the root."""
    return lambda call: "keeps" if call.argument(position, "eps", None) != 0 else ""


def _linear_if(positions: int) -> Callable[[Call], str]:
    """A sum of as many tensors: partial sums may stay so if no number is added besides."""
    return lambda call: "sum" if len(call.inputs) == positions else ""


def _linear_without_bias(call: Call) -> str:
    return "each" if len(call.inputs) == 2 else ""


def _linear_pad(call: Call) -> str:
    return "sum" if call.argument(2, "mode", "constant") != "constant" or not call.argument(3, "value", None) else ""


ELEMENTWISE: tuple[OpRule, ...] = (
    *_rows((*_UNARY, *_BINARY), elementwise, padding=_finite),
    *_rows(_LINEAR_UNARY, elementwise, linear="sum", padding=_only_number("zeros")),
    OpRule(aten.type_as.default, patterns.like_first),
    OpRule(aten.prelu.default, patterns.per_channel),
    OpRule(aten.add.Tensor, elementwise, linear=_linear_if(2), padding="keeps"),
    OpRule(aten.sub.Tensor, elementwise, linear=_linear_if(2), padding="keeps"),
    OpRule(aten.mul.Tensor, elementwise, linear="each", padding="zeros"),
    OpRule(aten.div.Tensor, elementwise, linear="first", padding=_quotient),
)

VIEWS: tuple[OpRule, ...] = (
    OpRule(aten.view.default, patterns.reshape, linear="sum", sizes=1, padding="zeros"),
    OpRule(aten.reshape.default, patterns.reshape, linear="sum", sizes=1, padding="zeros"),
    OpRule(aten._unsafe_view.default, patterns.reshape, linear="sum", sizes=1, padding="zeros"),
    OpRule(aten.unsqueeze.default, patterns.reshape, linear="sum", padding="zeros"),
    OpRule(aten.squeeze.dim, patterns.squeeze, linear="sum", padding="zeros"),
    OpRule(aten.squeeze.dims, patterns.squeeze, linear="sum", padding="zeros"),
    OpRule(aten.squeeze.default, patterns.squeeze, linear="sum", padding="zeros"),
    OpRule(aten.flatten.using_ints, patterns.reshape, linear="sum", padding="zeros"),
    OpRule(aten.expand.default, patterns.expand, linear="sum", sizes=1, padding="zeros"),
    OpRule(aten.repeat.default, patterns.repeat, linear="sum", padding="zeros"),
    OpRule(aten.repeat_interleave.self_int, patterns.repeat_interleave, linear="sum", padding="zeros"),
    OpRule(aten.transpose.int, patterns.permute, linear="sum", padding="zeros"),
    OpRule(aten.permute.default, patterns.permute, linear="sum", padding="zeros"),
    OpRule(aten.t.default, patterns.permute, linear="sum", padding="zeros"),
    OpRule(aten.split_with_sizes.default, patterns.split, linear="sum", sizes=1, padding="zeros"),
    OpRule(aten.cat.default, patterns.cat, linear="sum", padding="zeros"),
    OpRule(aten.stack.default, patterns.stack, linear="sum", padding="zeros"),
    OpRule(aten.glu.default, patterns.glu, padding="keeps"),
    OpRule(aten.slice.Tensor, patterns.sliced, linear="sum", padding="zeros"),
    OpRule(aten.select.int, patterns.select, linear="sum", padding="zeros"),
    OpRule(aten.slice_scatter.default, patterns.slice_scatter, linear="sum", padding="zeros"),
    OpRule(aten.select_scatter.default, patterns.select_scatter, linear="sum", padding="zeros"),
    OpRule(aten.flip.default, whole_dims(name="dims"), linear="sum", padding="zeros"),
    OpRule(aten.roll.default, whole_dims(at=2, name="dims", default=()), linear="sum", padding="zeros"),
    OpRule(aten.pad.default, patterns.pad, linear=_linear_pad),
    OpRule(aten.constant_pad_nd.default, patterns.pad),
)

CONTRACTIONS: tuple[OpRule, ...] = (
    OpRule(aten.linear.default, contraction_patterns.linear, linear=_linear_without_bias, padding="product"),
    OpRule(aten.mm.default, "m k, k n -> m n", linear="each", padding="product"),
    OpRule(aten.mv.default, "m k, k -> m", linear="each", padding="product"),
    OpRule(aten.dot.default, "k, k -> ", linear="each"),
    OpRule(aten.outer.default, "m, n -> m n", linear="each", padding="product"),
    OpRule(aten.bmm.default, "b m k, b k n -> b m n", linear="each", padding="product"),
    OpRule(aten.matmul.default, contraction_patterns.matmul, linear="each", padding="product"),
    OpRule(aten.addmm.default, contraction_patterns.addmm, padding="keeps"),
    OpRule(aten.baddbmm.default, contraction_patterns.baddbmm, padding="keeps"),
    OpRule(aten.einsum.default, contraction_patterns.einsum, linear="each", padding="product"),
    OpRule(aten.scaled_dot_product_attention.default, contraction_patterns.attention, padding="mask"),
    *(
        OpRule(_op(f"{name}{end}"), pattern, linear=_linear_without_bias, counts={"g": "groups"})
        for name, pattern, ends in (
            ("conv", contraction_patterns.convolution, ("1d", "2d", "3d", "1d.padding", "2d.padding", "3d.padding")),
            ("conv_transpose", contraction_patterns.transposed_convolution, ("1d", "2d.input", "3d.input")),
        )
        for end in ends
    ),
    *_rows(("_grouped_mm",), contraction_patterns.grouped_matmul, linear="each"),
)

REDUCTIONS: tuple[OpRule, ...] = (
    OpRule(aten.sum.default, patterns.summed, linear="sum"),
    OpRule(aten.sum.dim_IntList, patterns.summed, linear="sum", padding="keeps"),
    OpRule(aten.mean.default, reduce(), linear="sum"),
    OpRule(aten.mean.dim, reduce(), linear="sum", padding="keeps"),
    *_rows(_REDUCTIONS, reduce(), padding=_finite_reduction),
    *_rows(_FULL_REDUCTIONS, reduce(-1)),
    OpRule(aten.linalg_vector_norm.default, reduce(2)),
    OpRule(aten.norm.ScalarOpt_dim, reduce(2)),
    *_rows(_SOFTMAX, whole_dims(), padding=_finite_reduction),
    OpRule(aten.cumsum.default, whole_dims(), linear="sum", padding="keeps"),
    OpRule(aten.layer_norm.default, patterns.layer_norm, padding=_with_eps(4)),
    OpRule(aten.rms_norm.default, patterns.layer_norm, padding=_with_eps(3)),
    OpRule(aten.group_norm.default, patterns.group_norm, counts={"g": "num_groups"}),
    OpRule(
        aten.batch_norm.default, patterns.batch_norm, local={"c": Local(_rewrite_batch_norm, PARTIAL, all_reduces=1)}
    ),
    *(OpRule(_op(name), spatial(dims)) for name, dims in _POOLS if _exists(name)),
    *(OpRule(_op(name), spatial(dims), linear="sum") for name, dims in _LINEAR_POOLS if _exists(name)),
)

LOOKUPS: tuple[OpRule, ...] = (
    OpRule(
        aten.embedding.default, patterns.embedding, local={"v": Local(_rewrite_embedding, PARTIAL, padding=True)},
        padding="keeps",
    ),
    OpRule(
        aten.cross_entropy_loss.default,
        contraction_patterns.cross_entropy,
        local={"c": Local(_rewrite_cross_entropy, REPLICATE, all_reduces=2, padding=True)},
    ),
    OpRule(aten.nll_loss_nd.default, contraction_patterns.nll_loss),
    *(OpRule(_op(name), contraction_patterns.loss(at)) for name, at in _LOSSES),
    OpRule(aten.index.Tensor, patterns.index),
    OpRule(aten.index_select.default, patterns.index_select),
    OpRule(aten.gather.default, patterns.by_index),
    *_rows(("scatter.src", "scatter.value", "scatter_add", "scatter_reduce.two"), patterns.by_index),
    OpRule(aten.one_hot.default, patterns.one_hot),
    *_rows(("sort", "argsort"), whole_dims(default=-1)),
    OpRule(aten.sort.stable, whole_dims(at=2)),
    OpRule(aten.argsort.stable, whole_dims(at=2)),
    OpRule(aten.topk.default, whole_dims(at=2, resized=True)),
    *_rows(_WHOLE, patterns.all_whole),
)

FURTHER: tuple[OpRule, ...] = tuple(
    OpRule(_op(name), rows.annotation, linear=rows.linear, **rows.options)
    for rows in TABLE
    for name in rows.names.split()
    if _exists(name)
)

RULES: dict[Op, OpRule] = {
    row.op: row for row in (*ELEMENTWISE, *VIEWS, *CONTRACTIONS, *REDUCTIONS, *LOOKUPS, *FURTHER)
}

# Ops of other libraries by qualified name, since they exist only once those libraries are imported: annotation, linear.
LIBRARY_ROWS: dict[str, tuple[Annotation, str]] = {
    "transformers::grouped_mm_fallback": ("[t] k, [e] k n, [e] -> [t] n", "each"),
}


def rule_of(op: Op) -> OpRule | None:
    """The row of an op, None if it has none."""
    if op in RULES:
        return RULES[op]
    row = LIBRARY_ROWS.get(getattr(getattr(op, "_schema", None), "name", ""))
    return OpRule(op, row[0], linear=row[1]) if row else None


def register(op: Op, annotation: Annotation, *, linear: str = "", padding: str = "") -> None:
    """Add a row for an op, such as one made with torch.library: `register(torch.ops.mine.swish.default, "... -> ...")`.

    `padding="keeps"`: the op and its derivative are finite wherever its arguments are, so that dims which the axis does not divide may
    be split too. BadArgument if the op has a row already.
    """
    if rule_of(op) is not None:
        raise BadArgument(f"{op} already has a rule", use="another op, or edit its row in passes/rules.py")
    RULES[op] = OpRule(op, annotation, linear=linear, padding=padding)

"""RULES: how each ATen op may be split over a mesh axis. One row an op, in the notation of `passes.annotation`.

A row gives an annotation; splitting one of its names is one legal way to run the op: arguments that have the name are
split,
the others are whole with a partial gradient, results that lack it are partial sums. On top of that every op may run
whole
(all `Replicate`, or all `Copied`), and ops marked `linear` pass partial sums on:

- "sum":   all arguments partial -> result partial (add, views, casts)
- "first": the first partial, the others whole -> partial (division)
- "each":  any one partial, the others whole -> partial (multiplication, matmul)

`local` names what one rank computes instead where its shard alone is not enough (a split vocabulary). An op without a
row stays
whole; `register` adds a row from user code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from costmodel.errors import BadArgument
from passes import contraction_patterns, patterns
from passes.annotation import Binding, Cut, bind
from passes.ir import Size
from passes.local_ops import sharded_batch_norm, sharded_cross_entropy, sharded_embedding
from passes.patterns import Call, Op, Pattern, call_of, elementwise, reduce, spatial, whole_dims
from passes.placement import COPIED, PARTIAL, REPLICATE, Placement, Shard

__all__ = ["RULES", "Call", "Local", "Op", "OpRule", "Strategy", "call_of", "register", "strategies"]

aten = torch.ops.aten


Annotation = str | Pattern
Rewrite = Callable[[fx.Node], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Local:
    """What a rank computes when a name is split: `rewrite(node)` gives function, args and kwargs; "axis" stands for
    the axis.

    `output` is the placement of the result; `all_reduces` counts the all_reduces of one value per row that it does
    itself.
    """

    rewrite: Rewrite
    output: Placement
    all_reduces: int = 0


@dataclass(frozen=True)
class OpRule:
    """One row. `sizes` is the position of the argument that spells the result's shape (views) or the split sizes
    ("split")."""

    op: Op
    annotation: Annotation
    linear: str | Callable[[Call], str] = ""
    sizes: int | None = None
    local: Mapping[str, Local] = field(default_factory=dict)

    def binding(self, call: Call) -> Binding:
        """The annotation bound to a call's shapes. ValueError if it does not fit."""
        text = self.annotation if isinstance(self.annotation, str) else self.annotation(call)
        text, sizes = (text, ()) if isinstance(text, str) else text
        return bind(
            text, tuple(value.shape for value in call.inputs), tuple(value.shape for value in call.outputs), sizes
        )


@dataclass(frozen=True)
class Strategy:
    """One legal way to run a call on an axis: a placement for every tensor argument and result; `split` is the split
    name."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    split: tuple[str, ...] = ()
    local: Local | None = None

    @property
    def is_split(self) -> bool:
        """True if each rank does its share of the work."""
        return any(isinstance(p, Shard) for p in (*self.inputs, *self.outputs))


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


# ---- the table
# --------------------------------------------------------------------------------------------------------

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
          ("max_pool1d_with_indices", 1), ("max_pool2d_with_indices", 2), ("pixel_shuffle", 3),
          ("pixel_unshuffle", 3))  # fmt: skip
_LINEAR_POOLS = (("avg_pool1d", 1), ("avg_pool2d", 2), ("avg_pool3d", 3), ("adaptive_avg_pool1d", 1),
    ("adaptive_avg_pool2d", 2),
                 ("upsample_nearest1d.vec", 1), ("upsample_nearest2d.vec", 2), ("upsample_linear1d.vec", 1),
                 ("upsample_bilinear2d.vec", 2), ("upsample_bicubic2d.vec", 2), ("tril", 2), ("triu", 2))  # fmt: skip
_WHOLE = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", "diagonal_scatter", "diag_embed", "histc",
    "index_put",
          "index_add")  # fmt: skip


def _op(name: str) -> Op:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and (overload or "default") in getattr(aten, packet).overloads()


def _rows(names: Sequence[str], annotation: Annotation, linear: str = "") -> tuple[OpRule, ...]:
    """A row for each op of the names that this torch has."""
    return tuple(OpRule(_op(name), annotation, linear=linear) for name in names if _exists(name))


def _linear_if(positions: int) -> Callable[[Call], str]:
    """A sum of as many tensors: partial sums may stay so if no number is added besides."""
    return lambda call: "sum" if len(call.inputs) == positions else ""


def _linear_without_bias(call: Call) -> str:
    return "each" if len(call.inputs) == 2 else ""


def _linear_pad(call: Call) -> str:
    return "sum" if call.argument(2, "mode", "constant") != "constant" or not call.argument(3, "value", None) else ""


ELEMENTWISE: tuple[OpRule, ...] = (
    *_rows((*_UNARY, *_BINARY), elementwise),
    *_rows(_LINEAR_UNARY, elementwise, linear="sum"),
    OpRule(aten.type_as.default, patterns.like_first),
    OpRule(aten.prelu.default, patterns.per_channel),
    OpRule(aten.add.Tensor, elementwise, linear=_linear_if(2)),
    OpRule(aten.sub.Tensor, elementwise, linear=_linear_if(2)),
    OpRule(aten.mul.Tensor, elementwise, linear="each"),
    OpRule(aten.div.Tensor, elementwise, linear="first"),
)

VIEWS: tuple[OpRule, ...] = (
    OpRule(aten.view.default, patterns.reshape, linear="sum", sizes=1),
    OpRule(aten.reshape.default, patterns.reshape, linear="sum", sizes=1),
    OpRule(aten._unsafe_view.default, patterns.reshape, linear="sum", sizes=1),
    OpRule(aten.unsqueeze.default, patterns.reshape, linear="sum"),
    OpRule(aten.squeeze.dim, patterns.squeeze, linear="sum"),
    OpRule(aten.squeeze.dims, patterns.squeeze, linear="sum"),
    OpRule(aten.squeeze.default, patterns.squeeze, linear="sum"),
    OpRule(aten.flatten.using_ints, patterns.reshape, linear="sum"),
    OpRule(aten.expand.default, patterns.expand, linear="sum", sizes=1),
    OpRule(aten.repeat.default, patterns.repeat, linear="sum"),
    OpRule(aten.repeat_interleave.self_int, patterns.repeat_interleave, linear="sum"),
    OpRule(aten.transpose.int, patterns.permute, linear="sum"),
    OpRule(aten.permute.default, patterns.permute, linear="sum"),
    OpRule(aten.t.default, patterns.permute, linear="sum"),
    OpRule(aten.split_with_sizes.default, patterns.split, linear="sum", sizes=1),
    OpRule(aten.cat.default, patterns.cat, linear="sum"),
    OpRule(aten.stack.default, patterns.stack, linear="sum"),
    OpRule(aten.glu.default, patterns.glu),
    OpRule(aten.slice.Tensor, whole_dims(at=1, default=0, resized=True), linear="sum"),
    OpRule(aten.select.int, patterns.select, linear="sum"),
    OpRule(aten.slice_scatter.default, patterns.slice_scatter, linear="sum"),
    OpRule(aten.select_scatter.default, patterns.select_scatter, linear="sum"),
    OpRule(aten.flip.default, whole_dims(name="dims"), linear="sum"),
    OpRule(aten.roll.default, whole_dims(at=2, name="dims", default=()), linear="sum"),
    OpRule(aten.pad.default, patterns.pad, linear=_linear_pad),
    OpRule(aten.constant_pad_nd.default, patterns.pad),
)

CONTRACTIONS: tuple[OpRule, ...] = (
    OpRule(aten.linear.default, contraction_patterns.linear, linear=_linear_without_bias),
    OpRule(aten.mm.default, "m k, k n -> m n", linear="each"),
    OpRule(aten.mv.default, "m k, k -> m", linear="each"),
    OpRule(aten.dot.default, "k, k -> ", linear="each"),
    OpRule(aten.outer.default, "m, n -> m n", linear="each"),
    OpRule(aten.bmm.default, "b m k, b k n -> b m n", linear="each"),
    OpRule(aten.matmul.default, contraction_patterns.matmul, linear="each"),
    OpRule(aten.addmm.default, contraction_patterns.addmm),
    OpRule(aten.baddbmm.default, contraction_patterns.baddbmm),
    OpRule(aten.einsum.default, contraction_patterns.einsum, linear="each"),
    OpRule(aten.scaled_dot_product_attention.default, contraction_patterns.attention),
    OpRule(aten.conv1d.default, contraction_patterns.convolution, linear=_linear_without_bias),
    OpRule(aten.conv2d.default, contraction_patterns.convolution, linear=_linear_without_bias),
    OpRule(aten.conv3d.default, contraction_patterns.convolution, linear=_linear_without_bias),
)

REDUCTIONS: tuple[OpRule, ...] = (
    OpRule(aten.sum.default, patterns.summed, linear="sum"),
    OpRule(aten.sum.dim_IntList, patterns.summed, linear="sum"),
    OpRule(aten.mean.default, reduce(), linear="sum"),
    OpRule(aten.mean.dim, reduce(), linear="sum"),
    *_rows(_REDUCTIONS, reduce()),
    *_rows(_FULL_REDUCTIONS, reduce(-1)),
    OpRule(aten.linalg_vector_norm.default, reduce(2)),
    OpRule(aten.norm.ScalarOpt_dim, reduce(2)),
    *_rows(_SOFTMAX, whole_dims()),
    OpRule(aten.cumsum.default, whole_dims(), linear="sum"),
    OpRule(aten.layer_norm.default, patterns.layer_norm),
    OpRule(aten.rms_norm.default, patterns.layer_norm),
    OpRule(aten.group_norm.default, patterns.group_norm),
    OpRule(
        aten.batch_norm.default, patterns.batch_norm, local={"c": Local(_rewrite_batch_norm, PARTIAL, all_reduces=1)}
    ),
    *(OpRule(_op(name), spatial(dims)) for name, dims in _POOLS if _exists(name)),
    *(OpRule(_op(name), spatial(dims), linear="sum") for name, dims in _LINEAR_POOLS if _exists(name)),
)

LOOKUPS: tuple[OpRule, ...] = (
    OpRule(aten.embedding.default, patterns.embedding, local={"v": Local(_rewrite_embedding, PARTIAL)}),
    OpRule(
        aten.cross_entropy_loss.default,
        contraction_patterns.cross_entropy,
        local={"c": Local(_rewrite_cross_entropy, REPLICATE, all_reduces=2)},
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

RULES: dict[Op, OpRule] = {row.op: row for row in (*ELEMENTWISE, *VIEWS, *CONTRACTIONS, *REDUCTIONS, *LOOKUPS)}


def register(op: Op, annotation: Annotation, *, linear: str = "") -> None:
    """Add a row for an op, such as one made with torch.library: `register(torch.ops.mine.swish.default, "... -> ...")`.

    BadArgument if the op has a row already.
    """
    if op in RULES:
        raise BadArgument(f"{op} already has a rule", use="another op, or edit its row in passes/rules.py")
    RULES[op] = OpRule(op, annotation, linear=linear)


# ---- from rows to strategies
# --------------------------------------------------------------------------------------------


def _linear_strategies(kind: str, call: Call, differentiable: Sequence[bool]) -> list[Strategy]:
    inputs, after = len(call.inputs), (PARTIAL,) * len(call.outputs)
    sums = [value.is_floating for value in call.inputs]  # masks and counts are no sums
    if kind == "sum":
        return [Strategy((PARTIAL,) * inputs, after)] if inputs and all(sums) else []
    positions = {"first": range(1), "each": range(inputs), "": range(0)}[kind]
    return [
        Strategy(tuple(PARTIAL if k == at else _whole(differentiable[k]) for k in range(inputs)), after)
        for at in positions
        if sums[at]
    ]


def _whole(differentiable: bool) -> Placement:
    return COPIED if differentiable else REPLICATE


def strategies(
    rule: OpRule | None, call: Call, *, axis_size: int, differentiable: Sequence[bool], result_differentiable: bool,
    cuts: Callable[[Binding, tuple[str, ...]], Sequence[Cut]], splittable: Callable[[Size], bool],
) -> list[Strategy]:  # fmt: skip
    """Every legal way to run `call` over an axis of `axis_size` ranks, the whole one first.

    `differentiable[i]`: a gradient flows into argument i. `cuts` gives the block structures to try for a split name,
    `splittable`
    says whether a name of that size may be split at all (batch and sequence may be reserved for other axes).
    """
    inputs, outputs = len(call.inputs), len(call.outputs)
    found = [Strategy((REPLICATE,) * inputs, (REPLICATE,) * outputs)]
    if result_differentiable:
        found.append(Strategy(tuple(map(_whole, differentiable)), (COPIED,) * outputs))
    if rule is None:
        return found
    binding = rule.binding(call)
    for group in binding.choices:
        if not all(splittable(binding.sizes[name]) for name in group):
            continue
        local = rule.local.get(group[0])
        for cut in cuts(binding, group):
            if local is not None and cut.segments != 1:
                continue
            strategy = _split_strategy(binding, group, cut, axis_size, differentiable, local)
            if strategy is not None and strategy.is_split:
                found.append(strategy)
    linear = rule.linear if isinstance(rule.linear, str) else rule.linear(call)
    if result_differentiable:
        found += _linear_strategies(linear, call, differentiable)
    return found


def _split_strategy(
    binding: Binding,
    group: tuple[str, ...],
    cut: Cut,
    axis_size: int,
    differentiable: Sequence[bool],
    local: Local | None,
) -> Strategy | None:
    inputs: list[Placement] = []
    for pattern, shape, needs_gradient in zip(binding.inputs, binding.input_shapes, differentiable, strict=True):
        shard = binding.shard(pattern, shape, group, cut, axis_size)
        if shard is False:
            return None
        inputs.append(shard if isinstance(shard, Shard) else _whole(needs_gradient))
    outputs: list[Placement] = []
    for pattern, shape in zip(binding.outputs, binding.output_shapes, strict=True):
        shard = binding.shard(pattern, shape, group, cut, axis_size)
        if shard is False:
            return None
        outputs.append(shard if isinstance(shard, Shard) else (local.output if local else PARTIAL))
    return Strategy(tuple(inputs), tuple(outputs), group, local)

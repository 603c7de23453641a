"""RULES: how each ATen op may be split over a mesh axis. One row an op, in the notation of `passes.annotation`.

A row gives an annotation; splitting one of its names is one legal way to run the op: arguments that have the name are split,
the others are whole with a partial gradient, results that lack it are partial sums. On top of that every op may run whole
(all `Replicate`, or all `Copied`), and ops marked `linear` pass partial sums on:

- "sum":   all arguments partial -> result partial (add, views, casts)
- "first": the first partial, the others whole -> partial (division)
- "each":  any one partial, the others whole -> partial (multiplication, matmul)

`local` names what one rank computes instead where its shard alone is not enough (a split vocabulary). An op without a row stays
whole; `register` adds a row from user code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from costmodel.errors import BadArgument
from passes.annotation import Binding, Cut, bind, factor
from passes.ir import Size, TensorType, output_types, size_expr, tensor_inputs, tensor_type
from passes.local_ops import sharded_cross_entropy, sharded_embedding
from passes.placement import COPIED, PARTIAL, REPLICATE, Placement, Shard

aten = torch.ops.aten
Op = Any  # torch._ops.OpOverload has no public name


@dataclass(frozen=True)
class Call:
    """One call as a rule sees it: arguments with tensors replaced by their types, sizes by their expressions."""

    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def call_of(node: fx.Node) -> Call:
    """The call of a node."""

    def plain(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return tensor_type(arg) if tensor_type(arg) is not None else size_expr(arg)
        if isinstance(arg, (list, tuple)):
            return tuple(plain(item) for item in arg)
        return arg

    inputs = tuple(value for value in map(tensor_type, tensor_inputs(node)) if value is not None)
    kwargs = {key: plain(value) for key, value in node.kwargs.items()}
    return Call(node.target, tuple(plain(arg) for arg in node.args), kwargs, inputs, output_types(node))


Annotation = str | Callable[[Call], "str | tuple[str, tuple[tuple[str, Size], ...]]"]
Rewrite = Callable[[fx.Node], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Local:
    """What a rank computes when a name is split: `rewrite(node)` gives function, args and kwargs; "axis" stands for the axis.

    `output` is the placement of the result; `all_reduces` counts the all_reduces of one value per row that it does itself.
    """

    rewrite: Rewrite
    output: Placement
    all_reduces: int = 0


@dataclass(frozen=True)
class OpRule:
    """One row. `sizes` is the position of the argument that spells the result's shape (views) or the split sizes ("split")."""

    op: Op
    annotation: Annotation
    linear: str | Callable[[Call], str] = ""
    sizes: int | None = None
    local: Mapping[str, Local] = field(default_factory=dict)

    def binding(self, call: Call) -> Binding:
        """The annotation bound to a call's shapes. ValueError if it does not fit."""
        text = self.annotation if isinstance(self.annotation, str) else self.annotation(call)
        text, sizes = (text, ()) if isinstance(text, str) else text
        return bind(text, tuple(value.shape for value in call.inputs), tuple(value.shape for value in call.outputs), sizes)


@dataclass(frozen=True)
class Strategy:
    """One legal way to run a call on an axis: a placement for every tensor argument and result; `split` is the split name."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    split: tuple[str, ...] = ()
    local: Local | None = None

    @property
    def is_split(self) -> bool:
        """True if each rank does its share of the work."""
        return any(isinstance(p, Shard) for p in (*self.inputs, *self.outputs))


# ---- annotations that depend on the call ---------------------------------------------------------------------------


def _elementwise(call: Call) -> str:
    return ", ".join(["..."] * len(call.inputs)) + " -> " + ", ".join(["..."] * len(call.outputs))


def _reshape(call: Call) -> tuple[str, tuple[tuple[str, Size], ...]]:
    return factor(call.inputs[0].shape, call.outputs[0].shape)


def _names(count: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{k}" for k in range(count)]


def _permute(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    names, order = _names(rank), list(range(rank))
    if call.op is aten.permute.default:
        order = [dim % rank for dim in call.args[1]]
    elif call.op is aten.t.default:
        order = order[::-1]
    else:
        first, second = (dim % rank for dim in call.args[1:3])
        order[first], order[second] = order[second], order[first]
    return " ".join(names) + " -> " + " ".join(names[dim] for dim in order)


def _expand(call: Call) -> str:
    source, target = call.inputs[0].shape, call.outputs[0].shape
    names = _names(len(target))
    offset = len(target) - len(source)
    new = [f"[{n}]" if k < offset or source[k - offset] != target[k] else n for k, n in enumerate(names)]
    return " ".join("1" if source[k] == 1 else names[k + offset] for k in range(len(source))) + " -> " + " ".join(new)


def _whole_dims(call: Call, dims: Sequence[int], outputs: int = 1) -> str:
    rank = len(call.inputs[0].shape)
    whole = {dim % rank for dim in dims} if rank else set()
    pattern = " ".join(f"[{name}]" if k in whole else name for k, name in enumerate(_names(rank)))
    return f"{pattern} -> " + ", ".join([pattern] * outputs)


def _whole_dim_argument(call: Call) -> str:
    return _whole_dims(call, [call.argument(1, "dim", -1)])


def _reduce(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    dims = call.argument(1, "dim", None)
    reduced = set(range(rank)) if not dims and dims != 0 else {dim % rank for dim in ((dims,) if isinstance(dims, int) else dims)}
    keep = len(call.outputs[0].shape) == rank and bool(reduced)
    left = " ".join(f"[{n}]" if k in reduced else n for k, n in enumerate(_names(rank)))
    right = [("1" if keep else "") if k in reduced else n for k, n in enumerate(_names(rank))]
    return f"{left} -> {' '.join(n for n in right if n)}"


def _sum(call: Call) -> str:
    return _reduce(call).replace("[", "").replace("]", "")


def _split(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    dim = call.argument(2, "dim", 0) % rank
    names = _names(rank)
    parts = _names(len(call.outputs), "part")
    source = [f"({' + '.join(parts)})" if k == dim and len(parts) > 1 else parts[0] if k == dim else n for k, n in enumerate(names)]
    return " ".join(source) + " -> " + ", ".join(" ".join(part if k == dim else n for k, n in enumerate(names)) for part in parts)


def _cat(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    names = _names(rank)
    parts = _names(len(call.inputs), "part")
    target = [f"({' + '.join(parts)})" if k == dim and len(parts) > 1 else parts[0] if k == dim else n for k, n in enumerate(names)]
    return ", ".join(" ".join(part if k == dim else n for k, n in enumerate(names)) for part in parts) + " -> " + " ".join(target)


def _slice(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    left = " ".join("[whole]" if k == dim else n for k, n in enumerate(_names(rank)))
    right = " ".join("[part]" if k == dim else n for k, n in enumerate(_names(rank)))
    return f"{left} -> {right}"


def _select(call: Call) -> str:
    rank = len(call.inputs[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    names = _names(rank)
    return " ".join("[whole]" if k == dim else n for k, n in enumerate(names)) + " -> " + " ".join(n for k, n in enumerate(names) if k != dim)


def _layer_norm(call: Call) -> str:
    normalized = " ".join(f"[n{k}]" for k in range(len(call.args[1])))
    return ", ".join([f"... {normalized}"] + [normalized] * (len(call.inputs) - 1)) + f" -> ... {normalized}"


def _embedding(call: Call) -> str:
    indices = " ".join(_names(len(call.inputs[1].shape), "i"))
    return f"v c, {indices} -> {indices} c"


def _matmul(call: Call) -> str:
    left, right = (len(value.shape) for value in call.inputs)
    return f"{'... m k' if left > 1 else 'k'}, {'... k n' if right > 1 else 'k'} -> {'...' if max(left, right) > 2 else ''} {'m' if left > 1 else ''} {'n' if right > 1 else ''}"


def _attention(call: Call) -> tuple[str, tuple[tuple[str, Size], ...]] | str:
    query, key = call.inputs[0].shape, call.inputs[1].shape
    if len(query) != 4:
        return ", ".join(["... [t] [d]", "... [s] [d]", "... [s] [e]", "... [t] [s]"][: len(call.inputs)]) + " -> ... [t] [e]"
    grouped = query[1] != key[1]
    q_heads = "(h g)" if grouped else "h"
    patterns = [f"b {q_heads} [t] [d]", "b h [s] [d]", "b h [s] [e]"]
    if len(call.inputs) > 3:
        mask = call.inputs[3].shape
        lead = {2: "", 3: f"{q_heads} ", 4: f"b {q_heads} "}[len(mask)]
        patterns.append(_ones(f"{lead}[t] [s]", mask))
    return ", ".join(patterns) + f" -> b {q_heads} [t] [e]"


def _ones(pattern: str, shape: Sequence[Size]) -> str:
    """The pattern with `1` wherever the shape has a dim of size 1 (broadcast)."""
    tokens = pattern.replace("(h g)", "(h_g)").split()
    return " ".join("1" if size == 1 else token for token, size in zip(tokens, shape, strict=True)).replace("(h_g)", "(h g)")


def _all_whole(call: Call) -> str:
    """Nothing may be split."""
    sides = [[" ".join(f"[x{k}_{d}]" for d in range(len(v.shape))) for k, v in enumerate(values)] for values in (call.inputs, call.outputs)]
    return f"{', '.join(sides[0])} -> {', '.join(sides[1]).replace('x', 'y')}"


def _cross_entropy(call: Call) -> str:
    if len(call.inputs) > 2:  # class weights: stay whole
        return _all_whole(call)
    rank = len(call.inputs[0].shape)
    extra = " ".join(f"[x{k}]" for k in range(rank - 2))
    logits = f"[n] c {extra}" if rank > 1 else "c"
    target = f"[n] {extra}" if rank > 1 else ""
    result = target if len(call.outputs[0].shape) else ""
    return f"{logits}, {target} -> {result}"


def _add_is_linear(call: Call) -> str:
    return "sum" if len(call.inputs) == 2 else ""


def _multiply_is_linear(call: Call) -> str:
    return "each"


# ---- what one rank computes where its shard is not enough ------------------------------------------------------------


def _rewrite_embedding(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    weight, indices, *rest = node.args
    padding_idx = rest[0] if rest else node.kwargs.get("padding_idx", -1)
    return sharded_embedding, (weight, indices, "axis"), {} if padding_idx == -1 else {"padding_idx": padding_idx}


def _rewrite_cross_entropy(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    names = ("weight", "reduction", "ignore_index", "label_smoothing")
    given = dict(zip(names, node.args[2:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in names}
    given.pop("weight", None)
    defaults = {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    kwargs = {key: value for key, value in given.items() if value != defaults[key]}
    return sharded_cross_entropy, (*node.args[:2], "axis"), kwargs


# ---- the table --------------------------------------------------------------------------------------------------------

_UNARY = (
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "elu", "erf", "exp", "expm1", "floor", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "isnan", "leaky_relu", "log", "log1p", "log2", "log_sigmoid", "logical_not", "bitwise_not", "mish", "reciprocal",
    "relu", "relu6", "round", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "sqrt", "square", "tan", "tanh",
    "clamp", "clamp_min", "clamp_max", "dropout", "isinf", "isfinite",
)  # fmt: skip
_UNARY_SCALAR = ("pow.Tensor_Scalar", "pow.Scalar", "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar",
                 "remainder.Scalar", "fmod.Scalar", "rsub.Scalar", "add.Scalar", "sub.Scalar")  # fmt: skip
_BINARY = ("eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "maximum", "minimum", "pow.Tensor_Tensor",
           "atan2", "fmod.Tensor", "remainder.Tensor", "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor",
           "logical_and", "logical_or", "logical_xor", "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar",
           "masked_fill.Scalar", "masked_fill.Tensor", "addcmul", "addcdiv", "lerp.Tensor", "lerp.Scalar")  # fmt: skip
_LINEAR_UNARY = ("neg", "clone", "detach", "alias", "contiguous", "to.dtype", "to.dtype_layout", "to.device", "_to_copy", "type_as",
                 "mul.Scalar", "div.Scalar", "zeros_like", "positive")  # fmt: skip


def _op(name: str) -> Op:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and (overload or "default") in getattr(aten, packet).overloads()


ELEMENTWISE: tuple[OpRule, ...] = (
    *(OpRule(_op(name), _elementwise) for name in (*_UNARY, *_UNARY_SCALAR, *_BINARY) if _exists(name)),
    *(OpRule(_op(name), _elementwise, linear="sum") for name in _LINEAR_UNARY if _exists(name)),
    OpRule(aten.add.Tensor, _elementwise, linear=_add_is_linear),
    OpRule(aten.sub.Tensor, _elementwise, linear=_add_is_linear),
    OpRule(aten.mul.Tensor, _elementwise, linear=_multiply_is_linear),
    OpRule(aten.div.Tensor, _elementwise, linear="first"),
)

VIEWS: tuple[OpRule, ...] = (
    OpRule(aten.view.default, _reshape, linear="sum", sizes=1),
    OpRule(aten.reshape.default, _reshape, linear="sum", sizes=1),
    OpRule(aten._unsafe_view.default, _reshape, linear="sum", sizes=1),
    OpRule(aten.unsqueeze.default, _reshape, linear="sum"),
    OpRule(aten.squeeze.dim, _reshape, linear="sum"),
    OpRule(aten.squeeze.default, _reshape, linear="sum"),
    OpRule(aten.flatten.using_ints, _reshape, linear="sum"),
    OpRule(aten.unflatten.int, _reshape, linear="sum", sizes=2),
    OpRule(aten.expand.default, _expand, linear="sum", sizes=1),
    OpRule(aten.transpose.int, _permute, linear="sum"),
    OpRule(aten.permute.default, _permute, linear="sum"),
    OpRule(aten.t.default, _permute, linear="sum"),
    OpRule(aten.split_with_sizes.default, _split, linear="sum", sizes=1),
    OpRule(aten.cat.default, _cat, linear="sum"),
    OpRule(aten.slice.Tensor, _slice, linear="sum"),
    OpRule(aten.select.int, _select, linear="sum"),
)

CONTRACTIONS: tuple[OpRule, ...] = (
    OpRule(aten.linear.default, lambda call: "... k, n k -> ... n" if len(call.inputs) == 2 else "... [k], n [k], n -> ... n", linear="each"),
    OpRule(aten.mm.default, "m k, k n -> m n", linear="each"),
    OpRule(aten.bmm.default, "b m k, b k n -> b m n", linear="each"),
    OpRule(aten.matmul.default, _matmul, linear="each"),
    OpRule(aten.addmm.default, "n, m [k], [k] n -> m n"),
    OpRule(aten.scaled_dot_product_attention.default, _attention),
)

REDUCTIONS: tuple[OpRule, ...] = (
    OpRule(aten.sum.default, _sum, linear="sum"),
    OpRule(aten.sum.dim_IntList, _sum, linear="sum"),
    OpRule(aten.mean.default, _reduce, linear="sum"),
    OpRule(aten.mean.dim, _reduce, linear="sum"),
    OpRule(aten.amax.default, _reduce),
    OpRule(aten.amin.default, _reduce),
    OpRule(aten.softmax.int, _whole_dim_argument),
    OpRule(aten._softmax.default, _whole_dim_argument),
    OpRule(aten.log_softmax.int, _whole_dim_argument),
    OpRule(aten._log_softmax.default, _whole_dim_argument),
    OpRule(aten.cumsum.default, _whole_dim_argument, linear="sum"),
    OpRule(aten.layer_norm.default, _layer_norm),
    OpRule(aten.rms_norm.default, _layer_norm),
)

LOOKUPS: tuple[OpRule, ...] = (
    OpRule(aten.embedding.default, _embedding, local={"v": Local(_rewrite_embedding, PARTIAL)}),
    OpRule(aten.cross_entropy_loss.default, _cross_entropy, local={"c": Local(_rewrite_cross_entropy, REPLICATE, all_reduces=2)}),
)

RULES: dict[Op, OpRule] = {row.op: row for row in (*ELEMENTWISE, *VIEWS, *CONTRACTIONS, *REDUCTIONS, *LOOKUPS)}


def register(op: Op, annotation: Annotation, *, linear: str = "") -> None:
    """Add a row for an op, such as one made with torch.library: `register(torch.ops.mine.swish.default, "... -> ...")`.

    BadArgument if the op has a row already.
    """
    if op in RULES:
        raise BadArgument(f"{op} already has a rule", use="another op, or edit its row in passes/rules.py")
    RULES[op] = OpRule(op, annotation, linear=linear)


# ---- from rows to strategies --------------------------------------------------------------------------------------------


def _linear_strategies(kind: str, inputs: int, outputs: int, differentiable: Sequence[bool]) -> list[Strategy]:
    after = (PARTIAL,) * outputs
    if kind == "sum":
        return [Strategy((PARTIAL,) * inputs, after)] if inputs else []
    positions = {"first": range(1), "each": range(inputs), "": range(0)}[kind]
    return [Strategy(tuple(PARTIAL if k == at else _whole(differentiable[k]) for k in range(inputs)), after) for at in positions]


def _whole(differentiable: bool) -> Placement:
    return COPIED if differentiable else REPLICATE


def strategies(
    rule: OpRule | None, call: Call, *, axis_size: int, differentiable: Sequence[bool], result_differentiable: bool,
    cuts: Callable[[Binding, tuple[str, ...]], Sequence[Cut]], splittable: Callable[[Size], bool],
) -> list[Strategy]:  # fmt: skip
    """Every legal way to run `call` over an axis of `axis_size` ranks, the whole one first.

    `differentiable[i]`: a gradient flows into argument i. `cuts` gives the block structures to try for a split name, `splittable`
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
        found += _linear_strategies(linear, inputs, outputs, differentiable)
    return found


def _split_strategy(
    binding: Binding, group: tuple[str, ...], cut: Cut, axis_size: int, differentiable: Sequence[bool], local: Local | None
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


"""How each op is printed in an emitted program: the way a person would have written it. One row an op; an op without a row is
printed as the ATen call it is. Every row computes the same kernel on the same arguments as the ATen op: a test holds them to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten

Printer = Callable[..., str]
"""Called with the printed arguments and keyword arguments of a node, `sharded` among them if a random op needs it."""

_REDUCTIONS = {"0": '"none"', "1": '"mean"', "2": '"sum"'}


def _call(name: str, *args: str, **kwargs: str) -> str:
    return f"{name}({', '.join([*args, *(f'{key}={value}' for key, value in kwargs.items())])})"


def _drop_defaults(
    names: tuple[str, ...], defaults: Mapping[str, str], args: tuple[str, ...], kwargs: Mapping[str, str]
) -> dict[str, str]:
    """Trailing arguments as keywords, without the ones that have their default value."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in given.items() if defaults.get(name) != value}


def _infix(symbol: str) -> Printer:
    def printer(a: str, b: str, **kwargs: str) -> str:
        alpha = kwargs.get("alpha", "1")
        return (
            f"{a} {symbol} {b}"
            if alpha == "1"
            else _call(f"torch.{'add' if symbol == '+' else 'sub'}", a, b, alpha=alpha)
        )

    return printer


def _method(name: str) -> Printer:
    return lambda x, *args, **kwargs: _call(f"{_operand(x)}.{name}", *args, **kwargs)


def _sizes_method(name: str) -> Printer:
    return lambda x, sizes, **kwargs: _call(
        f"{_operand(x)}.{name}", sizes.removeprefix("[").removesuffix("]"), **kwargs
    )


def _operand(text: str) -> str:
    return (
        text
        if text.replace("_", "a").isalnum() or (text.endswith(")") and " " not in text.split("(")[0])
        else f"({text})"
    )


def _function(name: str) -> Printer:
    return lambda *args, **kwargs: _call(name, *args, **kwargs)


def _linear(x: str, weight: str, bias: str = "None") -> str:
    return _call("F.linear", x, weight) if bias == "None" else _call("F.linear", x, weight, bias)


def _embedding(weight: str, indices: str, padding_idx: str = "-1", scale: str = "False", sparse: str = "False") -> str:
    options = {"padding_idx": padding_idx} if padding_idx != "-1" else {}
    if scale != "False" or sparse != "False":
        return _call("aten.embedding.default", weight, indices, padding_idx, scale, sparse)
    return _call("F.embedding", indices, weight, **options)


def _cross_entropy(logits: str, target: str, *args: str, **kwargs: str) -> str:
    names = ("weight", "reduction", "ignore_index", "label_smoothing")
    given = _drop_defaults(
        names, {"weight": "None", "reduction": "1", "ignore_index": "-100", "label_smoothing": "0.0"}, args, kwargs
    )
    if "reduction" in given:
        given["reduction"] = _REDUCTIONS[given["reduction"]]
    return _call("F.cross_entropy", logits, target, **given)


def _split(x: str, sizes: str, dim: str = "0") -> str:
    return f"{_operand(x)}.split({sizes}, dim={dim})"


def _dropout(x: str, p: str, train: str, *, sharded: str) -> str:
    if train == "False":
        return _call("aten.dropout.default", x, p, train)
    return _call("dropout", x, p, "self", **({"sharded": "True"} if sharded == "True" else {}))


def _attention(query: str, key: str, value: str, *args: str, sharded: str, **kwargs: str) -> str:
    names = ("attn_mask", "dropout_p", "is_causal")
    given = _drop_defaults(
        names,
        {"attn_mask": "None", "dropout_p": "0.0", "is_causal": "False", "scale": "None", "enable_gqa": "False"},
        args,
        kwargs,
    )
    if "dropout_p" in given:
        more = {"sharded": "True"} if sharded == "True" else {}
        return _call("attention_with_dropout", query, key, value, given.pop("dropout_p"), "self", **given, **more)
    return _call("F.scaled_dot_product_attention", query, key, value, **given)


def _to_dtype(x: str, dtype: str, *args: str, **kwargs: str) -> str:
    rest = [arg for arg in args if arg != "False"]
    return (
        _call(f"{_operand(x)}.to", dtype)
        if not rest and not kwargs
        else _call("aten.to.dtype", x, dtype, *args, **kwargs)
    )


def _layer_norm(
    x: str, shape: str, weight: str = "None", bias: str = "None", eps: str = "1e-05", cudnn: str = "False"
) -> str:
    del cudnn  # F.layer_norm passes torch.backends.cudnn.enabled; the kernels do not read it
    return _call("F.layer_norm", x, shape, weight, bias, eps)


PRINTERS: dict[Any, Printer] = {
    aten.add.Tensor: _infix("+"),
    aten.sub.Tensor: _infix("-"),
    aten.eq.Scalar: _infix("=="),
    aten.masked_fill.Scalar: _method("masked_fill"),
    aten.mul.Tensor: _infix("*"),
    aten.div.Tensor: _infix("/"),
    aten.neg.default: lambda x: f"-{_operand(x)}",
    aten.pow.Tensor_Scalar: lambda x, e: f"{_operand(x)} ** {e}" if not e.startswith("-") else _call("torch.pow", x, e),
    aten.linear.default: _linear,
    aten.addmm.default: _function("torch.addmm"),
    aten.mm.default: _infix("@"),
    aten.bmm.default: _function("torch.bmm"),
    aten.matmul.default: _infix("@"),
    aten.view.default: _sizes_method("view"),
    aten.reshape.default: _sizes_method("reshape"),
    aten.flatten.using_ints: _method("flatten"),
    aten.unflatten.int: _method("unflatten"),
    aten.expand.default: _sizes_method("expand"),
    aten.transpose.int: _method("transpose"),
    aten.permute.default: _sizes_method("permute"),
    aten.unsqueeze.default: _method("unsqueeze"),
    aten.squeeze.dim: _method("squeeze"),
    aten.contiguous.default: _method("contiguous"),
    aten.clone.default: _method("clone"),
    aten.detach.default: _method("detach"),
    aten.t.default: _method("t"),
    aten.split_with_sizes.default: _split,
    aten.to.dtype: _to_dtype,
    aten.gelu.default: _function("F.gelu"),
    aten.silu.default: _function("F.silu"),
    aten.relu.default: _function("F.relu"),
    aten.tanh.default: _function("torch.tanh"),
    aten.sigmoid.default: _function("torch.sigmoid"),
    aten.rsqrt.default: _function("torch.rsqrt"),
    aten.sqrt.default: _function("torch.sqrt"),
    aten.exp.default: _function("torch.exp"),
    aten.cos.default: _function("torch.cos"),
    aten.sin.default: _function("torch.sin"),
    aten.cat.default: _function("torch.cat"),
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.dropout.default: _dropout,
    aten.arange.default: _function("torch.arange"),
    aten.ne.Scalar: lambda x, y: f"{_operand(x)} != {y}",
    aten.sum.default: _method("sum"),
}

RANDOM = {aten.dropout.default, aten.scaled_dot_product_attention.default}

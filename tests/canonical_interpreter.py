"""Runs a canonical graph as it stands, with the marked biases fused again: what the tests compare with the user's
model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from autopar.trace import Traced, trace

aten = torch.ops.aten


def run_graph(
    traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any], fuse: bool = True
) -> tuple[Any, Tensor | None]:
    """The model's output and the loss, computed by the canonical graph on the tensors it shares with the model."""
    tensors = traced.flatten(args, kwargs)
    sizes = traced.size_values(tensors)
    values: dict[fx.Node, Any] = {}
    state = {**traced.state, **traced.constants}
    for node in traced.graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = tensors[node.target] if node.target in tensors else sizes[node.target]
        elif node.op == "get_attr":
            values[node] = state[node.target]
        elif node.op == "call_function":
            values[node] = _call(node, values, fuse)
            _check_type(node, values[node], sizes)
    return traced.unflatten(values), values[traced.loss] if traced.loss is not None else None


def _call(node: fx.Node, values: dict[fx.Node, Any], fuse: bool) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if fuse and node.meta.get("fused"):
        product, bias = node.args
        assert isinstance(product, fx.Node) and product.name == node.meta["bias_of"]
        if node.meta["fused"] == "convolution":
            args, kwargs = fx.node.map_arg((product.args, product.kwargs), values.__getitem__)
            return product.target(*args[:2], values[bias].flatten(), *args[3:], **kwargs)
        first, second = (values[arg] for arg in product.args)
        rows = first.flatten(0, -2) if node.meta.get("flat") else first
        if node.meta["fused"] == "linear":
            result = aten.linear.default(rows, second, values[bias])
        else:
            result = aten.addmm.default(values[bias], rows, second)
        return result.unflatten(0, first.shape[:-1]) if node.meta.get("flat") else result
    return node.target(*args, **kwargs)


def _check_type(node: fx.Node, value: Any, sizes: Mapping[str, int]) -> None:
    """Every value has the dtype and shape that its node claims, and a gradient exactly if it is marked trainable."""

    def number(size: Any) -> float:
        return (
            size
            if isinstance(size, int)
            else float(size.subs({symbol: sizes[str(symbol)] for symbol in size.free_symbols}))
        )

    if "size" in node.meta:
        assert abs(value - number(node.meta["size"])) < 1e-9, node.format_node()
        return
    kinds = [node.meta["tensor"]] if "tensor" in node.meta else list(node.meta["tensors"])
    tensors = [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]
    for tensor, kind in zip(tensors, kinds, strict=True):
        assert tensor.dtype == kind.dtype, (node.format_node(), tensor.dtype)
        assert tuple(tensor.shape) == tuple(map(number, kind.shape)), (node.format_node(), tensor.shape, kind.shape)
        if torch.is_grad_enabled():
            assert tensor.requires_grad <= node.meta["trainable"], node.format_node()


def check_equal(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    again: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    loss_fn: Any = None,
    output_tolerance: float = 0.0,
    gradient_tolerance: float = 1e-6,
) -> Traced:
    """Trace with the arguments, run the graph (on other arguments if `again`), and compare output, gradients and
    buffers."""
    traced = trace(model, args, kwargs or {}, loss_fn=loss_fn)
    run_args, run_kwargs = again or (args, kwargs or {})
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    bound, targets = traced.signature.bind(run_args, run_kwargs)
    expected = twin(*bound.args, **bound.kwargs)
    expected_loss = loss_fn(expected, *targets.values()) if loss_fn is not None else None
    torch.manual_seed(0)
    model.zero_grad()
    output, loss = run_graph(traced, run_args, run_kwargs)
    want, got = pytree.tree_leaves(expected), pytree.tree_leaves(output)
    for one, other in zip(want, got, strict=True):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
            assert difference <= output_tolerance, f"outputs differ by {difference}"
        else:
            assert one == other
    if loss is not None:
        wanted = expected_loss if expected_loss is not None else want[[x is loss for x in got].index(True)]
        wanted.backward()
        loss.backward()
        _compare_gradients(model, twin, gradient_tolerance)
    for (name, one), (_, other) in zip(twin.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(one, other), f"buffer {name}"
    model.zero_grad()
    return traced


def _compare_gradients(model: nn.Module, twin: nn.Module, tolerance: float) -> None:
    for (name, one), (_, other) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None or not other.grad.any(), f"{name} has a gradient"
            continue
        assert other.grad is not None, f"{name} has no gradient"
        scale = max(one.grad.abs().max().item(), 1e-6)
        assert (one.grad - other.grad).abs().max().item() <= tolerance * scale, name

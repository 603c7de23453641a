"""The cost model against hand numbers, torch's own counters, and rows and profiles made wrong on purpose."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from costmodel import collectives, memory
from costmodel.cost import AMOUNTS, ZERO, Cost, number_at, total
from costmodel.errors import BadArgument
from costmodel.formulas import contraction, matmul_flops, pointwise
from costmodel.hardware import HARDWARE, Hardware, Link, combined, hardware, nearest
from costmodel.op_row import OpRow, Saved, TensorShape, keeps_nothing
from costmodel.ops import ELEMENTWISE, OP_COSTS, VIEWS, base_name, is_view, op_cost, op_saves
from costmodel.roofline import backward_seconds, flops_per_second, forward_seconds

B = sympy.Symbol("B", integer=True, positive=True)
T = sympy.Symbol("T", integer=True, positive=True)
SIZES = {"B": 2, "T": 6}


def f32(*shape: int | sympy.Expr, parameter: bool = False) -> TensorShape:
    return TensorShape(shape, 4, parameter=parameter)


def i64(*shape: int | sympy.Expr) -> TensorShape:
    return TensorShape(shape, 8, floating=False)


def numbered(tensor: TensorShape, sizes: Mapping[str, int] = SIZES) -> TensorShape:
    return replace(tensor, shape=tuple(int(number_at(size, sizes)) for size in tensor.shape))


X = f32(B, T, 8)
# Inputs and outputs for the rows that take something else than one tensor and give one like it.
SHAPES: dict[str, tuple[Sequence[TensorShape], Sequence[TensorShape]]] = {
    "aten.linear": ([X, f32(16, 8, parameter=True), f32(16, parameter=True)], [f32(B, T, 16)]),
    "aten.mm": ([f32(B * T, 8), f32(8, 16)], [f32(B * T, 16)]),
    "aten.bmm": ([X, f32(B, 8, 16)], [f32(B, T, 16)]),
    "aten.matmul": ([X, f32(8, 16)], [f32(B, T, 16)]),
    "aten.mv": ([f32(T, 8), f32(8)], [f32(T)]),
    "aten.dot": ([f32(T), f32(T)], [f32()]),
    "aten.addmm": ([f32(16), f32(B * T, 8), f32(8, 16)], [f32(B * T, 16)]),
    "aten.baddbmm": ([f32(B, T, 16), X, f32(B, 8, 16)], [f32(B, T, 16)]),
    "aten._grouped_mm": ([f32(B * T, 8), f32(4, 8, 16), i64(4)], [f32(B * T, 16)]),
    "transformers.grouped_mm_fallback": ([f32(B * T, 8), f32(4, 8, 16), i64(4)], [f32(B * T, 16)]),
    "aten.einsum": ([f32(T, 8), f32(8, 16)], [f32(T, 16)]),
    "aten.addbmm": ([f32(T, 16), f32(B, T, 8), f32(B, 8, 16)], [f32(T, 16)]),
    "aten.addmv": ([f32(T), f32(T, 8), f32(8)], [f32(T)]),
    "aten.vdot": ([f32(T), f32(T)], [f32()]),
    "aten.outer": ([f32(T), f32(8)], [f32(T, 8)]),
    "aten.bilinear": ([f32(B, 4), f32(B, 8), f32(16, 4, 8, parameter=True)], [f32(B, 16)]),
    "aten._cdist_forward": ([f32(B, T, 8), f32(B, 5, 8)], [f32(B, T, 5)]),
    "aten._euclidean_dist": ([f32(B, T, 8), f32(B, 5, 8)], [f32(B, T, 5)]),
    "aten.lstm": ([X, f32(1, B, 4), f32(1, B, 4), f32(16, 8), f32(16, 4), f32(16)], [f32(B, T, 4)]),
    "aten.conv1d": ([f32(B, 4, T), f32(6, 4, 3, parameter=True)], [f32(B, 6, T)]),
    # two positions more a dim, without padding, and other channels: inputs and outputs differ in size
    "aten.conv_transpose2d": ([f32(B, 6, T, T), f32(6, 4, 3, 3, parameter=True)], [f32(B, 4, T + 2, T + 2)]),
    "aten.convolution": ([f32(B, 4, T, T), f32(6, 4, 3, 3), f32(6)], [f32(B, 6, T, T)]),
    "aten.embedding": ([f32(100, 8, parameter=True), i64(B, T)], [X]),
    "aten.index": ([f32(100, 8), i64(B, T)], [X]),
    "aten.index_select": ([f32(100, 8), i64(T)], [f32(T, 8)]),
    "aten.gather": ([X, i64(B, T, 1)], [f32(B, T, 1)]),
    "aten.cross_entropy_loss": ([f32(B * T, 50), i64(B * T)], [f32()]),
    "aten.layer_norm": ([X, f32(8, parameter=True), f32(8, parameter=True)], [X]),
    "aten.rms_norm": ([X, f32(8, parameter=True)], [X]),
    "aten._fused_rms_norm": ([X, f32(8, parameter=True)], [X, f32(B, T, 1)]),
    "aten.where": ([TensorShape((B, T, 8), 1, floating=False), X, X], [X]),
    "aten.masked_fill": ([X, TensorShape((B, T, 8), 1, floating=False)], [X]),
    "aten.native_dropout": ([X], [X, TensorShape((B, T, 8), 1, floating=False)]),
    "aten.topk": ([X], [f32(B, T, 2), i64(B, T, 2)]),
    "aten.sort": ([X], [X, i64(B, T, 8)]),
    "aten.max": ([X], [f32(B, T), i64(B, T)]),
    "aten.sum": ([X], [f32(B, T)]),
    "aten.mean": ([X], [f32(B, T)]),
    "aten.add": ([X, f32(8, parameter=True)], [X]),
    "aten.mul": ([X, X], [X]),
    "aten.div": ([X, X], [X]),
    "aten.cat": ([X, X], [f32(B, T, 16)]),
    "aten.arange": ([], [i64(T)]),
}
for _name in OP_COSTS:
    if "nll_loss" in _name:
        SHAPES[_name] = ([f32(B * T, 50), i64(B * T)], [f32()])
    elif "attention" in _name:
        SHAPES[_name] = ([f32(B, 2, T, 4)] * 3, [f32(B, 2, T, 4)])
    elif _name == "aten.conv2d":
        SHAPES[_name] = ([f32(B, 6, T, T), f32(6, 6, 3, 3, parameter=True)], [f32(B, 6, T, T)])
    elif _name in ("aten.conv3d", "aten.conv_transpose3d"):
        SHAPES[_name] = ([f32(B, 6, T, T, T), f32(6, 6, 3, 3, 3, parameter=True)], [f32(B, 6, T, T, T)])
    elif _name == "aten.conv_transpose1d":
        SHAPES[_name] = ([f32(B, 6, T), f32(6, 6, 3, parameter=True)], [f32(B, 6, T)])
    elif _name in ("aten.mse_loss", "aten.binary_cross_entropy_with_logits"):
        SHAPES[_name] = ([X, X], [f32()])


def shapes_of(name: str) -> tuple[Sequence[TensorShape], Sequence[TensorShape]]:
    return SHAPES.get(name, ([X], [X]))


def row_errors(row: OpRow, inputs: Sequence[TensorShape], outputs: Sequence[TensorShape]) -> list[str]:
    """What is wrong with a row, seen without knowing its op: negative or shrinking costs, unwritten gradients, ..."""
    errors = []
    doubled = {name: 2 * number for name, number in SIZES.items()}
    small, small_out = ([numbered(item) for item in items] for items in (inputs, outputs))
    large, large_out = ([numbered(item, doubled) for item in items] for items in (inputs, outputs))
    wanted = [item.floating for item in inputs]
    numeric = row(small, small_out, wanted)
    symbolic = row(inputs, outputs, wanted).at(SIZES)
    errors += [f"{name} is negative" for name in AMOUNTS if getattr(numeric, name) < 0]
    errors += [f"{name}: symbolic differs" for name in AMOUNTS if getattr(numeric, name) != getattr(symbolic, name)]
    frozen = row(small, small_out, [False] * len(small))
    if frozen.backward_flops or frozen.backward_read_bytes or frozen.backward_written_bytes or frozen.saved_bytes:
        errors.append("a backward without anything to train")
    grown = row(large, large_out, wanted)
    errors += [f"{name} shrinks" for name in AMOUNTS if getattr(grown, name) < getattr(numeric, name)]
    if numeric.written_bytes < small_out[0].num_bytes:
        errors.append("writes less than its output")
    if numeric.backward_kernels and not numeric.backward_written_bytes:
        errors.append("a backward that writes nothing")
    return errors


@pytest.mark.parametrize("name", OP_COSTS)
def test_every_row_is_consistent_and_symbolic_equals_numeric(name: str) -> None:
    assert row_errors(OP_COSTS[name], *shapes_of(name)) == []


WRONG_ROWS = {
    "negative": replace(pointwise(1), flops=lambda call: -call.outputs[0].numel),
    "backward of its own": replace(pointwise(1), written=lambda call: 0),
    "symbolic only": replace(pointwise(1), flops=lambda call: 1 if isinstance(call.inputs[0].numel, int) else 2),
    "shrinking": replace(pointwise(1), flops=lambda call: 10**9 - call.inputs[0].numel),
    "writes no gradient": replace(pointwise(1), backward_written=lambda call: 0),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows_are_caught(name: str) -> None:
    assert row_errors(WRONG_ROWS[name], [X], [X])


# Against torch: its FLOP counter, and what its autograd really saves


def live_case(name: str) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The op as torch runs it, and inputs for it: the shapes of SHAPES at SIZES, parameters as Parameters."""
    inputs, _ = shapes_of(name)
    tensors: list[torch.Tensor] = []
    for shape in map(numbered, inputs):
        if shape.floating:
            tensor = torch.rand(shape.shape) + 0.1
            tensors.append(torch.nn.Parameter(tensor) if shape.parameter else tensor.requires_grad_())
        elif shape.bytes_per_element == 1:
            tensors.append(torch.rand(shape.shape) > 0.5)
        else:
            tensors.append(torch.zeros(shape.shape, dtype=torch.int64))
    return LIVE[name], tensors


LIVE: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear": F.linear,
    "aten.mm": torch.mm,
    "aten.bmm": torch.bmm,
    "aten.addmm": torch.addmm,
    "aten.baddbmm": torch.baddbmm,
    "aten.conv1d": lambda x, w: F.conv1d(x, w, padding=1),
    "aten.conv2d": lambda x, w: F.conv2d(x, w, padding=1),
    "aten.conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w),
    "aten.scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "aten.embedding": lambda w, i: F.embedding(i, w),
    "aten.cross_entropy_loss": F.cross_entropy,
    "aten.layer_norm": lambda x, w, b: F.layer_norm(x, (8,), w, b),
    "aten.softmax": lambda x: torch.softmax(x, -1),
    "aten.log_softmax": lambda x: torch.log_softmax(x, -1),
    "aten.gelu": F.gelu,
    "aten.silu": F.silu,
    "aten.relu": torch.relu,
    "aten.tanh": torch.tanh,
    "aten.sigmoid": torch.sigmoid,
    "aten.exp": torch.exp,
    "aten.rsqrt": torch.rsqrt,
    "aten.pow": lambda x: x**3,
    "aten.add": torch.add,
    "aten.neg": torch.neg,
    "aten.mul": torch.mul,
    "aten.div": torch.div,
    "aten.where": torch.where,
    "aten.masked_fill": lambda x, mask: x.masked_fill(mask, 0.0),
    "aten.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "aten.sum": lambda x: x.sum(-1),
    "aten.mean": lambda x: x.mean(-1),
    "aten.cumsum": lambda x: x.cumsum(-1),
    "aten.cat": lambda x, y: torch.cat([x, y], -1),
    "aten.clone": torch.clone,
    "aten.gather": lambda x, i: x.gather(-1, i),
}
COUNTED = [name for name in LIVE if any(part in name for part in ("mm", "conv", "linear"))]


def priced(name: str) -> Cost:
    inputs, outputs = shapes_of(name)
    wanted = [item.floating for item in inputs]
    return op_cost(name, [numbered(item) for item in inputs], [numbered(item) for item in outputs], wanted)


@pytest.mark.parametrize("name", COUNTED)
def test_matmul_flops_are_those_that_torch_counts(name: str) -> None:
    function, tensors = live_case(name)
    with FlopCounterMode(display=False) as counter:
        result = function(*tensors)
        forward = counter.get_total_flops()
        result.sum().backward()
    cost = priced(name)
    biases = (
        0 if name not in ("aten.linear", "aten.addmm", "aten.baddbmm") else result.numel()
    )  # torch counts no bias sums
    assert cost.forward_flops == forward
    assert cost.backward_flops == counter.get_total_flops() - forward + biases


def saved_by_torch(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not any(storage.data_ptr() == item.data_ptr() for item in tensors if isinstance(item, torch.nn.Parameter)):
            kept[storage.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*tensors)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", LIVE)
def test_saved_bytes_are_what_autograd_saves(name: str) -> None:
    function, tensors = live_case(name)
    total_weight_bytes = 4 if "cross_entropy" in name else 0  # one number the row leaves out
    assert saved_by_torch(function, tensors) - total_weight_bytes == priced(name).saved_bytes


# Single facts


def test_linear_by_hand() -> None:
    cost = op_cost("aten.linear", [f32(3, 5), f32(7, 5, parameter=True)], [f32(3, 7)], [True, True])
    assert (cost.forward_flops, cost.backward_flops) == (2 * 3 * 5 * 7, 2 * 2 * 3 * 5 * 7)
    assert (cost.read_bytes, cost.written_bytes) == (4 * (15 + 35), 4 * 21)
    assert cost.saved_bytes == 4 * 15
    assert (cost.forward_kernels, cost.backward_kernels) == (1, 2)


def test_a_matmul_with_one_trainable_input_costs_as_much_backward_as_forward() -> None:
    for wanted in ([True, False], [False, True]):
        cost = op_cost("aten.mm", [f32(3, 5), f32(5, 7)], [f32(3, 7)], wanted)
        assert cost.backward_flops == cost.forward_flops
    assert op_cost("aten.mm", [f32(3, 5), f32(5, 7)], [f32(3, 7)], [True, False]).saved_bytes == 4 * 35
    assert op_cost("aten.mm", [f32(3, 5), f32(5, 7)], [f32(3, 7)], [False, True]).saved_bytes == 4 * 15


def test_causal_attention_costs_half() -> None:
    shapes = [f32(2, 4, 16, 8), f32(2, 2, 16, 8), f32(2, 2, 16, 8)]  # two query heads a key head
    whole = op_cost("aten.scaled_dot_product_attention", shapes, shapes[:1], [True] * 3)
    causal = op_cost("aten.scaled_dot_product_attention", shapes, shapes[:1], [True] * 3, causal=True)
    assert whole.forward_flops == 4 * 2 * 4 * 16 * 16 * 8
    assert whole.backward_flops * 2 == whole.forward_flops * 5
    assert (causal.forward_flops * 2, causal.backward_flops * 2) == (whole.forward_flops, whole.backward_flops)
    assert whole.saved_bytes == 4 * (2 * 2 * 4 * 16 * 8 + 2 * 2 * 2 * 16 * 8 + 2 * 4 * 16)


def test_embedding_reads_rows_and_writes_a_whole_gradient() -> None:
    cost = op_cost("aten.embedding", [f32(1000, 8, parameter=True), i64(3, 5)], [f32(3, 5, 8)], [True, False])
    assert cost.read_bytes == 4 * 15 * 8 + 8 * 15
    assert cost.backward_written_bytes == 4 * 1000 * 8
    assert cost.saved_bytes == 8 * 15


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_views_are_free(view: str) -> None:
    name = view if view == "getitem" else f"aten.{view}"
    assert is_view(name)
    assert op_cost(name, [f32(3, 5)], [f32(5, 3)], [True]) is ZERO
    assert op_saves(name, [f32(3, 5)], [f32(5, 3)], [True]) == Saved()


@pytest.mark.parametrize(
    ("printed", "base"),
    [
        ("aten.linear.default", "aten.linear"),
        ("aten.add_.Tensor", "aten.add"),
        ("torch.ops.aten.view.default", "aten.view"),
        ("aten.__and__.Tensor", "aten.__and__"),
        ("<built-in function getitem>", "getitem"),
        ("operator.getitem", "getitem"),
        ("aten._softmax", "aten._softmax"),
    ],
)
def test_overloads_and_in_place_forms_find_their_row(printed: str, base: str) -> None:
    assert base_name(printed) == base


def test_an_op_without_a_row_is_elementwise() -> None:
    cost = op_cost("aten.erfc", [f32(3, 5)], [f32(3, 5)], [True])
    assert cost == ELEMENTWISE([f32(3, 5)], [f32(3, 5)], [True])
    assert (cost.forward_flops, cost.read_bytes, cost.written_bytes, cost.saved_bytes) == (15, 60, 60, 60)


def test_integers_carry_no_gradient() -> None:
    cost = op_cost("aten.eq", [f32(3, 5)], [TensorShape((3, 5), 1, floating=False)], [True])
    assert (cost.backward_flops, cost.saved_bytes) == (0, 0)


def test_op_saves_leaves_out_parameters_and_names_the_rest() -> None:
    shapes = [f32(3, 5), f32(5, parameter=True)]
    assert op_saves("aten.mul", shapes, [f32(3, 5)], [True, True]) == Saved(inputs=(0,))
    assert op_saves("aten.softmax", [f32(3, 5)], [f32(3, 5)], [True]) == Saved(outputs=(0,))
    assert op_saves("aten.softmax", [f32(3, 5)], [f32(3, 5)], [False]) == Saved()


def test_wrong_calls_say_what_is_wrong() -> None:
    with pytest.raises(BadArgument, match="2 inputs but 1 trainable"):
        op_cost("aten.mm", [f32(3, 5), f32(5, 7)], [f32(3, 7)], [True])
    with pytest.raises(BadArgument, match=r"cannot price aten\.conv2d"):
        op_cost("aten.conv2d", [f32(3, 5)], [f32(3, 5)], [True])


def test_equal_calls_share_one_cost() -> None:
    first = op_cost("aten.linear", [X, f32(16, 8)], [f32(B, T, 16)], [True, True])
    assert op_cost("aten.linear", [f32(B, T, 8), f32(16, 8)], [f32(B, T, 16)], [True, True]) is first


# Cost


def test_costs_add_scale_and_take_numbers() -> None:
    one = op_cost("aten.linear", [X, f32(16, 8, parameter=True)], [f32(B, T, 16)], [True, True])
    numbers = one.at(SIZES)
    assert numbers.forward_flops == 2 * 2 * 6 * 8 * 16
    assert all(type(getattr(numbers, name)) is int for name in AMOUNTS)
    assert (one + one).at(SIZES) == numbers + numbers == total([one, numbers]).at(SIZES)
    assert total([]) == ZERO
    assert one.scaled(2).at(SIZES).forward_flops == 2 * numbers.forward_flops
    assert one.scaled(2).forward_kernels == 1
    assert one.scaled(sympy.Rational(1, 3)).at(SIZES).saved_bytes == 2 * 6 * 8 * 4 // 3
    with pytest.raises(BadArgument, match="no number for the size T"):
        one.at({"B": 2})


def test_numeric_costs_never_meet_sympy() -> None:
    cost = priced("aten.linear")
    for value in (cost, cost + cost, total([cost, cost]), cost.scaled(3)):
        assert all(type(getattr(value, name)) is int for name in AMOUNTS)


# Collectives

LINK = Link(latency_seconds=1e-6, bandwidth_bytes_per_second=1e9)


def test_ring_formulas_by_hand() -> None:
    assert collectives.all_reduce_seconds(num_bytes=4e6, axis_size=4, link=LINK) == pytest.approx(6e-6 + 6e-3)
    assert collectives.all_gather_seconds(num_bytes=4e6, axis_size=4, link=LINK) == pytest.approx(3e-6 + 3e-3)
    assert collectives.reduce_scatter_seconds(num_bytes=4e6, axis_size=4, link=LINK) == pytest.approx(3e-6 + 3e-3)
    assert collectives.all_to_all_seconds(num_bytes=4e6, axis_size=4, link=LINK) == pytest.approx(3e-6 + 3e-3)
    assert collectives.broadcast_seconds(num_bytes=4e6, axis_size=4, link=LINK) == pytest.approx(3e-6 + 4e-3)
    assert collectives.send_seconds(num_bytes=4e6, link=LINK) == pytest.approx(1e-6 + 4e-3)


COLLECTIVES = [
    collectives.all_reduce_seconds,
    collectives.all_gather_seconds,
    collectives.reduce_scatter_seconds,
    collectives.all_to_all_seconds,
    collectives.broadcast_seconds,
]


TWO_LEVELS = HARDWARE["a100-80gb"]


@pytest.mark.parametrize("function", COLLECTIVES)
def test_collectives_over_two_levels_grow_smoothly_with_bytes_ranks_and_nodes(function: Callable[..., float]) -> None:
    def seconds(num_bytes: float, size: int, stride: int = 1) -> float:
        return function(num_bytes=num_bytes, axis_size=size, link=TWO_LEVELS.axis_link(size, stride))

    sizes = [2.0**exponent for exponent in range(4, 34)]
    for size, stride in ((8, 1), (16, 1), (64, 8), (512, 1), (256, 4)):
        times = [seconds(num_bytes, size, stride) for num_bytes in sizes]
        assert all(before < after <= 2 * before for before, after in itertools.pairwise(times))
        assert seconds(1e6 + 1, size, stride) == pytest.approx(seconds(1e6, size, stride), rel=1e-5)
        symbolic = function(num_bytes=4 * B, axis_size=size, link=TWO_LEVELS.axis_link(size, stride))
        assert float(symbolic.subs({B: 500})) == pytest.approx(seconds(2000, size, stride))  # type: ignore[attr-defined]
    assert seconds(1e9, 8) < seconds(1e9, 16) < seconds(1e9, 16, 8)  # one node; two nodes with eight ports; with one
    assert function(num_bytes=1e9, axis_size=8, link=TWO_LEVELS.axis_link(8)) == pytest.approx(
        function(num_bytes=1e9, axis_size=8, link=TWO_LEVELS.inside)
    )


def test_short_messages_go_by_tree_and_long_ones_by_ring() -> None:
    link = TWO_LEVELS.axis_link(512, 1)
    ring = 2 * (63 * link.across.latency_seconds + 448 * link.inside.latency_seconds)
    assert collectives.all_reduce_seconds(num_bytes=8, axis_size=512, link=link) < ring / 5
    expected = ring + 2 * 511 / 512 * 1e11 / (8 * link.across.bandwidth_bytes_per_second)
    assert collectives.all_reduce_seconds(num_bytes=1e11, axis_size=512, link=link) == pytest.approx(expected)


@pytest.mark.parametrize("function", COLLECTIVES)
def test_collectives_cost_nothing_alone_and_take_expressions(function: Callable[..., float]) -> None:
    assert function(num_bytes=1e9, axis_size=1, link=LINK) == 0
    with pytest.raises(ValueError, match="axis_size is 0"):
        function(num_bytes=1, axis_size=0, link=LINK)
    symbolic = function(num_bytes=4 * B, axis_size=3, link=LINK)
    assert float(symbolic.subs({B: 5})) == pytest.approx(function(num_bytes=20, axis_size=3, link=LINK))  # type: ignore[attr-defined]


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for axis_size in (2, 3, 8, 1000):
        parts = [function(num_bytes=12345, axis_size=axis_size, link=LINK) for function in COLLECTIVES[:3]]
        assert parts[0] == pytest.approx(parts[1] + parts[2])


# Hardware


@pytest.mark.parametrize("name", HARDWARE)
def test_every_profile_has_a_source_for_every_number_and_survives_json(name: str) -> None:
    profile = HARDWARE[name]
    assert profile.name == name
    numbers = set(vars(profile)) - {"name", "device_type", "sources"}
    assert {field for field, source in profile.sources.items() if source} == numbers
    assert Hardware.from_json(profile.to_json()) == profile
    assert Hardware.from_json(profile.to_json()).to_json() == profile.to_json()
    assert profile.inside.bandwidth_bytes_per_second >= profile.across.bandwidth_bytes_per_second
    assert (profile.link(1), profile.link(profile.devices_per_node + 1)) == (profile.inside, profile.across)


def test_the_names_that_users_were_promised() -> None:
    assert set(HARDWARE) >= {
        "v100-16gb", "v100-32gb", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "gb200", "gh200", "l40s", "rtx-4090", "cpu",
    }  # fmt: skip


def test_hardware_takes_a_name_or_a_profile() -> None:
    assert hardware("h200") is HARDWARE["h200"]
    mine = replace(HARDWARE["cpu"], name="mine")
    assert hardware(mine) is mine
    with pytest.raises(BadArgument, match=r"no hardware profile 'tpu'(.|\n)*a100-40gb, (.|\n)*h100-sxm, (.|\n)*cpu"):
        hardware("tpu")


def test_a_json_file_is_taken_where_a_name_is(tmp_path: Path) -> None:
    mine, file = replace(HARDWARE["a100-80gb"], name="mine", memory_bytes=40 * 2**30), tmp_path / "mine.json"
    file.write_text(mine.to_json())
    assert hardware(str(file)) == hardware(file) == mine
    with pytest.raises(BadArgument, match=r"cannot read(.|\n)*none\.json"):
        hardware(str(tmp_path / "none.json"))
    file.write_text("{}")
    with pytest.raises(BadArgument, match=r"has no name(.|\n)*mine\.json"):
        hardware(file)


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("Tesla V100-SXM2-32GB", 32, "v100-32gb"),
        ("Tesla V100-SXM2-16GB", 16, "v100-16gb"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 80, "h100-sxm"),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA B200", 180, "b200"),
        ("NVIDIA GB200", 186, "gb200"),
        ("NVIDIA GH200 480GB", 96, "gh200"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(device: str, gib: int, name: str) -> None:
    found = nearest(device, gib * 2**30)
    assert found is not None and found.name == name
    assert nearest("Radeon", gib * 2**30) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": None}, "memory_bytes .* is None"),
        ({"memory_bytes": 80}, "memory_bytes .* is 80"),  # GB where bytes belong
        ({"memory_bandwidth_bytes_per_second": 3350}, "memory_bandwidth_bytes_per_second"),
        ({"matmul_efficiency": 1.5}, "matmul_efficiency .* is 1.5"),
        ({"memory_efficiency": 0}, "memory_efficiency .* is 0"),
        ({"launch_seconds": 4}, "launch_seconds .* is 4"),  # microseconds
        ({"launch_seconds": math.nan}, "launch_seconds .* is nan"),
        ({"devices_per_node": 0}, "devices_per_node .* is 0"),
        ({"devices_per_node": True}, "devices_per_node .* is True"),
        ({"devices_per_node": 7.5}, "devices_per_node .* is 7.5"),
        ({"kernels": {"multiprocessors": 0.5}}, "kernels.multiprocessors .* is 0.5"),
        ({"device_type": "tpu"}, "device_type .* is 'tpu'"),
        ({"peak_flops": {"bf16": 1e15}}, "no f32"),
        ({"peak_flops": {"f32": 67}}, r"peak_flops\[f32\] .* is 67"),
        ({"peak_flops": {"f32": 67e12, "int4": 1e15}}, "unknown dtype 'int4'"),
        ({"peak_flops": 5}, "no f32"),
        ({"inside": 5}, "inside .* not a JSON object"),
        ({"inside": {"latency_seconds": 1e-6}}, "inside .* has no bandwidth_bytes_per_second"),
        (
            {"across": {"latency_seconds": 1e-6, "bandwidth_bytes_per_second": 0}},
            "across.bandwidth_bytes_per_second .* is 0",
        ),
        ({"across": {"latency_seconds": -1, "bandwidth_bytes_per_second": 1e9}}, "across.latency_seconds .* is -1"),
        ({"cores": 5}, "unknown keys cores"),
        ({"name": ""}, "name is ''"),
        ({"basis": "guess"}, "basis .* is 'guess'"),
        ({"kernels": {"fill_k": -1}}, "kernels.fill_k .* is -1"),
        ({"kernels": {"dtype_efficiency": {"bf16": 2}}}, r"kernels.dtype_efficiency\[bf16\] .* is 2"),
        ({"kernels": {"tile": 1}}, "kernels .* unknown keys tile"),
        ({"sources": ["me"]}, "sources"),
    ],
)
def test_absurd_profiles_are_refused(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(HARDWARE["h100-sxm"].to_json()), **change})
    with pytest.raises(BadArgument, match=message):
        Hardware.from_json(text)


def test_a_profiles_file_goes_wherever_a_name_does(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(HARDWARE["h200"].to_json())
    assert hardware(str(path)) == hardware(path) == HARDWARE["h200"]
    with pytest.raises(BadArgument, match=r"cannot read the hardware profile .*none\.json"):
        hardware(str(tmp_path / "none.json"))


def test_missing_fields_and_broken_json_are_refused() -> None:
    values = json.loads(HARDWARE["cpu"].to_json())
    for name in set(values) - {"sources", "kernels", "shared_rate", "sharing_ranks", "basis", "device_type"}:
        with pytest.raises(BadArgument, match=f"has no {name}"):
            Hardware.from_json(json.dumps({key: value for key, value in values.items() if key != name}))
    for text in ("{", "[]", "5"):
        with pytest.raises(BadArgument, match="JSON"):
            Hardware.from_json(text)


def test_which_axis_crosses_nodes_follows_from_its_size_and_stride() -> None:
    device = HARDWARE["a100-80gb-4nic"]  # eight devices a node, half a port each
    share = device.across.bandwidth_bytes_per_second
    assert share == pytest.approx(HARDWARE["a100-80gb"].across.bandwidth_bytes_per_second / 2)
    expected = {(1, 1): (1, 1), (8, 1): (8, 1), (4, 2): (4, 1), (16, 1): (8, 2), (8, 8): (1, 8), (4, 4): (2, 2), (3, 64): (1, 3)}
    for (size, stride), (together, nodes) in expected.items():
        link = device.axis_link(size, stride)
        assert (link.ranks_per_node, link.num_nodes) == (together, nodes), (size, stride)
    assert device.axis_link(8, 1).bandwidth_bytes_per_second == device.inside.bandwidth_bytes_per_second
    assert device.axis_link(16, 1).bandwidth_bytes_per_second == pytest.approx(8 * share)
    assert device.axis_link(8, 8).bandwidth_bytes_per_second == pytest.approx(share)


def test_unknown_rows_of_a_combination_are_listed() -> None:
    with pytest.raises(BadArgument, match=r"no node 'rack'(.|\n)*dgx-a100"):
        combined("mine", "a100-80gb", "rack", "8x-hdr200")
    assert combined("mine", "h200", "pcie-8", "1x-100gbe").across.bandwidth_bytes_per_second < 2e9


# Roofline and memory


def test_roofline_takes_the_slower_of_compute_and_memory() -> None:
    device = replace(
        HARDWARE["cpu"],
        peak_flops={"f32": 1e12},
        memory_bandwidth_bytes_per_second=1e10,
        matmul_efficiency=0.5,
        memory_efficiency=0.5,
        launch_seconds=1e-6,
    )
    compute_bound = Cost(forward_flops=10**9, read_bytes=100, written_bytes=100, forward_kernels=1)
    memory_bound = Cost(backward_flops=10, backward_read_bytes=10**9, backward_written_bytes=10**9, backward_kernels=3)
    assert forward_seconds(compute_bound, dtype="f32", hardware=device) == pytest.approx(2e-3 + 1e-6)
    assert backward_seconds(memory_bound, dtype="f32", hardware=device) == pytest.approx(0.4 + 3e-6)
    assert forward_seconds(memory_bound, dtype="f32", hardware=device) == 0
    assert forward_seconds(replace(compute_bound, forward_kernels=0), dtype="i64", hardware=device) == pytest.approx(
        2e-3 + 1e-6
    )
    with pytest.raises(BadArgument, match="no rate for fp8"):
        flops_per_second("fp8", device)
    with pytest.raises(BadArgument, match="symbolic"):
        forward_seconds(Cost(forward_flops=B), dtype="f32", hardware=device)


def test_f32_is_not_tf32() -> None:
    profile = HARDWARE["a100-80gb"]
    assert flops_per_second("tf32", profile) == pytest.approx(8 * flops_per_second("f32", profile))


def test_memory_by_hand() -> None:
    assert memory.state_bytes(1000).total == 16000
    peak = memory.stage_peak_bytes(
        state_bytes=16000, saved_bytes=100, microbatches_in_flight=4, receive_bytes=10, extra_bytes=7
    )
    assert peak == 16000 + 440 + 7
    device = replace(HARDWARE["cpu"], memory_bandwidth_bytes_per_second=28e9, memory_efficiency=0.5)
    assert memory.optimizer_seconds(10**9, device) == pytest.approx(2.0)


def test_state_bytes_of_each_zero_stage() -> None:
    held = {zero: memory.state_bytes(1000, precision="bf16-master", zero=zero, dp_size=4) for zero in range(4)}
    assert [(s.parameters, s.gradients, s.master, s.optimizer) for s in held.values()] == [
        (2000, 2000, 4000, 8000), (2000, 2000, 1000, 2000), (2000, 500, 1000, 2000), (500, 500, 1000, 2000),
    ]  # fmt: skip
    pure = memory.state_bytes(1000, precision="bf16")
    assert (pure.parameters, pure.gradients, pure.master, pure.optimizer) == (2000, 2000, 0, 4000)
    # Rajbhandari et al. 2020, figure 1: 120, 31.4, 16.6 and 1.9 GB for 7.5 G parameters on 64 ranks
    figure = [memory.state_bytes(7_500_000_000, precision="fp16", zero=z, dp_size=64).total / 1e9 for z in range(4)]
    assert figure == pytest.approx([120.0, 31.4, 16.6, 1.9], abs=0.05)
    assert memory.state_bytes(7, zero=3, dp_size=4).parameters == 2 * 4
    for wrong in ({"zero": 4}, {"precision": "int3"}, {"optimizer": "lion9"}, {"dp_size": 0}):
        with pytest.raises(BadArgument):
            memory.state_bytes(10, **wrong)


# The package


def test_the_cost_model_does_not_import_torch() -> None:
    code = (
        "from costmodel import ops, formulas, cost, hardware, collectives, roofline, memory, errors; import sys; "
        "bad = {'torch', 'passes', 'autopar'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_matmul_row_differs_from_torch() -> None:
    """The comparisons with torch see a lost factor of two, a wrong contracted dim, activations that are not counted."""
    inputs, outputs = shapes_of("aten.mm")
    tensors = [numbered(item) for item in inputs], [numbered(item) for item in outputs]
    right = OP_COSTS["aten.mm"](*tensors, [True, True])
    halved = contraction(lambda call: matmul_flops(0)(call) // 2, 0, 1)(*tensors, [True, True])
    crossed = contraction(matmul_flops(1), 0, 1)(*tensors, [True, True])
    forgetful = replace(OP_COSTS["aten.mm"], saves=keeps_nothing)(*tensors, [True, True])
    function, live = live_case("aten.mm")
    with FlopCounterMode(display=False) as counter:
        function(*live)
    assert right.forward_flops == counter.get_total_flops()
    assert counter.get_total_flops() not in (halved.forward_flops, crossed.forward_flops)
    assert saved_by_torch(function, live) == right.saved_bytes != forgetful.saved_bytes

"""Calls on elements that share kernels: which do, and what memory traffic is left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from autopar.predict import Evaluator, Layout, evaluator
from costmodel.cost import Cost
from costmodel.hardware import HARDWARE
from passes.call_cost import call_cost
from passes.costs import op_name

VALUE = 4 * 8 * 64 * 4  # bytes of x
BIAS = 64 * 4
MASK = 4 * 8 * 64


class Chain(nn.Module):
    """Bias, dropout and residual; scale and softmax; then a value that one call reads twice."""

    def __init__(self, second_reader: bool = False) -> None:
        super().__init__()
        self.up, self.bias, self.second_reader = nn.Linear(64, 64, bias=False), nn.Parameter(torch.zeros(64)), second_reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        summed = F.dropout(self.up(hidden) + self.bias, 0.1) + hidden
        weights = torch.softmax(summed * 2.0, -1)
        out = (weights * weights).sum()
        return out + summed.sum() if self.second_reader else out


class Gated(nn.Module):
    """SiLU, which autograd keeps the result of, times another value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(F.silu(self.gate(x)) * self.up(x)).sum()


def costs(model: nn.Module, fused: bool = True) -> tuple[Evaluator, dict[str, Cost]]:
    """The evaluator, and the cost on one rank of every call, by op and which call of it: "add 2"."""
    found = evaluator(model, {"x": torch.zeros(4, 8, 64)}, HARDWARE["a100-80gb"])
    rank = found.graph(1, False)
    joined = rank.joined() if fused else {}
    by_op: dict[str, Cost] = {}
    counts: dict[str, int] = {}
    for line in rank.line:
        one = call_cost(line.node, rank.nominal, {"tp": 1})
        name = op_name(line.node.target).removeprefix("aten.")
        counts[name] = counts.get(name, 0) + 1
        by_op[f"{name} {counts[name]}"] = joined[line.node].cost(one) if line.node in joined else one.cost
    return found, by_op


def scaled(model: nn.Module, fused: bool = True) -> dict[str, Cost]:
    """The costs for the example's four rows (an evaluator's nominal pricing is for one)."""
    return {name: cost.scaled(4) for name, cost in costs(model, fused)[1].items()}


def test_a_chain_reads_what_comes_in_and_writes_what_goes_out() -> None:
    found = scaled(Chain())
    names = ("add 1", "add 2", "dropout 1", "mul 1", "softmax 1", "mul 2")
    bias, residual, dropout, scale, softmax, square = (found[name] for name in names)
    assert bias.read_bytes == VALUE + 4 * BIAS and bias.written_bytes == scale.read_bytes == scale.written_bytes == 0
    assert dropout.read_bytes == dropout.written_bytes == 0
    assert residual.read_bytes == VALUE and residual.written_bytes == 0  # the residual; what it adds and makes stays inside
    assert softmax.read_bytes == 0 and softmax.written_bytes == VALUE
    # backward: softmax's gradient goes on into the scaling's; the sum hands that one on, so it is written; dropout reads it again
    assert softmax.backward_read_bytes == 2 * VALUE and softmax.backward_written_bytes == 0
    assert dropout.backward_read_bytes == VALUE + MASK and dropout.backward_written_bytes == VALUE
    assert bias.backward_read_bytes == 0  # what it sums for the bias is there
    assert scale.backward_read_bytes == 0 and scale.backward_written_bytes == VALUE
    assert square.read_bytes == 2 * VALUE  # the product of a value with itself reads what was kept: it has a kernel of its own
    alone = scaled(Chain(), fused=False)
    assert alone["softmax 1"].read_bytes == alone["dropout 1"].read_bytes == VALUE and alone["add 2"].read_bytes == 2 * VALUE


def test_a_value_with_two_readers_is_written() -> None:
    found = scaled(Chain(second_reader=True))
    assert found["add 2"].written_bytes == found["mul 1"].read_bytes == VALUE
    assert found["softmax 1"].read_bytes == 0  # the scaled one has one reader still


def test_what_backward_needs_is_written() -> None:
    found = scaled(Gated())
    silu, product = found["silu 1"], found["mul 1"]
    assert silu.written_bytes == VALUE and silu.backward_read_bytes == VALUE  # its input; the gradient comes from the product's kernel
    assert product.read_bytes == VALUE and product.backward_written_bytes == VALUE


def test_fused_jobs_are_faster_and_hold_as_much() -> None:
    found, _ = costs(Chain())
    for recompute in ("none", "full"):
        alone = found.predict(Layout(microbatch_rows=4, recompute=recompute))
        fused = found.predict(Layout(microbatch_rows=4, recompute=recompute, fused=True))
        assert fused.step_seconds < alone.step_seconds and fused.memory == alone.memory


def test_another_device_prices_the_same_graphs() -> None:
    found, _ = costs(Gated())
    other = found.on(HARDWARE["h100-sxm"])
    direct = evaluator(Gated(), {"x": torch.zeros(4, 8, 64)}, HARDWARE["h100-sxm"])
    layout = Layout(microbatch_rows=4, microbatches=2)
    assert other.predict(layout) == direct.predict(layout)
    assert other.graph(1, False) is found.graph(1, False)

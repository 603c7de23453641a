"""Rules broken on purpose, one at a time, in the middle of whole models: `verify` reports each, and is content without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch
from reference import wide
from torch import Tensor, nn

import autopar
from autopar import program, state
from autopar.runtime.gradients import GradientSums
from passes import local_ops, patterns, placement, reshard, strategies
from passes.op_rule import Strategy
from passes.patterns import elementwise
from passes.rules import RULES

aten = torch.ops.aten
Break = Callable[[pytest.MonkeyPatch], None]


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=1)


class Between(nn.Module):
    """Two linears, split by columns and by rows, and something between them or after."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(8, 16), nn.Linear(8, 12)
        self.down, self.out = nn.Linear(16, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.scale = nn.Parameter(torch.randn(3))  # no axis of two can split it
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(self.between(self.up(x)))
        second = self.out(self.gate(x).unflatten(-1, (4, 3)).mul(self.scale).tanh().flatten(-2))
        return (self.after(first) + second).square().mean()


def between(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Between(function)


def after(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Between(F.relu, function)


def row(op: Any, **changes: Any) -> Break:
    """Another row for an op."""
    return lambda patch: patch.setitem(RULES, op, replace(RULES[op], **changes))


def whole_sums(patch: pytest.MonkeyPatch) -> None:
    """A product over a split dim is taken to be whole: its all_reduce is forgotten."""
    made = strategies._split_strategy

    def forgetful(binding: Any, group: tuple[str, ...], *rest: Any) -> Strategy | None:
        found = made(binding, group, *rest)
        contraction = (
            found is not None and len(found.inputs) == 2 and all(isinstance(p, placement.Shard) for p in found.inputs)
        )
        if not contraction or found is None or found.outputs != (placement.PARTIAL,):
            return found
        return replace(found, outputs=(placement.REPLICATE,))

    patch.setattr(strategies, "_split_strategy", forgetful)


def contiguous_shards(patch: pytest.MonkeyPatch) -> None:
    """Fused q, k and v are cut as one dim: a rank gets rows of q only, or of q and k."""

    def cut(tensor: Tensor, placed: Any, **where: int) -> Tensor:
        return placement.local_shard(
            tensor, replace(placed, segments=1) if isinstance(placed, placement.Shard) else placed, **where
        )

    patch.setattr(state, "local_shard", cut)


def no_sum_of_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reshard._CopyTo, "backward", staticmethod(lambda ctx, *grads: (grads[0], None)))


def no_partial_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradientSums, "_sum_partial", lambda self: None)


def rows_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """A split table that looks up every index among its own rows."""
    found = local_ops.sharded_embedding

    def wrong(weight: Tensor, indices: Tensor, axis: Any, **options: Any) -> Tensor:
        return found(weight, indices % weight.shape[0] + axis.coord * weight.shape[0], axis, **options)

    patch.setattr(program, "sharded_embedding", wrong)


SPLIT: dict[str, Any] = {f"{name}.weight": dim for name, dim in (("up", 0), ("down", 1), ("gate", 0), ("out", 1))}
VOCABULARY: dict[str, Any] = {"wte.weight": 0}

MUTATIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Break]] = {
    "an all_reduce forgotten": (gpt, {}, whole_sums),
    "a fused weight cut as one block": (gpt, {}, contiguous_shards),
    "a gradient not summed where a split region begins": (gpt, {}, no_sum_of_gradients),
    "an index looked up on every rank": (gpt, VOCABULARY, rows_of_another_rank),
    "a gradient not summed of a weight inside a split region": (between(F.relu), SPLIT, no_partial_gradients),
    "softmax along a split dim": (between(lambda t: t.softmax(-1)), {}, row(aten.softmax.int, annotation=elementwise)),
    "a mean of the means of parts": (
        between(lambda t: t - t.mean(-1, keepdim=True)), {},
        row(aten.mean.dim, annotation=lambda call: patterns.reduce()(call).replace("[", "").replace("]", "")),
    ),
    "two dims exchanged and their names not": (
        between(lambda t: t.unflatten(-1, (4, 4)).transpose(1, 2).flatten(1)), SPLIT, row(aten.transpose.int, annotation="a b c -> a b c"),
    ),
    "a reversal along a split dim": (between(lambda t: t.flip(-1)), {}, row(aten.flip.default, annotation=elementwise)),
    "gelu of partial sums": (after(F.gelu), SPLIT, row(aten.gelu.default, linear="sum")),
    "a number added on every rank": (after(lambda t: t + 1.0), SPLIT, row(aten.add.Tensor, linear="sum")),
}  # fmt: skip


def report_of(name: str, dtype: torch.dtype = torch.float32) -> autopar.Report:
    build, placements, _ = MUTATIONS[name]
    batch = (
        gpt_batch(rows=4, tokens=8)
        if build is gpt
        else {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)}
    )
    return autopar.verify(build().to(dtype), batch, tp=2, microbatches=2, overrides={"placements": placements})


@pytest.mark.parametrize("name", MUTATIONS)
def test_verify_reports_each_broken_rule_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By far more than rounding: the worst tensor is off by a hundredth at least, or the loss is."""
    report = report_of(name)
    assert report.ok, report
    MUTATIONS[name][2](monkeypatch)
    report = report_of(name)
    assert not report.ok and "DIFFERENT" in str(report)
    assert max(report.worst.relative, report.loss_difference / abs(report.loss_reference)) > 1e-2
    monkeypatch.undo()
    assert report_of(name).ok


@pytest.mark.parametrize(
    ("name",), wide([(name,) for name in list(MUTATIONS)[:5]], lambda name: "all_reduce" in name or "gradient" in name)
)
def test_in_bf16_too_though_more_may_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(name, torch.bfloat16)
    assert report.ok and "in float64" in str(report), report
    assert 0.02 < report.tolerance < 0.1
    MUTATIONS[name][2](monkeypatch)
    report = report_of(name, torch.bfloat16)
    assert not report.ok and "DIFFERENT" in str(report), report
    assert any(not difference.ok for difference in report.differences)


class SmallBias(nn.Module):
    """A bias of three numbers that is whole on every rank and meets the heads of that rank only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.up, self.bias, self.down = nn.Linear(8, 12), nn.Parameter(torch.randn(3)), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.layers(x)).unflatten(-1, (4, 3)) + self.bias
        return self.down(heads.tanh().flatten(-2)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_sum_that_one_small_bias_lacks_is_reported(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)}
    options: dict[str, Any] = {"tp": 2, "overrides": {"placements": {"up.weight": "12/tp 8", "bias": "3"}}}
    report = autopar.verify(SmallBias().to(dtype), batch, **options)
    assert report.ok and any("bias" in stage.partial_gradients for stage in report.plan.stages), report
    no_partial_gradients(monkeypatch)
    report = autopar.verify(SmallBias().to(dtype), batch, **options)
    assert {difference.name for difference in report.differences if not difference.ok} == {"bias"}, report
    assert not report.ok and report.worst.name == "bias"

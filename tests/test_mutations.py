"""Rules broken on purpose, one at a time, in the middle of whole models: `verify` reports each, and is content without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from torch import fx, nn

import autopar
from passes import contraction_patterns, local_ops, patterns, placement, reshard
from passes.patterns import elementwise
from passes.rules import RULES, Local, OpRule
from passes.shard import Strategy

aten = torch.ops.aten
Break = Callable[[pytest.MonkeyPatch], None]


def explicit() -> nn.Module:
    """Attention by hand: matmuls and softmax of its own."""
    torch.manual_seed(0)
    return GPT(layers=1, flash=False)


def fused() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=1)


def row(op: Any, **changes: Any) -> Break:
    """Another row for an op."""
    return lambda patch: patch.setitem(RULES, op, replace(RULES[op], **changes))


def whole_sums(patch: pytest.MonkeyPatch) -> None:
    """A product over a split dim is taken to be whole: its all_reduce is forgotten."""
    from passes import rules

    made = rules._split_strategy

    def forgetful(binding: Any, group: tuple[str, ...], *rest: Any) -> Strategy | None:
        found = made(binding, group, *rest)
        contraction = found is not None and len(found.inputs) == 2 and all(isinstance(p, placement.Shard) for p in found.inputs)
        if not contraction or found is None or found.outputs != (placement.PARTIAL,):
            return found
        return replace(found, outputs=(placement.REPLICATE,))

    patch.setattr(rules, "_split_strategy", forgetful)


def contiguous_shards(patch: pytest.MonkeyPatch) -> None:
    """Fused q, k and v are cut as one dim: a rank gets rows of q only, or of q and k."""
    import autopar.state as state

    def cut(tensor: torch.Tensor, placed: Any, **where: int) -> torch.Tensor:
        return placement.local_shard(tensor, replace(placed, segments=1) if isinstance(placed, placement.Shard) else placed, **where)

    patch.setattr(state, "local_shard", cut)


def no_sum_of_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reshard._CopyTo, "backward", staticmethod(lambda ctx, *grads: (grads[0], None)))


def no_partial_gradients(patch: pytest.MonkeyPatch) -> None:
    from autopar.runtime.gradients import GradientSums

    patch.setattr(GradientSums, "_sum_partial", lambda self: None)


def rows_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """A split table that looks up every index among its own rows."""
    found = local_ops.sharded_embedding

    def wrong(weight: torch.Tensor, indices: torch.Tensor, axis: Any, **options: Any) -> torch.Tensor:
        return found(weight, indices % weight.shape[0] + axis.coord * weight.shape[0], axis, **options)

    import autopar.program as program

    patch.setattr(program, "sharded_embedding", wrong)


def _transposed(call: Any) -> str:
    return "a b c d -> a c d b" if call.rank() == 4 else patterns.permute(call)


def _halves(node: fx.Node) -> Any:
    return aten.cross_entropy_loss.default, node.args, dict(node.kwargs)


MUTATIONS: dict[str, tuple[Callable[[], nn.Module], Break]] = {
    "an all_reduce forgotten": (fused, whole_sums),
    "a fused weight cut as one block": (fused, contiguous_shards),
    "a gradient not summed where a split region begins": (fused, no_sum_of_gradients),
    "an index looked up on every rank": (fused, rows_of_another_rank),
    "heads in the order of another transpose": (fused, row(aten.transpose.int, annotation=_transposed)),
    "a bias added on every rank": (fused, row(aten.add.Tensor, linear="sum", annotation=elementwise)),
    "gelu of partial sums": (fused, row(aten.gelu.default, linear="sum")),
    "the largest logits of a part of the classes": (
        fused, row(aten.cross_entropy_loss.default, local={"c": Local(_halves, placement.REPLICATE)}),
    ),
    "attention split in its head dim": (
        fused, row(aten.scaled_dot_product_attention.default, annotation="b h q d, b h k d, b h k d -> b h q d"),
    ),
    "softmax along a split dim": (explicit, row(aten.softmax.int, annotation=elementwise)),
    "layer norm of a part of a row": (explicit, row(aten.layer_norm.default, annotation="... n, n, n -> ... n")),
    "a sum that is no sum": (explicit, row(aten.linear.default, annotation=contraction_patterns.linear, linear="each")),
}  # fmt: skip

# What the solver does not choose by itself on these models, it is made to: a rule nobody uses breaks nothing.
OVERRIDES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def batch() -> Iterator[dict[str, torch.Tensor]]:
    yield gpt_batch(rows=4, tokens=8)


@pytest.mark.parametrize("build", [fused, explicit])
def test_unbroken(build: Callable[[], nn.Module], batch: dict[str, torch.Tensor]) -> None:
    report = autopar.verify(build(), batch, tp=2)
    assert report.ok, report


@pytest.mark.parametrize("name", MUTATIONS)
def test_verify_reports_a_broken_rule(name: str, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    build, broken = MUTATIONS[name]
    broken(monkeypatch)
    try:
        report = autopar.verify(build(), batch, tp=2)
        print(report.ok, report.loss_difference, report.worst)
        assert not report.ok, name
    except (RuntimeError, autopar.errors.AutoparError) as error:
        print("RAISED", type(error), error)

"""Dims that the axis does not divide: split with padding that nobody sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from rank_threads import rank_threads
from reference import differing, model_loss, train, wide
from rule_check import Case, Example, below, call, check, f, flags, is_padded_strategy, unit
from test_rules import EXAMPLES, examples
from torch import Tensor, nn

import autopar
from autopar.plan import Plan
from autopar.weight_notes import weight_notes
from costmodel.errors import NoLegalSharding
from passes.contraction_patterns import SUM
from passes.local_ops import pad_shard, sharded_cross_entropy, sharded_embedding
from passes.op_rule import Local, OpRule
from passes.patterns import elementwise
from passes.placement import (
    PARTIAL,
    Shard,
    can_be_padded,
    in_units,
    is_padded,
    local_shape,
    local_shard,
    notation,
    parse_notation,
    whole_tensor,
)  # fmt: skip
from passes.rules import RULES

aten = torch.ops.aten
X = f(6, 12)

# ---- placements -------------------------------------------------------------------------------------------------------

# (size, segments, unit, text on 4 ranks, what each rank has of arange(size))
SPLITS: list[tuple[int, Any, Any, str, list[int]]] = [
    (18, 1, 1, "18/tp", [5, 5, 5, 3]),
    (5, 1, 1, "5/tp", [2, 2, 1, 0]),
    (48, 1, 8, "(6/tp 8)", [16, 16, 16, 0]),
    (54, 3, 1, "(3 18/tp)", [15, 15, 15, 9]),
    (144, 3, 8, "(3 6/tp 8)", [48, 48, 48, 0]),
    (96, (48, 24, 24), (16, 8, 8), "(3/tp 16 + 3/tp 8 + 3/tp 8)", [32, 32, 32, 0]),
    (27, (18, 9), 1, "(18/tp + 9/tp)", [8, 8, 8, 3]),
]


@pytest.mark.parametrize(("size", "segments", "unit", "text", "lengths"), SPLITS, ids=[text for *_, text, _ in SPLITS])
def test_a_split_prints_parses_and_makes_the_whole_again(
    size: int, segments: Any, unit: Any, text: str, lengths: list[int]
) -> None:
    shard = in_units(0, size, segments, unit, axis_size=4)
    assert is_padded(size, shard, 4) and can_be_padded(size, shard, 4)
    assert notation((size, 7), {"tp": shard}) == f"{text} 7"
    assert parse_notation(f"{text} 7", {"tp": 4}) == ((size, 7), {"tp": shard})
    whole = torch.arange(size * 7).view(size, 7) + 1
    true = [local_shard(whole, shard, axis_size=4, coord=coord) for coord in range(4)]
    padded = [local_shard(whole, shard, axis_size=4, coord=coord, padded=True) for coord in range(4)]
    assert [piece.shape[0] for piece in true] == lengths
    assert {tuple(piece.shape) for piece in padded} == {(max(lengths), 7)}
    assert local_shape(f"i64[{text}, 7]", {}, {"tp": 4})[1] == (max(lengths), 7)
    assert torch.equal(whole_tensor(true, shard), whole)
    if segments == 1:  # true entries first
        for full, piece in zip(padded, true, strict=True):
            assert torch.equal(full[: len(piece)], piece) and not full[len(piece) :].any()
    filled = [torch.where(piece == 0, -1, piece) for piece in padded]
    assert torch.equal(whole_tensor(filled, shard, size), whole), "what is in padding is left out"


@pytest.mark.parametrize(("size", "segments", "unit", "text", "lengths"), SPLITS, ids=[text for *_, text, _ in SPLITS])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_parameters_shard_is_read_with_zeros_behind_it(
    dim: int, size: int, segments: Any, unit: Any, text: str, lengths: list[int]
) -> None:
    shard = replace(in_units(0, size, segments, unit, axis_size=4), dim=dim)
    whole = torch.randn((size, 7) if dim == 0 else (7, size))
    gradient = torch.randn_like(whole)

    def run(axis: Any) -> None:
        x = local_shard(whole, shard, axis_size=4, coord=axis.coord).clone().requires_grad_()
        result = pad_shard(x, axis, dim=dim, size=size, segments=segments, unit=unit)
        expected, grad = (local_shard(t, shard, axis_size=4, coord=axis.coord, padded=True) for t in (whole, gradient))
        assert torch.equal(result, expected)
        assert (result is x) == (lengths[axis.coord] == max(lengths)), "no copy where nothing is missing"
        result.backward(grad + (result == 0))  # what comes back to padding is dropped
        assert torch.equal(x.grad, local_shard(gradient, shard, axis_size=4, coord=axis.coord))

    rank_threads(4).run(run)


def test_equal_layouts_are_equal_placements() -> None:
    assert in_units(0, 48, 1, 8, axis_size=4) == in_units(0, 48, 1, 16, axis_size=4) != Shard(0)
    assert in_units(0, 48, 1, 8, axis_size=3) == Shard(0), "6 heads over 3 ranks: nothing to pad"
    assert parse_notation("(3 6/tp 8) 48", {"tp": 3})[1] == {"tp": Shard(0, 3)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_rows_are_split_only_if_half_of_what_is_held_is_true(size: int) -> None:
    assert [can_be_padded(size, Shard(0), count) for count in (2, 3, 4, 8)] == {
        1: [False, False, False, False],
        2: [True, True, True, False],
        3: [True, True, True, False],
    }[size]


# ---- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", RULES.values(), ids=lambda row: str(row.op).removeprefix("aten."))
def test_what_rows_say_of_padding_is_true(row: OpRule) -> None:
    """Over 4 ranks, dims of 6 are 2, 2, 2 and 0, those of 12 also pairs: 4, 4, 4 and 0."""
    for example in examples(row.op):
        check(row, example, 4)
        case = Case(row.op, example)
        if not row.padding_of(case.call) and not any(local.padding for local in row.local.values()):
            every = case.strategies(row, 4, (True,) * len(case.tensors))
            assert not any(is_padded_strategy(case, strategy, 4) for strategy in every), "refused"


def test_names_that_the_axis_does_not_divide_are_split_by_many_rows() -> None:
    """The test above is about something."""
    count, ops = 0, set()
    for row in RULES.values():
        for example in examples(row.op):
            case = Case(row.op, example)
            for strategy in case.strategies(row, 4, (True,) * len(case.tensors)):
                if is_padded_strategy(case, strategy, 4):
                    count += 1
                    ops.add(row.op)
    assert count > 300 and len(ops) > 100, (count, len(ops))
    heads = Case(aten.scaled_dot_product_attention.default, EXAMPLES["scaled_dot_product_attention"][1])
    found = [s for s in heads.strategies(RULES[heads.call.op], 4) if is_padded_strategy(heads, s, 4)]
    assert any(s.split == ("h",) and s.outputs[0].piece == 4 for s in found), "groups of 2 query heads stay together"


def _keeping(op: Any, annotation: Any = elementwise, padding: str = "keeps", **options: Any) -> OpRule:
    return OpRule(op, annotation, padding=padding, **options)


def _even_rows(weight: Tensor, indices: Tensor, axis: Any, size: int | None = None) -> Tensor:
    """Rows as if every rank before had as many as this one."""
    return sharded_embedding(weight, indices, axis, size=None if size is None else weight.shape[0] * axis.size)


WRONG: list[tuple[str, OpRule, Example]] = [
    ("a logarithm", _keeping(aten.log.default), call(unit(6, 12))),
    ("a root", _keeping(aten.sqrt.default), call(unit(6, 12))),
    ("a negative power", replace(RULES[aten.pow.Tensor_Scalar], padding="keeps"), call(unit(6, 12), -1)),
    ("a quotient", _keeping(aten.div.Tensor), call(X, unit(6, 12))),
    ("a mask of its own", _keeping(aten.masked_fill.Scalar), call(f(3, 40), flags(3, 40), float("-inf"))),
    ("zeros that do not stay zeros", _keeping(aten.cos.default, padding="zeros"), call(X)),
    ("a number added to zeros", _keeping(aten.add.Tensor, padding="zeros"), call(X, 2.0)),
    ("a sum of a loss where one argument is zero", replace(RULES[aten.mse_loss.default], padding="product"), call(X, X, SUM)),
    ("a reciprocal", _keeping(aten.reciprocal.default), call(unit(6, 12))),
    ("a norm without eps", replace(RULES[aten.layer_norm.default], padding="keeps"), call(X, [12], f(12), f(12), 0.0)),
    ("rows of another rank", replace(
        RULES[aten.embedding.default],
        local={"v": Local(lambda node: (_even_rows, (*node.args[:2], "axis"), {}), PARTIAL, padding=True)},
    ), call(f(18, 6), below(18, 40))),
]  # fmt: skip


@pytest.mark.parametrize(("why", "row", "example"), WRONG, ids=[why for why, _, _ in WRONG])
def test_a_row_that_says_something_wrong_of_padding_is_caught(why: str, row: OpRule, example: Example) -> None:
    with pytest.raises(AssertionError, match=r"4 ranks, Strategy"):
        check(row, example, 4)


# ---- a split vocabulary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [-1, 0, 4, 5, 10])
@pytest.mark.parametrize(("rows", "axis_size"), [(11, 4), (11, 3), (5, 4), (11, 2)])
def test_an_embedding_of_a_table_that_the_axis_does_not_divide(rows: int, axis_size: int, padding_idx: int) -> None:
    padding_idx = min(padding_idx, rows - 1)
    table, indices = torch.randn(rows, 6, dtype=torch.float64), torch.arange(40).remainder(rows).view(5, 8)
    gradient = torch.randn(5, 8, 6, dtype=torch.float64)
    weight = table.clone().requires_grad_()
    expected = aten.embedding.default(weight, indices, padding_idx)
    expected.backward(gradient)

    def run(axis: Any, padded: bool) -> tuple[Tensor, Tensor]:
        mine = local_shard(table, Shard(0), axis_size=axis_size, coord=axis.coord, padded=padded).clone().requires_grad_()
        result = sharded_embedding(mine, indices, axis, padding_idx=padding_idx, size=rows)
        result.backward(gradient)
        return result.detach(), mine.grad

    for padded in (False, True):
        results, grads = zip(*rank_threads(axis_size).run(lambda axis, padded=padded: run(axis, padded)), strict=True)
        torch.testing.assert_close(torch.stack(results).sum(0), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole_tensor(grads, Shard(0), rows), weight.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="out of range"):
        rank_threads(axis_size).run(lambda axis: sharded_embedding(table[:1], torch.tensor([rows]), axis, size=rows))


@pytest.mark.parametrize("shape", [(10, 11), (3, 11, 5), (11,), (10, 5)], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_cross_entropy_never_sees_padding(shape: tuple[int, ...], reduction: str, label_smoothing: float) -> None:
    classes, dim = (shape[1], 1) if len(shape) > 1 else (shape[0], 0)
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    target = torch.arange(100)[: logits.numel() // classes].remainder(classes).view(shape[0], *shape[2:]) if dim else torch.tensor(7)
    if dim:
        target = target.clone()
        target.view(-1)[::3] = -100
    expected = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    shard = Shard(dim)

    def run(axis: Any) -> tuple[Tensor, Tensor]:
        piece = local_shard(logits.detach(), shard, axis_size=4, coord=axis.coord, padded=True)
        there = local_shard(torch.ones(shape), shard, axis_size=4, coord=axis.coord, padded=True) == 0
        mine = piece.masked_fill(there, 1e4).requires_grad_()  # larger than any logit
        result = sharded_cross_entropy(
            mine, target, axis, reduction={"none": 0, "mean": 1, "sum": 2}[reduction], label_smoothing=label_smoothing, size=classes
        )
        result.backward(gradient)
        assert not mine.grad[there].any(), "no gradient in padding"
        return result.detach(), mine.grad

    results, grads = zip(*rank_threads(4).run(run), strict=True)
    for result in results:
        torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole_tensor(grads, shard, classes), logits.grad, rtol=1e-12, atol=1e-12)


# ---- models -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """18 features, and 6 at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.end = nn.Linear(18, 18), nn.Linear(18, 18, bias=False), nn.Linear(18, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.down(F.gelu(self.up(x))) + x).square().mean()


def gpt(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return GPT(**{"vocab": 65, "dim": 48, "heads": 6, "layers": 2, **changes})


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "num_attention_heads": 6, "hidden_size": 48, "intermediate_size": 50}
    return tiny_llama(**{**sizes, **changes})


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt2(vocab_size=101, n_head=6, n_embd=48, n_inner=50)


def text(vocab: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: causal_batch(vocab=vocab, tokens=8)


TABLES = {"wte.weight": 0}
BOTH = {"wte.weight": 0, "head.weight": 0}
QKV = {"*.qkv.weight": "(3 6/tp 8) 48", "*.qkv.bias": "(3 6/tp 8)"}

# model, batch, overrides, (tp, pp), parameters that must be padded on 4 ranks
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any], dict[str, str]]] = {
    "gpt": (gpt, lambda: gpt_batch(vocab=65), {**TABLES, **QKV}, {"wte.weight": "65/tp 48", "h.0.attn.out.weight": "48 (6/tp 8)"}),
    "gpt untied": (
        lambda: gpt(tied=False), lambda: gpt_batch(vocab=65), BOTH, {"wte.weight": "65/tp 48", "head.weight": "65/tp 48"},
    ),
    "gpt with its own attention": (lambda: gpt(flash=False), lambda: gpt_batch(vocab=65), QKV, {"h.1.attn.qkv.weight": "(3 6/tp 8) 48"}),
    "mlp": (Mlp, lambda: {"x": torch.randn(8, 18)}, {}, {"up.weight": "18/tp 18", "up.bias": "18/tp", "down.weight": "18 18/tp"}),
    "llama with 3 key heads": (
        lambda: llama(num_key_value_heads=3), text(101), {"*.k_proj.weight": 0},
        {"model.layers.0.self_attn.q_proj.weight": "(3/tp 16) 48", "model.layers.0.self_attn.k_proj.weight": "(3/tp 8) 48"},
    ),
    "llama with a padding index": (lambda: llama(pad_token_id=100), text(101), {"model.embed_tokens.weight": 0}, {}),
    "gpt2": (gpt2, text(101), {"*.c_attn.weight": 1}, {"transformer.h.0.attn.c_attn.weight": "48 (3 6/tp 8)"}),
}  # fmt: skip
LAYOUTS = [(name, mesh) for name in MODELS for mesh in ((4, 1), (3, 1), (2, 1), (4, 2), (2, 2))]


def quick(name: str, mesh: tuple[int, int]) -> bool:
    return mesh == (4, 1) or (name == "gpt" and mesh == (4, 2))


@pytest.mark.parametrize(("name", "mesh"), wide(LAYOUTS, quick))
def test_models_equal_the_untouched_one(name: str, mesh: tuple[int, int]) -> None:
    build, batch, overrides, padded = MODELS[name]
    tp, pp = mesh
    pins = overrides if tp == 4 else {}
    report = autopar.verify(build(), batch(), tp=tp, pp=pp, overrides={"placements": pins})
    assert report.ok, report
    plan = report.plan.check()
    assert Plan.from_json(plan.to_json()).check().identity == plan.identity
    if tp == 4:
        assert {parameter: plan.parameter_notation[parameter] for parameter in padded} == padded
        for parameter in padded:
            assert any(parameter.split(".")[-2] in note and "more work" in note for note in plan.notes), plan.notes


def test_twenty_steps_of_adamw_are_those_of_one_process() -> None:
    model, batches = gpt(), [gpt_batch(vocab=65, seed=seed) for seed in range(20)]
    alone = copy.deepcopy(model)

    def step(batch: Any) -> Tensor:
        loss = model_loss(alone, batch)
        loss.backward()
        return loss.detach()

    options = {"weight_decay": 0.1, "eps": 1e-5}  # a key's bias has no gradient but rounding: not to be scaled up to a step
    expected = train(step, alone.parameters(), batches, **options)
    par = autopar.parallelize(model, batches[0], tp=4, overrides={"placements": {**TABLES, **QKV}})
    shapes = {name: tuple(parameter.shape) for name, parameter in par.named_parameters()}
    assert shapes["rank 0: h.0.attn.qkv.weight"] == (48, 48) and shapes["rank 3: h.0.attn.qkv.weight"] == (0, 48)
    assert [shapes[f"rank {rank}: wte.weight"][0] for rank in range(4)] == [17, 17, 17, 14]
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches, **options)
    for found, wanted in zip(losses, expected, strict=True):
        assert abs(found - wanted) <= 2e-4 * abs(wanted)
    assert losses[-1] < losses[0]
    whole = par.full_state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=2e-4)
    par.close()


def test_gradients_are_clipped_as_on_one_process() -> None:
    model, batch = gpt(), gpt_batch(vocab=65)
    par = autopar.parallelize(model, batch, tp=4, overrides={"placements": {**TABLES, **QKV}})
    par.step(**batch)
    model_loss(model, batch).backward()
    torch.testing.assert_close(par.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5), rtol=1e-5, atol=1e-6)
    par.close()


@pytest.mark.parametrize("mesh", [(4, 1), (4, 2)])
def test_logits_have_no_padding(mesh: tuple[int, int]) -> None:
    model, batch = gpt().eval(), gpt_batch(vocab=65)
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1], overrides={"placements": TABLES}).eval()
    assert par.plan.stages[-1].outputs["logits"] == "f32[B, T, 65/tp]"
    _, logits = par(**batch)
    with torch.no_grad():
        expected = model(**batch)[1]
    assert logits.shape == expected.shape == (4, 16, 65)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    par.close()


class Pooled(nn.Module):
    """Features that the axis does not divide meet ops that look across them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 18), nn.Linear(18, 16, bias=False), nn.LayerNorm(18)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.norm(h.softmax(-1)) + h.mean(-1, keepdim=True)).square().mean()


def test_what_looks_across_padding_gathers_first() -> None:
    torch.manual_seed(0)
    model, batch = Pooled(), {"x": torch.randn(8, 16)}
    pins = {"up.weight": 0, "down.weight": 1}
    report = autopar.verify(model, batch, tp=4, overrides={"placements": pins})
    assert report.ok, report
    source = report.plan.source(0)
    assert "h_whole = all_gather(h, self.tp, dim=1, size=18)" in source
    assert autopar.verify(model, batch, tp=4).ok


class Scores(nn.Module):
    """Features that the axis does not divide are summed over, and neither side is a parameter: its padding may be anything."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 18), nn.Linear(16, 18), nn.Linear(18, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).sigmoid(), self.k(x).cos()
        return self.out((q @ k.transpose(-2, -1)) @ k + q).square().mean()


def test_values_are_not_summed_over_padding() -> None:
    torch.manual_seed(0)
    pins = {"q.weight": 0, "k.weight": 0, "out.weight": 1}
    report = autopar.verify(Scores(), {"x": torch.randn(4, 6, 16)}, tp=4, overrides={"placements": pins})
    assert report.ok, report
    assert "all_gather(" in report.plan.source(0)


# ---- decisions --------------------------------------------------------------------------------------------------------


def test_an_override_of_an_uneven_split_is_kept_and_an_impossible_one_says_what_would_work() -> None:
    batch = gpt_batch(vocab=65)
    plan = autopar.parallelize(gpt(), batch, tp=4, overrides={"placements": {"h.0.up.weight": 0, "wte.weight": "65/tp 48"}}).plan
    assert plan.parameter_notation["wte.weight"] == "65/tp 48"
    with pytest.raises(NoLegalSharding, match=r"'\*\.ln1\.weight': 0 cannot be") as error:
        autopar.parallelize(gpt(), batch, tp=4, overrides={"placements": {"*.ln1.weight": 0}})
    assert "use 48" in str(error.value)
    with pytest.raises(NoLegalSharding, match="2 9/tp 8") as error:
        autopar.parallelize(gpt(), batch, tp=4, overrides={"placements": {"h.0.attn.qkv.weight": "(2 9/tp 8) 48"}})
    assert "(3 6/tp 8) 48" in str(error.value), error.value


def test_notes_say_what_is_padded_at_what_cost_and_what_stays_whole() -> None:
    notes = weight_notes(
        {
            "head.weight": "50257/tp 768", "h.0.qkv.weight": "(3 6/tp 8) 48", "h.1.qkv.weight": "(3 6/tp 8) 48",
            "h.0.out.weight": "48 (6/tp 8)", "up.weight": "18/tp 18", "fused.weight": "(3/tp 16 + 3/tp 8 + 3/tp 8) 48",
            "table.weight": "1000003 768", "even.weight": "64/tp 8",
        }, 4,
    )  # fmt: skip
    assert notes == [
        "head.weight: 50257 rows in pieces of 12565 over tp = 4, 3 of padding (0.006% more work)",
        "h.{0,1}.qkv.weight: 3 blocks, each 6 units of 8 in pieces of 2 over tp = 4, 48 rows of padding (33% more work)",
        "h.0.out.weight: 6 units of 8 in pieces of 2 over tp = 4, 16 columns of padding (33% more work)",
        "up.weight: 18 rows in pieces of 5 over tp = 4, 2 of padding (11% more work)",
        "fused.weight: 3 units of 16 in pieces of 1 and 3 units of 8 in pieces of 1 over tp = 4, 32 rows of padding (33% more work)",
        "whole on every rank, because tp = 4 does not divide 1000003, and no padded split of it is cheaper, or an op's rule allows none: "
        "table.weight (95.2% of the parameters)",
    ]


# ---- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(4, 1), (4, 2), (3, 2)])
def test_state_never_sees_padding(mesh: tuple[int, int]) -> None:
    model, other, batch = gpt(), gpt(), gpt_batch(vocab=65)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1], overrides={"placements": TABLES})
    assert differing(par.full_state_dict(), model.state_dict()) == []
    par.load_state_dict(other.state_dict())
    assert differing(par.full_state_dict(), other.state_dict()) == []
    gpt().load_state_dict(par.full_state_dict(), strict=True)
    par.close()


def test_a_tied_weight_of_which_a_rank_has_nothing() -> None:
    """5 rows over 4 ranks: the last has none, on both stages."""
    report = autopar.verify(gpt(vocab=5), gpt_batch(vocab=5), tp=4, pp=2, overrides={"placements": TABLES})
    assert report.ok, report
    assert report.plan.stages[0].tied and report.plan.parameter_notation["wte.weight"] == "5/tp 48"


PINS = {"placements": {**TABLES, **QKV}}


def job(folder: str) -> dict[str, Any]:
    """Train a step, write a checkpoint, read it into other layouts."""
    from torch.distributed.tensor import DTensor

    batch = gpt_batch(vocab=65)
    par = autopar.parallelize(gpt(), batch, tp=4, overrides=PINS)
    loss = par.step(**batch)
    norm = par.clip_grad_norm_(1.0)
    torch.optim.AdamW(list(par.parameters()), lr=0.01, eps=1e-5).step()
    state = par.state_dict()
    assert all(type(value) is DTensor for value in state.values())
    report = {"loss": loss, "norm": norm, "whole": par.full_state_dict()}
    report["full tensors"] = {name: value.full_tensor() for name, value in state.items()}
    report["rows"] = {name: value.to_local().shape[0] for name, value in state.items()}
    dcp.save(state, checkpoint_id=folder)
    for tp, pp in ((2, 2), (1, 4)):
        other = autopar.parallelize(gpt(vocab=65), batch, tp=tp, pp=pp, overrides={"placements": TABLES} if tp > 1 else None)
        found = other.state_dict()
        dcp.load(found, checkpoint_id=folder)
        other.load_state_dict(found)
        report[f"tp={tp} pp={pp}"] = other.full_state_dict()
        other.close()
    again = autopar.parallelize(gpt(), batch, tp=4, overrides=PINS)
    found = again.state_dict()
    dcp.load(found, checkpoint_id=folder)
    again.load_state_dict(found)
    report["again"] = again.full_state_dict()
    again.close()
    report["logits"] = par.eval()(**batch)[1]
    par.close()
    return report


def test_processes_save_and_load_uneven_shards(tmp_path: Path) -> None:
    reports = autopar.launch(job, 4, str(tmp_path / "checkpoint"))
    model, batch = gpt(), gpt_batch(vocab=65)
    loss = model_loss(model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-5).step()
    whole = reports[0]["whole"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=2e-4)
    for report in reports:
        torch.testing.assert_close(report["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(report["norm"], norm, rtol=1e-5, atol=1e-6)
        assert differing(report["full tensors"], whole) == []
        assert report["logits"].shape == (4, 16, 65)
    assert [report["rows"]["wte.weight"] for report in reports] == [17, 17, 17, 14]
    for layout in ("tp=2 pp=2", "tp=1 pp=4", "again"):
        assert differing(reports[0][layout], whole) == [], layout
    state = gpt().state_dict()
    dcp.load(state, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    assert differing(state, whole) == [], "read without autopar"

"""Sequence parallelism: norms, dropouts and residuals split over tokens on the tp axis. Other collectives, the same numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from reference import model_loss, train, wide
from torch import Tensor, nn

import autopar
from costmodel.errors import AutoparError

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "gpt": (GPT, gpt_batch),
    "hf-gpt2": (tiny_gpt2, causal_batch),
    "hf-llama": (lambda: tiny_llama(num_key_value_heads=4), causal_batch),
}
MESHES = [(2, 1), (4, 1), (2, 2), (4, 2)]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def statements(plan: autopar.Plan) -> list[str]:
    return [
        line
        for rank in range(0, plan.num_ranks, plan.mesh["tp"])
        for line in plan.source(rank).splitlines()
        if " = " in line
    ]


def token_sums(plan: autopar.Plan) -> list[str]:
    """The all_reduces of values that have tokens and more, such as f32[B, T, 32]."""
    return [
        line
        for line in statements(plan)
        if " = all_reduce(" in line and re.search(r"# \w+\[[^\]]*T[^\]]*, \d+\]", line)
    ]


QUICK = [("gpt", (2, 1)), ("gpt", (4, 2)), ("hf-gpt2", (4, 1)), ("hf-llama", (2, 2))]


@pytest.mark.parametrize(
    ("name", "mesh"), wide([(name, mesh) for name in MODELS for mesh in MESHES], lambda *case: case in QUICK)
)
def test_forced(name: str, mesh: tuple[int, int]) -> None:
    """reduce_scatter and all_gather in place of all_reduce; the norms' weights see some tokens each and are summed once a step.
    Weights are pinned to be split: for models this small whole ones on the split tokens cost less than a message."""
    pins = {"*.gate_proj.weight": "48/tp 32", "*.up_proj.weight": "48/tp 32", "*.down_proj.weight": "32 48/tp"}
    report = autopar.verify(
        built(name), MODELS[name][1](), tp=mesh[0], pp=mesh[1], sequence_parallel=True,
        overrides={"placements": pins} if name == "hf-llama" else None,
    )  # fmt: skip
    assert report.ok, report
    plan = report.plan
    text = "\n".join(statements(plan))
    assert text.count(" = all_gather(") >= 4
    assert token_sums(plan) == [] and text.count(" = reduce_scatter(") >= 4
    assert re.search(r"# f32\[B, T/tp, 32\]", text)
    owed = {parameter for stage in plan.stages for parameter in stage.partial_gradients}
    norms = {parameter for parameter in plan.parameter_notation if re.search(r"ln|norm", parameter)}
    assert norms and norms <= owed


def test_without_it_there_are_token_sums() -> None:
    """What the test above looks for."""
    plan = autopar.parallelize(built("gpt"), gpt_batch(), tp=2).plan
    assert len(token_sums(plan)) >= 4
    assert not any("T/tp" in line for line in statements(plan))


@pytest.mark.parametrize(
    ("name", "mesh"),
    wide([(name, mesh) for name in MODELS for mesh in ((2, 1), (4, 2))], lambda *case: case in (("gpt", (4, 2)), ("hf-llama", (2, 1)))),
)
def test_where_it_is_cheaper(name: str, mesh: tuple[int, int]) -> None:
    report = autopar.verify(built(name), MODELS[name][1](), tp=mesh[0], pp=mesh[1], sequence_parallel="auto")
    assert report.ok, report


def test_auto_takes_it_on_a_large_model_and_predicts_less_memory() -> None:
    """A shape whose activations are most of the memory, on the meta device."""
    with torch.device("meta"):
        model = GPT(vocab=1024, dim=1024, heads=16, layers=4, context=4096, tied=False)
    batch = {name: torch.zeros(8, 4096, dtype=torch.long) for name in ("idx", "targets")}
    plans = {
        choice: autopar.parallelize(model, batch, tp=4, hardware="h100-sxm", sequence_parallel=choice).plan
        for choice in (False, "auto")
    }
    assert token_sums(plans["auto"]) == [] and len(token_sums(plans[False])) > 0
    assert plans["auto"].predicted.peak_bytes < 0.9 * plans[False].predicted.peak_bytes
    assert plans["auto"].predicted.step_seconds <= plans[False].predicted.step_seconds


def planned(rows: int, tokens: int, choice: Any, placements: Any = None, **sizes: Any) -> autopar.Plan:
    """A GPT's plan at tp=4 on an H100, on the meta device."""
    with torch.device("meta"):
        model = GPT(context=tokens, tied=False, **sizes)
    batch = {name: torch.zeros(rows, tokens, dtype=torch.long) for name in ("idx", "targets")}
    overrides = {"placements": placements} if placements else None
    return autopar.parallelize(
        model, batch, tp=4, hardware="h100-sxm", sequence_parallel=choice, overrides=overrides
    ).plan


def whole_matrices(plan: autopar.Plan) -> list[str]:
    return [
        name
        for name, text in plan.parameter_notation.items()
        if "/tp" not in text and len(text.split()) > 1 and name.startswith("h.")
    ]


def test_auto_takes_it_where_memory_is_worth_more_than_the_time() -> None:
    """Messages so small that two collectives take longer than one, and a sixth less memory."""
    sizes = {"vocab": 1024, "dim": 256, "heads": 4, "layers": 2}
    without, auto = (planned(8, 128, choice, **sizes) for choice in (False, "auto"))
    assert without.predicted.step_seconds < auto.predicted.step_seconds < 1.02 * without.predicted.step_seconds
    assert auto.predicted.peak_bytes < 0.9 * without.predicted.peak_bytes
    assert token_sums(auto) == [] and whole_matrices(auto) == []


def test_auto_leaves_it_where_it_is_neither_cheaper_nor_worth_it() -> None:
    with torch.device("meta"):
        model = GPT(vocab=64, dim=32, heads=4, layers=2, context=16, tied=False)
    batch = {name: torch.zeros(2, 16, dtype=torch.long) for name in ("idx", "targets")}
    plan = autopar.parallelize(model, batch, tp=4, hardware="cpu", sequence_parallel="auto").plan
    assert not any("T/tp" in line for line in statements(plan))


def test_auto_keeps_weights_whole_only_where_that_takes_less_memory() -> None:
    """Split tokens could run all layers on whole weights, without a collective. With few tokens the weights are the memory, and they
    are split. With many, a split weight would make each rank keep all tokens of its input for backward: whole ones are less."""
    few = planned(1, 2048, "auto", vocab=1024, dim=2048, heads=16, layers=2)
    assert token_sums(few) == [] and whole_matrices(few) == []
    sizes = {"vocab": 1024, "dim": 1024, "heads": 16, "layers": 4}
    many = planned(8, 4096, "auto", **sizes)
    assert whole_matrices(many)
    split = {"h.*.qkv.weight": "(3 16/tp 64) 1024", "h.*.up.weight": "4096/tp 1024", "h.*.down.weight": "1024 4096/tp"}
    pinned = planned(8, 4096, "auto", split, **sizes)
    assert whole_matrices(pinned) == []
    assert many.predicted.peak_bytes < pinned.predicted.peak_bytes
    assert many.predicted.step_seconds < 1.01 * pinned.predicted.step_seconds


@pytest.mark.parametrize(("name",), wide([(name,) for name in MODELS], lambda name: name != "hf-llama"))
def test_training_follows_the_untouched_model(name: str) -> None:
    model = built(name)
    batches = [MODELS[name][1](seed=seed) for seed in range(5)]
    alone = copy.deepcopy(model)

    def step(batch: Any) -> Tensor:
        loss = model_loss(alone, batch)
        loss.backward()
        return loss.detach()

    expected = train(step, alone.parameters(), batches)
    par = autopar.parallelize(model, batches[0], tp=2, pp=2, microbatches=2, sequence_parallel=True)
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches)
    par.close()
    assert max(abs(loss - wanted).item() for loss, wanted in zip(losses, expected, strict=True)) < 2e-4
    assert len({loss.item() for loss in losses}) == 5


def test_dropout_of_split_tokens_has_a_mask_on_each_rank() -> None:
    from test_random import DroppedGPT, assert_tp_peers_agree

    torch.manual_seed(0)
    batch = gpt_batch()
    par = autopar.parallelize(DroppedGPT(), batch, tp=2, sequence_parallel=True)
    drops = [line for line in statements(par.plan) if " = dropout(" in line]
    assert len(drops) >= 4 and all("sharded=True" in line for line in drops)
    optimizer = torch.optim.AdamW(list(par.parameters()), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        par.step(**batch)
        optimizer.step()
    assert_tp_peers_agree(par)
    par.close()


@pytest.mark.parametrize(("name",), wide([(name,) for name in MODELS], lambda name: name != "hf-llama"))
def test_a_length_that_tp_does_not_divide(name: str) -> None:
    """An error or the right number, and the next good step works."""
    model, make = built(name), MODELS[name][1]
    par = autopar.parallelize(model, make(), tp=2, pp=2, microbatches=2, sequence_parallel=True)
    for tokens in (16, 15, 12, 7, 16):
        batch = make(tokens=tokens)
        expected = model_loss(model, batch).item()
        try:
            loss = par.step(**batch).item()
        except AutoparError as error:
            assert tokens % 2 == 1
            assert f"T = {tokens}" in str(error) or f"{tokens}" in str(error), error
            continue
        assert loss == pytest.approx(expected, rel=1e-6), tokens
    par.close()


@pytest.mark.parametrize(("name",), wide([(name,) for name in MODELS], lambda name: name != "hf-llama"))
def test_an_example_whose_length_tp_does_not_divide(name: str) -> None:
    """Its tokens cannot be split: the plan does without."""
    report = autopar.verify(built(name), MODELS[name][1](tokens=15), tp=2, sequence_parallel=True)
    assert report.ok, report

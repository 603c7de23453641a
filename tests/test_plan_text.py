"""The printed plan: whole text against a golden, the words for placements, the folding of names, the width."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from torch import nn

import autopar
from autopar.plan import Plan
from autopar.plan_diff import diff_text
from autopar.plan_text import bytes_text, count_text, plan_json, plan_text, seconds_text
from autopar.weight_rows import fold_names, weight_rows

ROOT = Path(__file__).parents[1]


def gpt_plan(**options):
    options = {"tp": 2, "pp": 2, "microbatches": 4, "hardware": "a100-80gb", **options}
    torch.manual_seed(0)
    return autopar.parallelize(GPT(vocab=256, dim=64, layers=4), gpt_batch(rows=8, vocab=256), **options).plan


def test_the_printed_plan_is_the_golden(golden, monkeypatch):
    monkeypatch.chdir(ROOT)
    golden("gpt/plan.txt", str(gpt_plan()))


@pytest.mark.parametrize(
    ("model", "batch", "pp"),
    [
        (lambda: GPT(layers=2), gpt_batch, 1),
        (lambda: GPT(layers=16, tied=False), lambda: gpt_batch(rows=32), 16),
        pytest.param(lambda: tiny_llama(num_hidden_layers=4), causal_batch, 2, marks=pytest.mark.slow),
        (lambda: tiny_gpt2(n_layer=4), causal_batch, 4),
    ],
)
def test_no_line_is_wider_than_a_page(model, batch, pp):
    plan = autopar.parallelize(model(), batch(), tp=2, pp=pp).plan
    lines = plan_text(plan).splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert [line for line in lines if line != line.rstrip()] == []
    heads = [line.split()[0] for line in lines if re.match(r"[A-Z]{5,}", line)]
    assert heads == [
        "STAGES",
        "MEMORY",
        "WEIGHTS",
        *(["TRANSFERS"] if pp > 1 else []),
        "TIMELINE",
        *(["NOTES"] if plan.notes else []),
    ]
    assert (
        sum(
            line.startswith("stage ") and set(line[9:]) <= set("0123456789abcdefghijklmnopqrstuvwxyz. ")
            for line in lines
        )
        >= pp
    )


def pinned(model, batch, **placements):
    plan = autopar.parallelize(model, batch, tp=2, overrides={"placements": placements}).plan
    return {row.name: row.meaning for row in weight_rows(plan)}


def test_words_say_what_a_placement_does():
    words = pinned(
        GPT(), gpt_batch(), **{"wte.weight": 0, "wpe.weight": 0, "*.qkv.weight": "(3 4/tp 8) 32", "*.up.weight": 0}
    )
    assert words["wte.weight"] == "vocabulary, then all_reduce; is also head.weight"
    assert words["wpe.weight"] == "table rows, then all_reduce"
    assert words["h.{0,1}.attn.qkv.weight"] == "column, by heads within 3 fused blocks"
    assert words["h.{0,1}.attn.out.weight"] == "row, by heads, then all_reduce"
    assert words["h.{0,1}.up.weight"] == "column"
    assert words["h.{0,1}.down.weight"] == "row, then all_reduce"
    assert words["h.{0,1}.down.bias"] == "whole"


def test_words_come_from_the_graph_and_not_from_names():
    class Scrambled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Linear(16, 64)
            self.embedding = nn.Linear(64, 16)

        def forward(self, x):
            return self.embedding(torch.relu(self.bias(x))).square().mean()

    words = pinned(Scrambled(), {"x": torch.randn(4, 16)}, **{"bias.weight": 0})
    assert words["bias.weight"] == "column" and words["embedding.weight"] == "row, then all_reduce"


def expanded(name: str) -> list[str]:
    """Every name that a folded one stands for."""
    parts = []
    for part in re.findall(r"\{[^}]*\}|[^{}]+", name):
        if not part.startswith("{"):
            parts.append([part])
            continue
        numbers: list[str] = []
        for item in part[1:-1].split(","):
            first, _, last = item.partition("..")
            numbers += [str(n) for n in range(int(first), int(last or first) + 1)]
        parts.append(numbers)
    return ["".join(combination) for combination in itertools.product(*parts)]


@given(st.sets(st.tuples(st.integers(0, 14), st.integers(0, 3)), min_size=1, max_size=20))
def test_folded_names_stand_for_exactly_the_names_they_fold(numbers):
    names = [f"layers.{a}.experts.{b}.weight" for a, b in sorted(numbers)]
    folded = fold_names(names)
    assert sorted(name for text, _ in folded for name in expanded(text)) == sorted(names)
    assert [count for _, count in folded] == [len(expanded(text)) for text, _ in folded]


def test_folding_examples():
    assert fold_names([f"h.{k}.w" for k in range(12)]) == [("h.{0..11}.w", 12)]
    assert fold_names(["h.3.w"]) == [("h.3.w", 1)]
    assert fold_names(["h.0.w", "h.2.w", "h.3.w", "h.4.w"]) == [("h.{0,2..4}.w", 4)]
    assert fold_names([f"h.{a}.e.{b}.w" for a in range(3) for b in range(4)]) == [("h.{0..2}.e.{0..3}.w", 12)]
    assert fold_names(["wte.weight"]) == [("wte.weight", 1)]


def test_numbers_have_three_digits_and_a_unit():
    assert [count_text(n) for n in (512, 1000, 16_777_216, 8.03e9, 1e12)] == [
        "512",
        "1.00 k",
        "16.8 M",
        "8.03 B",
        "1.00 T",
    ]
    assert [bytes_text(n) for n in (512, 724992, 2**20, 71.5 * 2**30)] == [
        "0.500 KiB",
        "708 KiB",
        "1.00 MiB",
        "71.5 GiB",
    ]
    assert [seconds_text(s) for s in (2e-6, 5.52e-3, 1.2)] == ["2.00 us", "5.52 ms", "1.20 s"]


def test_json_holds_the_plan_and_the_tables():
    plan = gpt_plan()
    text = plan_json(plan)
    assert Plan.from_json(text).identity == plan.identity
    printed = json.loads(text)["printed"]
    assert [row["stage"] for row in printed["stages"]] == [0, 1]
    assert sum(row["count"] for row in printed["weights"]) == len(plan.parameter_notation)
    assert printed["transfers"][0]["bytes"] == 2 * 16 * 64 * 4  # rows of a microbatch x tokens x width x f32
    assert len(printed["timeline"]) == len(plan.timeline())


def test_diff_names_what_changed_and_no_more():
    one, other = gpt_plan(), gpt_plan(schedule="gpipe")
    assert diff_text(one, one) == "the same plan\n"
    text = diff_text(one, other)
    assert re.search(r"^schedule +1f1b +gpipe$", text, re.MULTILINE)
    assert "mesh" not in text and "attn" not in text


def test_words_for_padded_weights_are_those_for_even_ones():
    def words(vocab, dim, heads):
        model = GPT(vocab=vocab, dim=dim, heads=heads, tied=False)
        plan = autopar.parallelize(model, gpt_batch(vocab=vocab), tp=4, hardware="a100-80gb").plan
        return {row.name: row.meaning for row in weight_rows(plan) if "head" in row.name or "attn" in row.name}

    assert words(65, 48, 6) == words(64, 64, 8)

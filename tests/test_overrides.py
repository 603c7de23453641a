"""What a user decides is kept, the solver does the rest, the result is equal; what cannot be is an error that says what could."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch, tiny_llama
from reference import wide
from torch import nn

import autopar
from costmodel.errors import AutoparError, BadArgument, BadPlan, NoLegalSharding

MESH = {"tp": 2, "pp": 2, "microbatches": 2}


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=4, tied=False)


def planned(overrides: Any, **options: Any) -> autopar.Plan:
    return autopar.parallelize(gpt(), gpt_batch(), overrides=overrides, **{**MESH, **options}).plan


@functools.cache
def unasked() -> autopar.Plan:
    return planned(None)


PLACEMENTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "whole, by pattern": ({"*.up.*": "whole", "h.1.down.weight": "whole"}, {"h.0.up.weight": "128 32", "h.3.up.bias": "128"}),
    "by dim": ({"h.*.up.weight": 0, "head.weight": 1}, {"h.2.up.weight": "128/tp 32", "head.weight": "64 32/tp"}),
    "by dim from the end": ({"h.0.down.weight": -1}, {"h.0.down.weight": "32 128/tp"}),
    "in the notation": ({"h.0.up.weight": "128/tp 32"}, {"h.0.up.weight": "128/tp 32"}),
    "a fused dim": ({"*.qkv.weight": "(3 4/tp 8) 32"}, {"h.3.attn.qkv.weight": "(3 4/tp 8) 32"}),
    "a split table": ({"wte.weight": 0}, {"wte.weight": "64/tp 32"}),
    "a table split by features": ({"wte.weight": 1}, {"wte.weight": "64 32/tp"}),
    "rows where columns are usual": ({"h.0.up.weight": 1}, {"h.0.up.weight": "128 32/tp"}),
    "the notation for whole": ({"h.0.up.weight": "128 32"}, {"h.0.up.weight": "128 32"}),
    "heads cut apart": ({"h.0.attn.qkv.weight": "96/tp 32"}, {"h.0.attn.qkv.weight": "96/tp 32"}),
    "a split value before a whole weight": ({"h.0.up.weight": 0, "h.0.down.weight": "whole"}, {"h.0.down.weight": "32 128"}),
    "a weight and its bias": ({"h.0.up.weight": 1, "h.0.up.bias": 0, "h.0.down.weight": 0}, {"h.0.up.bias": "128/tp"}),
    "two patterns that agree": ({"h.*.up.weight": 0, "h.0.u*.weight": "128/tp 32"}, {"h.0.up.weight": "128/tp 32"}),
}  # fmt: skip


QUICK = ("by dim", "a fused dim", "heads cut apart", "a split value before a whole weight", "a weight and its bias")


@pytest.mark.parametrize(("name",), wide([(name,) for name in PLACEMENTS], lambda name: name in QUICK))
def test_placements_are_kept_and_the_rest_is_completed(name: str) -> None:
    given, expected = PLACEMENTS[name]
    report = autopar.verify(gpt(), gpt_batch(), overrides={"placements": given}, **MESH)
    assert report.ok, report
    found = {parameter: str(report.plan.placements[parameter]) for parameter in expected}
    assert found == expected
    assert set(unasked().parameter_notation) == set(report.plan.parameter_notation)
    assert any("/tp" in text for text in report.plan.parameter_notation.values())


@pytest.mark.parametrize(
    ("cuts", "first"), [(["h.2"], "h.2"), (["h.1"], "h.1"), (["h.3.ln2"], "h.3.ln2"), (["norm"], "norm")]
)
def test_cuts_fall_before_the_module(cuts: list[str], first: str) -> None:
    report = autopar.verify(gpt(), gpt_batch(), overrides={"cuts": cuts}, **MESH)
    assert report.ok, report
    names = [set(stage.parameters) for stage in report.plan.stages]
    assert any(name.startswith(first + ".") for name in names[1])
    assert not any(name.startswith(first + ".") for name in names[0])


def test_cuts_and_placements_together_on_four_stages() -> None:
    overrides = {"cuts": ["h.1", "h.2", "h.3"], "placements": {"h.0.*": "whole", "head.weight": 0}}
    report = autopar.verify(gpt(), gpt_batch(), tp=2, pp=4, microbatches=4, overrides=overrides)
    assert report.ok, report
    for index in range(1, 4):
        assert f"h.{index}.ln1.weight" in report.plan.stages[index].parameters
    assert (
        report.plan.placements["head.weight"] is not None and str(report.plan.placements["head.weight"]) == "64/tp 32"
    )
    assert all("/tp" not in text for name, text in report.plan.parameter_notation.items() if name.startswith("h.0."))


def test_grouped_heads_whose_keys_are_kept_whole() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 8))
    overrides = {"placements": {"*.k_proj.weight": "whole", "*.v_proj.weight": "whole"}}
    report = autopar.verify(tiny_llama(), {"input_ids": ids, "labels": ids}, tp=2, overrides=overrides)
    assert report.ok, report
    assert all(
        "/tp" not in text
        for name, text in report.plan.parameter_notation.items()
        if "k_proj" in name or "v_proj" in name
    )


# (overrides, error, what it says: both sides, or what would be possible)
IMPOSSIBLE: dict[str, tuple[Any, type[AutoparError], list[str]]] = {
    "two patterns that contradict": (
        {"placements": {"*.up.weight": 0, "h.0.up.*": "whole"}}, NoLegalSharding,
        ["'*.up.weight': 0", "'h.0.up.*': 'whole'", "h.0.up.weight"],
    ),
    "the pipeline's axis": ({"placements": {"h.0.up.weight": "128/pp 32"}}, BadArgument, ["128/pp 32", "pp", "over tp"]),
    "a norm's weight split": ({"placements": {"h.0.ln1.weight": 0}}, NoLegalSharding, ["h.0.ln1.weight", "32"]),
    "another shape": ({"placements": {"h.0.up.weight": "256/tp 32"}}, BadArgument, ["256/tp 32", "(128, 32)"]),
    "an unknown axis": ({"placements": {"h.0.up.weight": "128/dp 32"}}, (BadArgument, BadPlan), ["128/dp"]),
    "no such dim": ({"placements": {"h.0.up.weight": 2}}, BadArgument, ["h.0.up.weight", "no dim 2", "(128, 32)"]),
    "no such parameter": ({"placements": {"h.9.*": 0}}, BadArgument, ["'h.9.*'", "wte.weight"]),
    "not a placement": ({"placements": {"h.0.up.weight": True}}, BadArgument, ["True", '"whole"']),
    "not text": ({"placements": {"h.0.up.weight": 1.5}}, BadArgument, ["1.5"]),
    "nonsense": ({"placements": {"h.0.up.weight": "split it"}}, (BadArgument, BadPlan), ["split it"]),
    "placements in a list": ({"placements": ["h.0.up.weight"]}, BadArgument, ["dict"]),
    "a key of no meaning": ({"place": {}}, BadArgument, ["'place'", "placements"]),
    "cuts as text": ({"cuts": "h.2"}, BadArgument, ["list of module paths"]),
    "too many cuts": ({"cuts": ["h.1", "h.2"]}, BadArgument, ["2", "1"]),
    "a cut at no module": ({"cuts": ["h.7"]}, BadArgument, ["h.7"]),
    "a cut before everything": ({"cuts": ["wte"]}, AutoparError, ["wte"]),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_is_one_clear_error(name: str) -> None:
    overrides, kind, says = IMPOSSIBLE[name]
    with pytest.raises(kind) as error:
        planned(overrides)
    for part in says:
        assert part in str(error.value), str(error.value)


def test_a_size_that_the_axis_does_not_divide() -> None:
    given = {"placements": {"h.0.up.weight": 0}}
    plan = autopar.parallelize(gpt(), gpt_batch(), tp=3, overrides=given).plan
    assert plan.parameter_notation["h.0.up.weight"] == "128/tp 32"
    assert any(".up.weight" in note and "128 rows in pieces of 43 over tp = 3, 1 of padding" in note for note in plan.notes)
    with pytest.raises(NoLegalSharding, match=r"'h\.0\.ln1\.weight': 0 cannot be.*tp=3(.|\n)*use 32"):
        autopar.parallelize(gpt(), gpt_batch(), tp=3, overrides={"placements": {"h.0.ln1.weight": 0}})


def test_nothing_given_is_nothing_changed() -> None:
    assert planned(None).identity == planned({}).identity == planned({"placements": {}, "cuts": None}).identity

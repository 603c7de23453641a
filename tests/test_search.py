"""Search: nothing in the space is faster than what it finds, what it says of it adds up, and its plans run."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import model_loss, train
from torch import nn

import autopar
from autopar.cli import main
from autopar.errors import BadArgument, DoesNotFit
from autopar.plan import Plan
from autopar.predict import Layout
from autopar.search import Plans, search
from autopar.search_html import search_html
from autopar.search_space import Space, divisors
from autopar.search_text import reasons, search_text, terms, to_json, why_slower
from costmodel.errors import AutoparError
from passes.layout_evaluator import Facts

MODEL: dict[str, Any] = dict(vocab=512, dim=256, heads=8, layers=8, context=128, flash=True)
FACTS = Facts(rows=4, tokens=128, num_blocks=10, num_layers=8, parameters=10**7, parameter_bytes=4 * 10**7, sequence_splits=True)


@cache
def searched(**options: Any) -> Plans:
    return search(GPT(**MODEL), gpt_batch(4, 128, 512), **{"gpus": 8, "global_batch": 16, "hardware": "a100-40gb", **options})


def test_no_layout_of_the_space_is_faster_than_the_first_plan() -> None:
    plans = searched()
    evaluator, count = plans.evaluator, 0
    best = evaluator.predict(plans.predictions[0].layout).step_seconds
    kept = min(found.step_seconds for found in plans.predictions)
    for group in plans.space.layouts(evaluator.facts, plans.hardware):
        for layout in group:
            try:
                found = evaluator.predict(layout)
            except AutoparError:
                continue
            count += 1
            if found.fits:
                assert found.step_seconds >= min(best, kept) * 0.999, layout
    assert count > 100 and count >= plans.evaluated > 10


def test_plans_come_fastest_first_and_within_the_memory() -> None:
    plans = searched()
    seconds = [plan.predicted.step_seconds for plan in plans]
    assert seconds == sorted(seconds) and len(plans) == 10
    for plan, found in zip(plans, plans.predictions, strict=True):
        assert isinstance(plan, Plan)
        assert plan.predicted.peak_bytes <= plans.hardware.memory_bytes
        assert plan.num_ranks == 8 and found.layout.global_rows == 16
        assert 0 < plan.predicted.mfu < 1 and plan.predicted.tflops_per_gpu > 0 and 0 <= plan.predicted.bubble_fraction < 1
        assert "calibrated" in plan.predicted.basis


def test_every_layout_of_the_space_uses_all_devices_and_the_whole_batch() -> None:
    space = Space(gpus=24, global_batch=48)
    seen = set()
    for group in space.layouts(FACTS, searched().hardware):
        for layout in group:
            assert layout.num_ranks == 24 and layout.global_rows == 48
            assert layout not in seen
            seen.add(layout)
    assert {(layout.tp, layout.pp, layout.dp) for layout in seen} == {
        (tp, pp, 24 // tp // pp)
        for tp in divisors(24)
        for pp in divisors(24 // tp)
        if pp <= 10 and 48 % (24 // tp // pp) == 0
    }
    assert {layout.zero for layout in seen} == {0, 1, 2, 3} and {layout.recompute for layout in seen} == {"none", "selective", "full"}
    assert {layout.schedule for layout in seen} >= {"1f1b", "interleaved-1f1b", "zb-h1", "zb-v"}


@pytest.mark.parametrize("number", [1, 2, 7, 36, 2048, 1536])
def test_divisors(number: int) -> None:
    assert divisors(number) == [k for k in range(1, number + 1) if number % k == 0]


def test_decisions_that_are_given_are_kept() -> None:
    plans = searched(tp=2, pp=2, zero=1, recompute="full", schedule="1f1b", sequence_parallel=False)
    for found in plans.predictions:
        layout = found.layout
        assert (layout.tp, layout.pp, layout.dp, layout.zero, layout.recompute) == (2, 2, 2, 1, "full")
        assert layout.schedule == "1f1b" and not layout.sequence_parallel


def test_a_microbatch_may_be_the_whole_batch() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    plans = search(model, (torch.zeros(1024, 256),), loss_fn=lambda out: out.sum(), gpus=1, hardware="h100-sxm")
    assert plans.predictions[0].layout.microbatch_rows == 1024
    assert {1, 2, 4, 8, 16} <= {each for each, _ in plans.space.microbatches_of(1024)}


def test_less_memory_gives_plans_within_it_that_are_no_faster() -> None:
    free = searched()
    limit = int(min(found.peak_bytes for found in free.front) * 1.05)
    tight = searched(memory_bytes=limit)
    assert all(found.peak_bytes <= limit for found in tight.predictions)
    assert tight.predictions[0].step_seconds >= free.predictions[0].step_seconds


def test_the_front_is_not_beaten() -> None:
    front = searched().front
    assert len(front) > 1
    for faster, smaller in pairwise(front):
        assert faster.step_seconds <= smaller.step_seconds and faster.peak_bytes > smaller.peak_bytes


def test_the_terms_of_a_step_add_up() -> None:
    for found in searched().predictions:
        parts = terms(found)
        assert sum(parts.values()) == pytest.approx(found.step_seconds, rel=1e-6) and all(part >= 0 for part in parts.values())


def test_why_others_lost_is_the_difference_of_two_predictions() -> None:
    plans = searched()
    best = plans.predictions[0]
    found = reasons(plans)
    assert found
    for what, why, other in found:
        if not other.fits:
            assert "needs" in why
        elif why != "as fast":
            slower = float(why[1:].partition("%")[0]) / 100
            assert slower == pytest.approx(other.step_seconds / best.step_seconds - 1, abs=6e-4), what


def test_crossing_nodes_is_said_where_it_is_so() -> None:
    plans = searched(nodes=2)
    assert plans.hardware.devices_per_node == 4
    inside, across = (plans.evaluator.predict(Layout(tp=tp, dp=8 // tp, microbatches=2 * tp)) for tp in (4, 8))
    assert "tensor-parallel traffic" in (why := why_slower(inside, across, plans)) and "(tp=8 crosses nodes)" in why
    smaller = plans.evaluator.predict(Layout(tp=2, dp=4, microbatches=4))
    assert "crosses nodes" not in why_slower(smaller, inside, plans)


def test_the_table_and_the_json_have_the_same_figures() -> None:
    plans = searched()
    text, values = search_text(plans), to_json(plans)
    assert str(plans) == text and max(map(len, text.splitlines()[:15])) <= 160
    assert json.loads(json.dumps(values)) == values
    first = values["plans"][0]
    assert f"{first['mfu']:.1%}" in text and "WHY THE RUNNERS-UP LOST" in text and "basis" in first and "uncertainty" in first
    assert "calibrated profile" in text and "of the step time" in text


def test_the_page_needs_nothing_else_and_shows_front_and_timelines() -> None:
    page = search_html(searched(pp=2, top=2))
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page and "<script" not in page
    for picture in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
    assert page.count("<circle") >= 1 and page.count("Timeline of plan") == 2


# ---- why a decision is as it is -------------------------------------------------------------------------------------


def test_a_decision_is_explained_by_the_best_layouts_with_its_other_values() -> None:
    plans = searched()
    best = plans.predictions[0]
    for name, chosen in (("tp", best.layout.tp), ("zero", best.layout.zero), ("recompute", best.layout.recompute)):
        found = plans.explain(name)
        assert found.choices and chosen not in {choice.value for choice in found.choices}
        for choice in found.choices:
            assert choice.found is not None and getattr(choice.found.layout, name) == choice.value
            assert choice.found.layout.num_ranks == 8 and choice.found.layout.global_rows == 16
            if choice.only is not None:
                assert getattr(choice.only.layout, name) == choice.value and choice.only.layout.num_ranks == 8
                assert choice.only.step_seconds >= choice.found.step_seconds * 0.97 or not choice.only.fits
        assert "calibrated profile" in str(found) and "+-" in str(found)
        assert json.loads(json.dumps(found.to_json()))["decision"] == name


def test_one_value_is_explained_with_the_collective_that_it_slows_or_the_memory_it_misses() -> None:
    plans = searched(nodes=4, tp="auto", pp=1, dp="auto")
    text = str(plans.explain("tp=8"))
    assert "crosses nodes" in text and "only tp=8" in text
    two = searched(nodes=4, tp=2, dp=4, pp=1)
    held = two.explain("tp=8").choices[0]
    assert held.found is None or "x slower" in held.why
    whole = searched(tp=8, pp=1)
    layouts = [layout for group in whole.space.layouts(whole.evaluator.facts, whole.hardware) for layout in group]
    least = {
        kind: min(whole.evaluator.predict(layout).memory.needed_bytes for layout in layouts if layout.recompute == kind)
        for kind in ("none", "full")
    }
    tight = searched(tp=8, pp=1, memory_bytes=int(least["full"] + least["none"]) // 2)
    choice = tight.explain("recompute=none").choices[0]
    assert choice.found is not None and not choice.found.fits and "too much" in choice.why and "needs" in choice.why


def test_values_that_cannot_be_are_said_to_be_so() -> None:
    plans = searched()
    assert "does not divide 8 GPUs" in plans.explain("tp=3").choices[0].why
    for asked, message in (("speed", "is no decision"), ("schedule=2f2b", "is no choice"), ("tp=x", "is no choice")):
        with pytest.raises(BadArgument, match=message):
            plans.explain(asked)


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_a_searched_plan_is_an_ordinary_one_made_at_the_first_look(tmp_path) -> None:
    plans = search(GPT(layers=4), gpt_batch(), gpus=2, hardware="cpu", dp=1, top=3)
    for plan in plans:
        assert "stages" not in plan.__dict__
        assert len(plan.stages) == plan.mesh["pp"] * plan.virtual_stages and plan.check() is plan
    plan = plans[0]
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.identity == plan.identity and str(loaded) == str(plan)
    assert plan.source(0) == loaded.source(0)
    assert replace(plan, model="other").model == "other"


def test_the_plan_that_was_found_trains_as_the_untouched_model() -> None:
    torch.manual_seed(0)
    model, batch = GPT(layers=4), gpt_batch(8)
    plan = search(model, batch, gpus=4, hardware="cpu", dp=1, tp=2, top=1)[0]
    par = autopar.parallelize(model, batch, plan=plan)
    loss = par.step(**batch)
    expected = model(**batch)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    par.close()


@pytest.mark.parametrize(("zero", "precision"), [(1, "fp32"), (3, "fp32"), (2, "bf16-mixed")])
def test_a_searched_plan_with_replicas_runs_in_its_zero_stage_and_precision(zero: int, precision: str) -> None:
    """Losses of 3 AdamW steps within 1e-5 (in f32; within 2e-2 in bf16) of the untouched model's on both replicas' rows together."""
    torch.manual_seed(0)
    model, batches = GPT(layers=2), [gpt_batch(8, seed=seed) for seed in range(3)]
    alone = copy.deepcopy(model)
    plan = search(model, batches[0], gpus=2, hardware="cpu", dp=2, zero=zero, precision=precision, top=1)[0]
    assert (plan.zero, plan.precision, dict(plan.mesh)) == (zero, precision, {"pp": 1, "dp": 2, "tp": 1})
    par = autopar.parallelize(model, batches[0], plan=plan)
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches)
    par.close()

    def step(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model_loss(alone, batch)
        loss.backward()
        return loss.detach()

    expected = train(step, alone.parameters(), batches)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert [loss.item() for loss in losses] == pytest.approx([loss.item() for loss in expected], abs=tolerance)


def test_compute_is_priced_in_the_precision_that_is_asked_for() -> None:
    options: dict[str, Any] = dict(tp=1, pp=1, dp=8, zero=0, recompute="none")
    seconds = {name: searched(precision=name, **options).predictions[0] for name in ("fp32", "bf16-mixed", "bf16")}
    assert seconds["bf16"].step_seconds < seconds["bf16-mixed"].step_seconds < seconds["fp32"].step_seconds
    assert {found.layout.precision for found in seconds.values()} == set(seconds)
    held = {name: (found.memory.parameter_bytes, found.memory.optimizer_bytes) for name, found in seconds.items()}
    assert held["bf16-mixed"] == held["fp32"] == tuple(2 * num_bytes for num_bytes in held["bf16"])
    with pytest.raises(BadArgument, match="precision = 'fp7'"):
        searched(precision="fp7")


def test_auto_degrees_in_a_precision_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    model, batch = GPT(layers=4), gpt_batch(8)
    for zero in (2, "auto"):
        par = autopar.parallelize(model, batch, tp="auto", pp=1, dp="auto", zero=zero, precision="bf16-mixed", recompute="auto")
        plan = par.plan
        assert plan.num_ranks == 4 and plan.precision == "bf16-mixed"
        assert zero == "auto" or plan.zero == (zero if plan.mesh.get("dp", 1) > 1 else 0)


def test_auto_degrees_use_all_the_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    model, batch = GPT(layers=4), gpt_batch(8)
    par = autopar.parallelize(model, batch, tp="auto", pp="auto", schedule="auto", recompute="auto")
    assert par.plan.num_ranks == 4
    fixed = autopar.parallelize(model, batch, tp="auto", pp=2)
    assert dict(fixed.plan.mesh) == {"pp": 2, "tp": 2}
    given = autopar.parallelize(model, batch, tp=2, pp=1, dp=1, microbatches="auto", recompute="auto")
    assert dict(given.plan.mesh) == {"pp": 1, "tp": 2}, "what degrees multiply to is the number of ranks"
    with pytest.raises(BadArgument, match='tp="auto" needs example_inputs'):
        autopar.parallelize(model, tp="auto")


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "nothing to plan for"),
        ({"hardware": "h1000"}, r"no hardware profile 'h1000'\n.*a100-80gb"),
        ({"tp": 3}, "no degrees multiply to 8 GPUs with tp = 3"),
        ({"dp": 8, "global_batch": 12}, r"divides a global batch of 12(.|\n)*8 or 16"),
        ({"global_batch": 0}, "global_batch = 0"),
        ({"nodes": 3}, "spread evenly over 3 nodes"),
        ({"nodes": "2"}, "spread evenly over '2' nodes"),
        ({"virtual_stages": 0}, "virtual_stages = 0"),
        ({"hardware": "v100-32gb", "precision": "bf16"}, "v100-32gb has no rate for bf16"),
        ({"tp": 0}, "tp = 0"),
        ({"zero": 4}, "zero = 4"),
        ({"recompute": "some"}, "recompute = 'some'"),
        ({"schedule": "none-such"}, "none-such"),
    ],
)
def test_what_cannot_be_is_one_clear_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        searched(**options)


def test_a_model_that_fits_nowhere_is_told_what_would_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"fits on 8 GPUs of .* in no layout") as free:
        searched(memory_bytes=1_510_000_000)  # 10 MB beside the driver's context
    assert "use" in str(free.value)
    least = min(found.peak_bytes for found in searched().front)
    with pytest.raises(DoesNotFit) as bound:
        searched(memory_bytes=int(least * 1.01), zero=0, recompute="none", tp=1, pp=1)
    assert "ZeRO" in str(bound.value) or "GPUs" in str(bound.value)


def test_a_precision_that_the_device_has_no_rate_for_is_said_to_be_so() -> None:
    with pytest.raises(BadArgument, match="bf16"):
        searched(hardware="v100-32gb", precision="bf16")


def test_layouts_that_are_not_a_models_are_passed_over() -> None:
    with pytest.raises(AutoparError):
        searched().evaluator.predict(Layout(pp=64))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_saves_and_draws(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    page, plan = tmp_path / "search.html", tmp_path / "plan.json"
    words = ["search", "examples/mlp.py:example", "--gpus", "4", "--dp", "1", "--hardware", "cpu", "--top", "3"]
    assert main([*words, "--html", str(page), "--save", str(plan)]) == 0
    out, err = capsys.readouterr()
    assert "WHY THE RUNNERS-UP LOST" in out and err == "" and page.read_text().startswith("<!doctype html>")
    assert Plan.load(plan).num_ranks == 4
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["plans"]) == 3
    assert main(["plan", "examples/mlp.py:example", "--tp", "auto", "--pp", "auto", "--gpus", "4"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_the_command_explains_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "examples/mlp.py:example", "pp=2", "--gpus", "4", "--hardware", "cpu"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "only pp=2" in text or "* " in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "pp"
    assert main(["explain", "examples/mlp.py:example", "pp=2"]) == 2
    assert "--gpus N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "nothing to plan for"),
        (["--gpus", "4", "--hardware", "h1000"], "no hardware profile 'h1000'"),
        (["--gpus", "4", "--dp", "4", "--global-batch", "6"], "divides a global batch of 6"),
        (["--gpus", "4", "--memory", "lots"], "not a number of bytes"),
        (["--gpus", "4", "--memory", "1MiB"], "in no layout"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "examples/mlp.py:example", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_profile_with_a_missing_or_absurd_number_is_named(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(searched().hardware.to_json())
    for change, message in (({"memory_bytes": None}, "has no memory_bytes"), ({"matmul_efficiency": 7.0}, "no device is like that")):
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({k: v for k, v in {**values, **change}.items() if v is not None}))
        assert main(["search", "examples/mlp.py:example", "--gpus", "4", "--hardware", str(path)]) == 2
        assert message in capsys.readouterr().err

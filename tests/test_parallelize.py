"""The one object a user holds: its forward, its modes, its gradients, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from reference import model_loss, train, wide
from torch import Tensor, nn

import autopar
from autopar.errors import BadArgument

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "gpt": (GPT, gpt_batch),
    "hf-gpt2": (tiny_gpt2, causal_batch),
    "hf-llama": (tiny_llama, causal_batch),
}


def built(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0](**changes)


def with_dropout() -> nn.Module:
    return built("hf-gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)


# ---- forward -------------------------------------------------------------------------------------------------


EACH = [(name, mesh) for name in MODELS for mesh in MESHES]


@pytest.mark.parametrize(("name", "mesh"), wide(EACH, lambda name, mesh: name == "gpt" or (name, mesh) == ("hf-gpt2", (2, 2))))
def test_a_call_returns_what_the_model_returns(name: str, mesh: tuple[int, int]) -> None:
    model, batch = built(name).eval(), MODELS[name][1](rows=5)
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1], microbatches=2)
    with torch.no_grad():
        expected = model(**batch)
    found = par(**batch)
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert set(found) <= set(expected), "a cache is switched off"
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in par.parameters())
    par.close()


def test_a_model_can_be_called_with_a_longer_sequence_and_more_rows() -> None:
    model = built("gpt").eval()
    par = autopar.parallelize(model, gpt_batch(rows=4, tokens=8), tp=2, pp=2)
    for rows, tokens in ((4, 8), (9, 8), (4, 31)):
        batch = gpt_batch(rows=rows, tokens=tokens)
        torch.testing.assert_close(par(**batch), model(**batch), rtol=1e-5, atol=1e-5)
    par.close()


# ---- what is traced later, and what is left alone ------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_without_example_inputs_the_first_step_traces(mesh: tuple[int, int]) -> None:
    model, batch = built("gpt"), gpt_batch()
    par = autopar.parallelize(model, tp=mesh[0], pp=mesh[1])
    with pytest.raises(BadArgument, match=r"(?s)no plan yet.*example_inputs"):
        _ = par.plan
    uses: list[Callable[[], Any]] = [lambda: list(par.parameters()), par.state_dict, par.full_state_dict, par.initialize, par.zero_grad]
    for use in uses:
        with pytest.raises(BadArgument, match=r"(?s)no plan yet.*example_inputs"):
            use()
    loss = par.step(**batch)
    torch.testing.assert_close(loss, model(**batch)[0], rtol=1e-6, atol=1e-6)
    assert par.plan.mesh == {"pp": mesh[1], "tp": mesh[0]}
    par.close()


def everything_about(model: nn.Module) -> dict[str, Any]:
    """What must be the same before and after, by identity where it is an object."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        parts: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]
        found[path] = [module.training, *[{key: id(value) for key, value in part.items()} for part in parts]]
        found[path] += [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        found[path] += [sorted(vars(module)), type(module), type(module).forward]
    found["requires_grad"] = [parameter.requires_grad for parameter in model.parameters()]
    found["grads"] = [parameter.grad for parameter in model.parameters()]
    return found


@pytest.mark.parametrize(
    ("name", "training"),
    wide([("gpt", True), ("gpt", False), ("hf-gpt2", True), ("hf-llama", False)], lambda name, training: name != "hf-llama"),
)
def test_the_users_model_is_never_modified(name: str, training: bool) -> None:
    model, batch = built(name).train(training), MODELS[name][1]()
    next(model.parameters()).requires_grad_(False)
    before, values = everything_about(model), copy.deepcopy(model.state_dict())
    inputs = {key: tensor.clone() for key, tensor in batch.items()}
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    train(lambda each: par.step(**each), par.parameters(), [batch] * 3)
    par.eval()(**batch)
    par.full_state_dict()
    par.close()
    assert everything_about(model) == before
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, inputs[key]) for key, tensor in batch.items())


def test_what_the_user_has_frozen_gets_no_gradient_and_does_not_change() -> None:
    model, batch = built("gpt", tied=False), gpt_batch()
    frozen = {"wte.weight", "h.0.attn.qkv.weight", "h.1.ln2.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    reference = copy.deepcopy(model)
    par.step(**batch)
    model_loss(reference, batch).backward()
    for name, parameter in reference.named_parameters():
        found = par._ranks().whole(name, "grad")  # type: ignore[attr-defined]
        assert (found is None) == (name in frozen) == (parameter.grad is None)
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW([p for p in par.parameters() if p.requires_grad], lr=0.1, weight_decay=1.0).step()
    after = par.full_state_dict()
    assert {name for name in after if torch.equal(after[name], model.state_dict()[name])} == frozen
    par.close()


# ---- dropout -------------------------------------------------------------------------------------------------


def losses_with_dropout(seed: int, tp: int, steps: int = 3) -> tuple[list[float], autopar.ParallelModel]:
    batch = causal_batch()
    par = autopar.parallelize(with_dropout(), batch, tp=tp, pp=2, seed=seed)
    losses = train(lambda each: par.step(**each), par.parameters(), [batch] * steps)
    return [loss.item() for loss in losses], par


def test_a_seed_gives_the_same_losses_again_and_another_seed_others() -> None:
    found = []
    for seed in (5, 5, 6):
        losses, par = losses_with_dropout(seed, 2)
        par.close()
        found.append(losses)
    assert found[0] == found[1] and found[0][0] != found[2][0]


def test_evaluation_switches_dropout_off_and_training_on_again() -> None:
    model, batch = with_dropout(), causal_batch()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    assert par.training
    expected = model.eval()(**batch)
    first, again = par.eval()(**batch), par(**batch)
    assert torch.equal(first.logits, again.logits)
    torch.testing.assert_close(first.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(par.step(**batch), expected.loss, rtol=1e-6, atol=1e-6)
    noisy = [par.train()(**batch).logits for _ in range(2)]
    assert not torch.equal(noisy[0], noisy[1])
    assert all((logits - first.logits).abs().max() > 0.01 for logits in noisy)
    losses = torch.stack([par.step(**batch) for _ in range(20)])
    assert (losses.mean() - expected.loss).abs() < 0.05, "what is kept is scaled up"
    par.close()


def test_whole_values_stay_the_same_on_all_ranks_while_dropout_is_on() -> None:
    """Masks of whole values agree between tensor-parallel ranks; tied weights agree between stages."""
    _, par = losses_with_dropout(0, 2, steps=5)
    plan, parameters = par.plan, par._ranks().parameters_of  # type: ignore[attr-defined]
    compared = set()
    for stage in plan.stages:
        ranks = [rank for rank in range(plan.num_ranks) if plan.coords(rank)["pp"] == stage.index]
        for name, text in stage.parameters.items():
            if "/tp" not in text:
                assert torch.equal(parameters[ranks[0]][name], parameters[ranks[1]][name]), name
                compared.add(name)
        for name, held in stage.tied.items():
            for rank in range(plan.num_ranks):
                other = next(
                    each for each in range(plan.num_ranks) if plan.coords(each) == {**plan.coords(rank), "pp": held[0]}
                )
                if plan.coords(rank)["pp"] in held:
                    assert torch.equal(parameters[rank][name], parameters[other][name])
    assert len(compared) > 8 and any(stage.tied for stage in plan.stages)
    par.close()


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mesh"), wide(EACH, lambda name, mesh: name == "gpt" or (name, mesh) == ("hf-gpt2", (2, 2))))
def test_clipping_counts_each_parameter_once(name: str, mesh: tuple[int, int]) -> None:
    """Tied on two stages, whole on all tensor-parallel ranks, or split over them. First a norm that is not reached."""
    model, batch = built(name), MODELS[name][1]()
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1])
    par.step(**batch)
    model_loss(model, batch).backward()
    for max_norm in (1e6, 0.1):
        norm, expected = par.clip_grad_norm_(max_norm), torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)
        for key, parameter in model.named_parameters():
            found = par._ranks().whole(key, "grad")  # type: ignore[attr-defined]
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5 * min(max_norm, 1.0))
    par.close()


def test_gradients_are_added_until_they_are_cleared() -> None:
    model, batch = built("gpt"), gpt_batch()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    par.step(**batch)
    once = [parameter.grad.clone() for parameter in par.parameters() if parameter.grad is not None]
    par.step(**batch)
    for first, parameter in zip(once, par.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first, rtol=1e-5, atol=1e-7)
    par.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in par.parameters())
    par.zero_grad()
    assert all(parameter.grad is None for parameter in par.parameters())
    par.close()


def test_parameters_have_the_users_names() -> None:
    model, batch = built("gpt"), gpt_batch()
    alone = autopar.parallelize(model, batch)
    assert [name for name, _ in alone.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    named = dict(par.named_parameters())
    assert len(named) == len(list(par.parameters())) and len({id(each) for each in par.parameters()}) == len(named)
    assert {name.partition(": ")[2] for name in named} == dict(model.named_parameters()).keys()
    assert named["rank 1: h.0.attn.qkv.weight"].shape == (48, 32)
    assert named["rank 0: wte.weight"].shape == (64, 32) and "rank 2: wte.weight" not in named, "what ranks hold alike is named once"


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_trains_all_ranks(kind: str) -> None:
    model, batch = built("gpt"), gpt_batch()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    reference = copy.deepcopy(model)

    def trained(step: Callable[[], Tensor], parameters: Iterator[nn.Parameter]) -> list[float]:
        optimizer, losses = OPTIMIZERS[kind](parameters), []
        for _ in range(5):
            optimizer.zero_grad()
            losses.append(step().item())
            optimizer.step()
        return losses

    def step() -> Tensor:
        loss = model_loss(reference, batch)
        loss.backward()
        return loss

    found, expected = trained(lambda: par.step(**batch), par.parameters()), trained(step, reference.parameters())
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert found[-1] < found[0] - 0.05
    par.close()


def test_a_closed_model_starts_again() -> None:
    batch = gpt_batch()
    par = autopar.parallelize(built("gpt"), batch, tp=2, pp=2)
    first = par.step(**batch)
    par.close()
    assert torch.equal(par.step(**batch), first)
    par.close()


# ---- processes -----------------------------------------------------------------------------------------------


def job() -> dict[str, Any]:
    """One rank of tp=2 x pp=2: the clipped norm, dropout, and what ranks must agree about."""
    batch = gpt_batch()
    par = autopar.parallelize(built("gpt"), batch, tp=2, pp=2)
    report: dict[str, Any] = {"loss": par.step(**batch).item(), "norm": par.clip_grad_norm_(0.1).item()}
    report["gradients"] = {name: parameter.grad for name, parameter in par.named_parameters()}
    report["output"] = par.eval()(**batch)
    par.close()
    noisy = autopar.parallelize(with_dropout(), causal_batch(), tp=2, pp=2, seed=5)
    losses = train(lambda each: noisy.step(**each), noisy.parameters(), [causal_batch()] * 3)
    report["noisy losses"] = [loss.item() for loss in losses]
    report["parameters"] = {name: parameter.detach() for name, parameter in noisy.named_parameters()}
    report["plan"] = [dict(stage.parameters) for stage in noisy.plan.stages]
    noisy.close()
    return report


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return autopar.launch(job, 4)


def test_processes_return_one_loss_and_one_norm(reports: list[dict[str, Any]]) -> None:
    model, batch = built("gpt"), gpt_batch()
    loss = model_loss(model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for report in reports:
        assert report["loss"] == reports[0]["loss"] and report["norm"] == reports[0]["norm"]
        assert abs(report["loss"] - loss.item()) <= 1e-6 * loss.item()
        assert abs(report["norm"] - norm.item()) <= 1e-5 * norm.item()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for report in reports:
        for name, gradient in report["gradients"].items():
            if gradient.shape == grads[name].shape:
                torch.testing.assert_close(gradient, grads[name], rtol=1e-4, atol=1e-6)


def test_processes_get_the_output_on_the_last_stage_only(reports: list[dict[str, Any]]) -> None:
    model, batch = built("gpt").eval(), gpt_batch()
    assert reports[0]["output"] is None and reports[1]["output"] is None
    for report in reports[2:]:
        torch.testing.assert_close(report["output"], model(**batch), rtol=1e-5, atol=1e-5)


def test_processes_draw_the_numbers_that_threads_draw_and_keep_whole_values_equal(
    reports: list[dict[str, Any]],
) -> None:
    losses, par = losses_with_dropout(5, 2)
    par.close()
    for report in reports:
        assert report["noisy losses"] == pytest.approx(losses, rel=1e-5)
    for stage, (first, second) in enumerate(((0, 1), (2, 3))):
        for name, text in reports[0]["plan"][stage].items():
            if "/tp" not in text:
                assert torch.equal(reports[first]["parameters"][name], reports[second]["parameters"][name]), name

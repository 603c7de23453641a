"""One step on several ranks equals the untouched model on the whole batch, however the loss is written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from reference import model_loss, wide
from torch import Tensor, nn

import autopar
from costmodel.errors import BadArgument, WeightsMissing

MESHES = [(2, 1), (4, 1), (1, 2), (2, 2), (4, 4)]

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "gpt": (lambda: GPT(layers=4), gpt_batch),
    "gpt-explicit-mask": (lambda: GPT(layers=4, flash=False, tied=False), gpt_batch),
    "hf-gpt2": (lambda: tiny_gpt2(n_layer=4), causal_batch),
    "hf-llama-grouped": (lambda: tiny_llama(num_hidden_layers=4), causal_batch),
    "hf-llama-one-kv-head": (lambda: tiny_llama(num_hidden_layers=4, num_key_value_heads=1), causal_batch),
}
QUICK = {
    ("gpt", (2, 1)), ("gpt", (4, 4)), ("gpt-explicit-mask", (2, 1)), ("hf-gpt2", (4, 1)), ("hf-llama-grouped", (2, 2)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mesh"), wide([(name, mesh) for name in MODELS for mesh in MESHES], lambda *case: case in QUICK)
)
def test_loss_and_every_gradient_equal_the_untouched_model(name: str, mesh: tuple[int, int]) -> None:
    """Loss within 1e-6, gradients within 1e-5 relative. Largest seen: 2e-7 and 8e-7."""
    torch.manual_seed(0)
    build, batch = MODELS[name]
    report = autopar.verify(build(), batch(), tp=mesh[0], pp=mesh[1])
    assert report.ok, report
    assert report.loss_tolerance == 1e-6 and report.tolerance == 1e-5
    trained = {name for name, _ in build().named_parameters()}
    assert {d.name for d in report.differences if d.kind == "gradient"} == trained


class ScaledHeads(nn.Module):
    """A weight that is whole on every rank and meets the heads of that rank only: each has a part of its gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.scale, self.down = nn.Linear(16, 32), nn.Parameter(torch.randn(8)), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (4, 8)) * self.scale
        return self.down(heads.tanh().flatten(-2)).square().mean()


HEADS_SPLIT: dict[str, Any] = {"overrides": {"placements": {"up.weight": "32/tp 16", "down.weight": "16 32/tp"}}}


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)])
def test_a_weight_that_is_whole_inside_a_split_region(mesh: tuple[int, int]) -> None:
    report = autopar.verify(ScaledHeads(), {"x": torch.randn(8, 16)}, tp=mesh[0], pp=mesh[1], **HEADS_SPLIT)
    assert str(report.plan.placements["scale"]) == "8" and str(report.plan.placements["up.weight"]) == "32/tp 16"
    assert report.ok, report


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_split_over_more_ranks_than_there_are_key_heads(kv_heads: int) -> None:
    """Keys and values are whole on each rank, which uses those of its query heads; their gradients are summed."""
    torch.manual_seed(0)
    model = tiny_llama(num_key_value_heads=kv_heads)
    overrides = {"placements": {"*q_proj.weight": "32/tp 32"}}
    report = autopar.verify(model, causal_batch(), tp=4, pp=2, overrides=overrides)
    partial = {name for stage in report.plan.stages for name in stage.partial_gradients}
    assert {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "kv"} <= partial
    assert str(report.plan.placements["model.layers.0.self_attn.o_proj.weight"]) == "32 32/tp"
    assert report.ok, report


def test_verify_sees_a_gradient_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that forget to add up what each has of a gradient."""
    from autopar.runtime.gradients import GradientSums

    monkeypatch.setattr(GradientSums, "_sum_partial", lambda self: None)
    report = autopar.verify(ScaledHeads(), {"x": torch.randn(8, 16)}, tp=2, pp=2, **HEADS_SPLIT)
    wrong = {difference.name for difference in report.differences if difference.relative > report.tolerance}
    assert not report.ok and wrong == {"scale"} == {report.worst.name}
    assert "DIFFERENT" in str(report) and "differs" in str(report)


def test_verify_does_not_touch_the_model_and_needs_weights_and_a_loss() -> None:
    model, batch = GPT(), gpt_batch()
    before = copy.deepcopy(model.state_dict())
    autopar.verify(model, batch, tp=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.device("meta"):
        empty = GPT()
    with pytest.raises(WeightsMissing, match="has to run the model"):
        autopar.verify(empty, batch, tp=2)
    with pytest.raises(BadArgument, match="no loss to compare"):
        autopar.verify(model, {"idx": batch["idx"]}, tp=2)


# ---- microbatches that hold different things -----------------------------------------------------------------


class Classifier(nn.Module):
    """Two layers and a loss written by the test."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.out = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(24, 16)
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Any:
        logits = self.out(F.gelu(self.inner(self.embed(ids))))
        return self.loss(logits, labels, mask)


def ragged_batch(rows: int = 10, tokens: int = 6) -> dict[str, Tensor]:
    """Rows with few labels first and many last, and one without any."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 16, (rows, tokens), generator=generator)
    labels = torch.randint(0, 16, (rows, tokens), generator=generator)
    for row in range(rows):
        labels[row, : max(0, tokens - row)] = -100
    mask = (labels != -100).float() * torch.rand(rows, tokens, generator=generator)
    return {"ids": ids, "labels": labels, "mask": mask}


def entropies(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


CLASS_WEIGHTS = torch.linspace(0.5, 2.0, 16)
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "mean over labels": lambda logits, labels, mask: entropies(logits, labels),
    "sum over labels": lambda logits, labels, mask: entropies(logits, labels, reduction="sum"),
    "label smoothing": lambda logits, labels, mask: entropies(logits, labels, label_smoothing=0.1),
    "another ignored label": lambda logits, labels, mask: entropies(logits, labels.clamp_min(0), ignore_index=0),
    "class weights": lambda logits, labels, mask: entropies(logits, labels, weight=CLASS_WEIGHTS),
    "mean of a masked sum": lambda logits, labels, mask: (
        (entropies(logits, labels, reduction="none") * mask.flatten()).sum() / mask.sum()
    ),
    "over at least one": lambda logits, labels, mask: (
        (entropies(logits, labels, reduction="none") * mask.flatten()).sum() / mask.sum().clamp(min=20.0)
    ),
    "over a root": lambda logits, labels, mask: (logits.square().mean(-1) * mask).sum() / (mask.sum() + 1e-6).sqrt(),
    "mean over elements": lambda logits, labels, mask: logits.square().mean(),
    "mean squared error": lambda logits, labels, mask: F.mse_loss(logits.mean(-1), mask),
    "sum of squares": lambda logits, labels, mask: F.mse_loss(logits[..., 0], mask, reduction="sum") * 0.5,
    "two losses": lambda logits, labels, mask: entropies(logits, labels) + 0.01 * logits.logsumexp(-1).square().mean(),
    "difference of two": lambda logits, labels, mask: (
        entropies(logits, labels) - 0.1 * logits.softmax(-1).amax(-1).mean()
    ),
    "a mean and a sum": lambda logits, labels, mask: entropies(logits, labels) + 1e-3 * logits.abs().sum(),
    "sum of means over rows": lambda logits, labels, mask: logits.square().mean(0).sum(),
    "stacked": lambda logits, labels, mask: torch.stack([entropies(logits, labels), logits.square().mean()]).sum(),
    "times a reciprocal": lambda logits, labels, mask: (logits.mean(-1) * mask).sum() * (1.0 / mask.sum()),
    "a dot product": lambda logits, labels, mask: torch.dot(logits.mean(-1).flatten(), mask.flatten()),
    "one term twice": lambda logits, labels, mask: (lambda term: term + 0.5 * (term - 2 * term))(entropies(logits, labels)),
    "scaled": lambda logits, labels, mask: 3.0 * entropies(logits, labels) / 7,
    "first of a tuple": lambda logits, labels, mask: (entropies(logits, labels), logits),
    "in a dict": lambda logits, labels, mask: {"logits": logits, "loss": entropies(logits, labels)},
}


def assert_equal_to(model: nn.Module, par: autopar.ParallelModel, loss: Tensor, expected: Tensor) -> None:
    """The loss within 1e-6, every gradient within 1e-5 of its largest element; `model` has run backward."""
    assert abs(loss.item() - expected.item()) <= 1e-6 * max(1.0, abs(expected.item()))
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        found = par._ranks().whole(name, "grad")  # type: ignore[attr-defined]
        assert parameter.grad is not None and found is not None
        scale = max(parameter.grad.abs().max().item(), 1e-3 * largest)
        assert (found - parameter.grad).abs().max().item() <= 1e-5 * scale, name


def loss_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    ("kind", "mesh"),
    wide([(kind, mesh) for kind in LOSSES for mesh in ((2, 2), (1, 2))], lambda kind, mesh: mesh == (2, 2)),
)
def test_ten_rows_in_four_microbatches_with_different_numbers_of_labels(kind: str, mesh: tuple[int, int]) -> None:
    model, batch = Classifier(LOSSES[kind]), ragged_batch()
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1], microbatches=4)
    loss = par.step(**batch)
    expected = loss_of(model(**batch))
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    output = par.eval()(**batch)
    assert abs(loss_of(output).item() - expected.item()) <= 1e-6 * max(1.0, abs(expected.item()))
    par.close()


@pytest.mark.parametrize(
    "kind", ["mean over labels", "label smoothing", "class weights", "mean of a masked sum", "over at least one"]
)
def test_a_microbatch_without_a_label_counts_nothing(kind: str) -> None:
    model, batch = Classifier(LOSSES[kind]), ragged_batch()
    batch["labels"][:3], batch["mask"][:3] = -100, 0.0  # the first of four microbatches
    par = autopar.parallelize(model, batch, tp=2, pp=2, microbatches=4)
    loss = par.step(**batch)
    expected = loss_of(model(**batch))
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    par.close()


class Auxiliary(Classifier):
    """A loss term of the first layer, and one of the last with class weights in a buffer."""

    def __init__(self) -> None:
        super().__init__(LOSSES["mean over labels"])
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)))
        self.criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        auxiliary = (x.square().sum(-1) * mask).sum() / mask.sum()
        logits = self.out(F.gelu(self.inner(self.blocks(x))))
        return self.criterion(logits.flatten(0, 1), labels.flatten()) + 0.1 * auxiliary


class Balanced(Classifier):
    """Two losses that learned numbers weigh, and what keeps the numbers small: it is added once a batch."""

    def __init__(self) -> None:
        super().__init__(LOSSES["mean over labels"])
        self.noise = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = self.out(F.gelu(self.inner(self.embed(ids))))
        losses = torch.stack([entropies(logits, labels), logits.square().mean()])
        return (losses * torch.exp(-self.noise) + self.noise).sum()


@pytest.mark.parametrize("mesh", [{"pp": 2, "microbatches": 4}, {"dp": 3}, {"dp": 2, "tp": 2, "zero": 3}], ids=str)
def test_losses_that_learned_numbers_weigh(mesh: dict[str, int]) -> None:
    model, batch = Balanced(), ragged_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        par = autopar.parallelize(model, batch, **mesh)
    loss, expected = par.step(**batch), model(**batch)
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    par.close()


ACROSS_ROWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a root of a mean": lambda logits, labels, mask: logits.square().mean().sqrt(),
    "statistics over rows": lambda logits, labels, mask: entropies(logits, labels) + logits.softmax(-1).mean((0, 1)).square().sum(),
    "rows beside each other": lambda logits, labels, mask: (logits.mean(1) @ logits.mean(1).T).logsumexp(-1).mean(),
}


@pytest.mark.parametrize("kind", ACROSS_ROWS)
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"dp": 2, "pp": 2, "microbatches": 2}, {"pp": 2, "microbatches": 2}], ids=str)
def test_a_loss_that_compares_rows_is_said_not_to_be_the_batchs(kind: str, mesh: dict[str, int]) -> None:
    says = "2 replicas" if "dp" in mesh else "2 microbatches"
    with pytest.warns(UserWarning, match=f"{says}.* do not give the whole batch's loss: it compares rows"):
        autopar.parallelize(Classifier(ACROSS_ROWS[kind]), ragged_batch(), **mesh)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (1, 4)])
def test_loss_terms_on_different_stages(mesh: tuple[int, int]) -> None:
    model, batch = Auxiliary(), ragged_batch()
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1], microbatches=4)
    loss, expected = par.step(**batch), model(**batch)
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    par.close()


def test_the_average_of_the_microbatches_losses_would_be_another_number() -> None:
    """What the shares are for: these batches tell."""
    batch = ragged_batch()
    for kind in ("mean over labels", "class weights", "mean of a masked sum", "mean over elements"):
        model = Classifier(LOSSES[kind])
        pieces = {name: tensor.tensor_split(4) for name, tensor in batch.items()}
        losses = [model(**{name: pieces[name][index] for name in batch}) for index in range(4)]
        assert abs(torch.stack(losses).mean() - model(**batch)) > 1e-4, kind


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_a_loss_function_beside_the_model(mesh: tuple[int, int]) -> None:
    model, batch = Classifier(lambda logits, labels, mask: logits * mask[..., None]), ragged_batch()
    arguments = {**batch, "targets": batch["labels"]}

    def targets_loss(output: Tensor, targets: Tensor) -> Tensor:
        return entropies(output, targets)

    par = autopar.parallelize(model, arguments, tp=mesh[0], pp=mesh[1], microbatches=4, loss_fn=targets_loss)
    loss = par.step(**arguments)
    expected = targets_loss(model(**batch), batch["labels"])
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    torch.testing.assert_close(par(**arguments), model(**batch))
    par.close()


def test_positional_arguments() -> None:
    class Net(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Net(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(6, 8), torch.randn(6, 4)
    par = autopar.parallelize(model, (x, y), tp=2, pp=2, loss_fn=F.mse_loss)
    loss = par.step(x, y)
    expected = F.mse_loss(model(x), y)
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    par.close()


@pytest.mark.parametrize("name", ["gpt", "hf-gpt2", pytest.param("hf-llama-grouped", marks=pytest.mark.slow)])
def test_ragged_labels_on_real_models(name: str) -> None:
    """A batch of 10 rows over 4 microbatches; the last row has one label, the first all."""
    torch.manual_seed(0)
    build, make = MODELS[name]
    model, batch = build(), {key: tensor.clone() for key, tensor in make(rows=10).items()}
    labels = batch["targets"] if "targets" in batch else batch["labels"]
    for row in range(10):
        labels[row, row + 6 :] = -100
    par = autopar.parallelize(model, batch, tp=2, pp=2, microbatches=4)
    loss = par.step(**batch)
    expected = model_loss(model, batch)
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    fewer = {key: tensor[:5] for key, tensor in batch.items()}  # another batch size than the plan's example
    for parameter in model.parameters():
        parameter.grad = None
    par.zero_grad()
    loss, expected = par.step(**fewer), model_loss(model, fewer)
    expected.backward()
    assert_equal_to(model, par, loss, expected)
    par.close()


def test_a_batch_without_any_label_gives_nan_as_the_model_does() -> None:
    model, batch = Classifier(LOSSES["mean over labels"]), ragged_batch()
    batch["labels"].fill_(-100)
    par = autopar.parallelize(model, batch, pp=2, microbatches=2)
    assert model(**batch).isnan() and par.step(**batch).isnan()
    par.close()


def test_verify_compares_without_dropout() -> None:
    torch.manual_seed(0)
    model = tiny_gpt2(attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    report = autopar.verify(model, causal_batch(), tp=2, pp=2)
    assert report.ok and model.training, report


def test_bfloat16() -> None:
    torch.manual_seed(0)
    report = autopar.verify(GPT(layers=4).bfloat16(), gpt_batch(), tp=2, pp=2)
    assert report.ok, report
    assert report.worst.relative > 1e-5

"""Random numbers on several ranks: whole values agree, split ones differ, runs repeat, and a gradient goes through its forward's mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch
from torch import Tensor, nn

import autopar
from autopar import random_ops
from autopar.program import StageModule
from costmodel.errors import BadArgument

SPLIT: dict[str, Any] = {"overrides": {"placements": {"up.weight": 0, "down.weight": 1}}}


class Dropped(nn.Module):
    """Dropout on the split hidden values and on the whole result; homogeneous in each weight, so that loss = sum of weight x gradient."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.up(x))
        result = self.drop(self.down(hidden))
        return result.sum(), hidden, result


X = torch.ones(8, 8)


def pieces(par: autopar.ParallelModel, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each rank of the last stage has of the outputs, in training."""
    ranks = par._ranks()
    found = ranks._run("forward", batch)  # type: ignore[attr-defined]
    return [found[rank] for rank in range(par.plan.num_ranks) if par.plan.coords(rank)["pp"] == par.plan.mesh["pp"] - 1]


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)])
def test_whole_values_have_one_mask_and_split_ones_a_mask_on_each_rank(mesh: tuple[int, int]) -> None:
    par = autopar.parallelize(Dropped(), {"x": X}, tp=mesh[0], pp=mesh[1], microbatches=2, **SPLIT)
    assert "sharded=True" in par.plan.source(0) and "0.5, self)" in par.plan.source(par.plan.num_ranks - 1)
    kept: list[Tensor] = []
    for _ in range(2):
        ranks = pieces(par, {"x": X})
        hidden_name, result_name = (name for name in ranks[0] if name != "loss")
        hidden = [rank[hidden_name] != 0 for rank in ranks]
        assert all(torch.equal(rank[result_name], ranks[0][result_name]) for rank in ranks)
        assert hidden[0].shape == (8, 32 // mesh[0])
        assert not any(torch.equal(a, b) for k, a in enumerate(hidden) for b in hidden[k + 1 :])
        kept += [torch.cat(hidden, 1)[:4], torch.cat(hidden, 1)[4:]]  # two microbatches of equal rows
    assert not any(torch.equal(a, b) for k, a in enumerate(kept) for b in kept[k + 1 :]), "masks are drawn anew"
    par.close()


@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_a_job_repeats_with_its_seed_and_leaves_the_global_generator_alone() -> None:
    def losses(seed: int, manual: int) -> list[float]:
        par = autopar.parallelize(Noisy("rand_like"), {"x": X, "y": X}, tp=2, pp=2, microbatches=2, seed=seed)
        torch.manual_seed(manual)
        before = torch.get_rng_state()
        found = [par.step(x=X, y=X).item() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        par.close()
        return found

    model_losses = losses(1, 5)
    assert model_losses == losses(1, 6) and model_losses != losses(2, 5) and len(set(model_losses)) == 3


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_a_gradient_passes_through_the_mask_of_its_forward(mesh: tuple[int, int]) -> None:
    """The loss is linear in each weight: it is the sum of weight x gradient only if both see the same masks."""
    model = Dropped()
    par = autopar.parallelize(model, {"x": X}, tp=mesh[0], pp=mesh[1], microbatches=2, **SPLIT)
    for _ in range(3):
        par.zero_grad()
        loss = par.step(x=X)
        for name, weight in model.named_parameters():
            gradient = par._ranks().whole(name, "grad")  # type: ignore[attr-defined]
            assert (weight * gradient).sum().item() == pytest.approx(loss.item(), rel=1e-5)
    par.close()


def test_the_expectation_of_many_steps_is_the_model_without_dropout() -> None:
    model = Dropped(0.3)
    par = autopar.parallelize(model, {"x": X}, tp=2, pp=1, **SPLIT)
    losses = torch.stack([par.step(x=X) for _ in range(400)])
    gradient = par._ranks().whole("down.weight", "grad") / 400  # type: ignore[attr-defined]
    par.close()
    model.eval()
    expected = model(X)[0]
    expected.backward()
    assert abs(losses.mean() - expected) < 4 * losses.std() / 20
    assert model.down.weight.grad is not None
    assert (gradient - model.down.weight.grad).abs().mean() < 0.05 * model.down.weight.grad.abs().mean()


# ---- attention --------------------------------------------------------------------------------------------------------


def stage_of(tp: int, seed: int = 0) -> StageModule:
    return StageModule({}, {}, {"pp": 0, "tp": tp}, seed=seed)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "boolean mask with a row that sees nothing": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(-1)},
    "added mask": {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)},
    "grouped heads": {"is_causal": True, "enable_gqa": True},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_with_dropout_is_attention_in_expectation(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options = ATTENTIONS[kind]
    q = torch.randn(2, 4, 6, 8, generator=generator)
    k, v = (torch.randn(2, 2 if "enable_gqa" in options else 4, 6, 8, generator=generator) for _ in "kv")
    stage = stage_of(0)
    drawn = torch.stack([random_ops.attention_with_dropout(q, k, v, 0.2, stage, **options) for _ in range(600)])
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert drawn[0].ne(drawn[1]).any()
    assert ((drawn.mean(0) - expected).abs() <= 5 * drawn.std(0) / 600**0.5 + 1e-6).all()
    stage.training = False
    assert torch.equal(random_ops.attention_with_dropout(q, k, v, 0.2, stage, **options), expected)


def test_attention_masks_of_ranks() -> None:
    ones = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.eye(8)[None, None]
    for sharded in (False, True):
        first, second = (
            random_ops.attention_with_dropout(*ones, 0.5, stage_of(tp), sharded=sharded) for tp in range(2)
        )
        assert set(first.unique().tolist()) == {0.0, 0.25}
        assert torch.equal(first, second) is not sharded


class DroppedGPT(GPT):
    """A GPT with dropout where people put it: the embedding, attention probabilities, residuals, hidden values."""

    def __init__(self, p: float = 0.2, flash: bool = True) -> None:
        super().__init__(flash=flash)
        self.p = p
        for block in self.h:
            block.forward = self._block(block)

    def _block(self, block: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            drop = lambda t: F.dropout(t, self.p, self.training)  # noqa: E731
            x = x + drop(self._attention(block.attn, block.ln1(x)))
            return x + drop(block.down(drop(F.gelu(block.up(block.ln2(x))))))

        return forward

    def _attention(self, attn: Any, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, attn.heads, C // attn.heads).transpose(1, 2) for t in attn.qkv(x).split(C, dim=2))
        p = self.p if self.training else 0.0
        if attn.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            mask = torch.tril(torch.ones(T, T, dtype=torch.bool))
            y = F.dropout(scores.masked_fill(~mask, float("-inf")).softmax(-1), p, self.training) @ v
        return attn.out(y.transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("flash", [True, False])
def test_a_transformer_with_dropout_trains_and_its_evaluation_is_the_untouched_models(flash: bool) -> None:
    torch.manual_seed(0)
    model, batch = DroppedGPT(flash=flash), gpt_batch(rows=8)
    par = autopar.parallelize(model, batch, tp=2, pp=2, microbatches=4)
    source = "".join(par.plan.source(rank) for rank in (0, 2))
    assert source.count("attention_with_dropout(") == (2 if flash else 0) and "self, sharded=True)" in source
    optimizer = torch.optim.AdamW(list(par.parameters()), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(par.step(**batch).item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert_tp_peers_agree(par)
    untouched = DroppedGPT(flash=flash)
    untouched.load_state_dict(par.full_state_dict())
    found, wanted = par.eval()(**batch), untouched.eval()(**batch)
    torch.testing.assert_close(found[1], wanted[1])
    assert model.training, "the user's model is as it was"
    par.train()
    assert len({par.step(**batch).item() for _ in range(3)}) == 3
    par.close()


def assert_tp_peers_agree(par: autopar.ParallelModel) -> None:
    """Every parameter that is whole is the same on all tp ranks of its stage, to the last bit."""
    compared = 0
    values = par._ranks().parameters_of  # type: ignore[attr-defined]
    for rank in range(par.plan.num_ranks):
        stage = par.plan.stages[par.plan.coords(rank)["pp"]]
        first = rank - par.plan.coords(rank)["tp"]
        for name, text in stage.parameters.items():
            if "/" not in text:
                assert torch.equal(values[rank][name], values[first][name]), (name, rank)
                compared += 1
    assert compared > 0


# ---- other random ops -------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "rand_like": lambda h: h * torch.rand_like(h),
    "rand": lambda h: h * torch.rand(h.shape),
    "randn": lambda h: h + torch.randn(8),
    "bernoulli": lambda h: h * torch.bernoulli(h.sigmoid()),
    "in place": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "uniform in place": lambda h: h * torch.empty(h.shape).uniform_(0.5, 1.5),
    "normal": lambda h: h + torch.normal(h.detach()),
    "multinomial": lambda h: h.gather(1, torch.multinomial(h.softmax(-1), 4)).sum(1, keepdim=True) + h,
    "gumbel": lambda h: h * F.gumbel_softmax(h),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "channel dropout": lambda h: F.dropout1d(h[:, None], 0.3, True)[:, 0],
    "rrelu": lambda h: F.rrelu(h, training=True),
    "permutation": lambda h: h[:, torch.randperm(8)],
    "drop a row": lambda h: h * (torch.rand(h.shape[0], 1) < 0.7) / 0.7,
}


class Noisy(nn.Module):
    """Noise on whole and on split values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c, self.d = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.noise = KINDS[kind]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.noise(self.b(F.gelu(self.a(x))))
        return F.mse_loss(self.d(self.noise(self.c(h)[:, :8]).repeat(1, 4)), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_other_random_ops_agree_on_tensor_parallel_ranks(kind: str) -> None:
    par = autopar.parallelize(Noisy(kind), {"x": X, "y": X}, tp=2, pp=2, microbatches=2)
    optimizer = torch.optim.AdamW(list(par.parameters()), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(par.step(x=X, y=X).item())
        optimizer.step()
    assert all(loss == loss for loss in losses)
    assert "draw(" in par.plan.source(0) + par.plan.source(2)
    assert_tp_peers_agree(par)
    par.close()


def test_ranks_that_draw_for_themselves_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above tells."""
    monkeypatch.setattr(StageModule, "generator", lambda self, sharded: self._sharded)
    par = autopar.parallelize(Dropped(), {"x": X}, tp=2, **SPLIT)
    ranks = pieces(par, {"x": X})
    name = list(ranks[0])[-1]
    assert not torch.equal(ranks[0][name], ranks[1][name])
    par.close()


class Shared(nn.Module):
    """One random value that two stages use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        noise = torch.rand(x.shape)
        first = self.a(x) * 0 + noise
        second = self.b(first) * 0 + noise
        return second.mean(), first, second


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)])
def test_a_random_value_that_two_stages_use_is_drawn_once(mesh: tuple[int, int]) -> None:
    par = autopar.parallelize(Shared(), {"x": X}, tp=mesh[0], pp=mesh[1], microbatches=2, overrides={"cuts": ["b"]})
    sources = [par.plan.source(0), par.plan.source(mesh[0])]
    assert [source.count(" = draw(") for source in sources] == [1, 0]
    _, first, second = par(x=X)
    assert torch.equal(first, second) and first.unique().numel() == 64
    par.close()


def test_labels_that_are_drawn_weigh_by_rows_and_the_plan_says_so() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            drawn = labels.masked_fill(torch.rand(labels.shape) < 0.5, -100)
            return F.cross_entropy(self.down(self.up(x)), drawn)

    batch = {"x": X, "labels": torch.arange(8)}
    par = autopar.parallelize(Masked(), batch, tp=2, microbatches=2)
    assert any("random numbers" in note for note in par.plan.notes)
    assert par.step(**batch).isfinite()
    par.close()


# ---- training and evaluation --------------------------------------------------------------------------------------------


def test_parts_that_are_frozen_in_evaluation_drop_nothing_in_training() -> None:
    model = Dropped()
    model.drop = nn.Dropout(0.5).eval()
    assert model.training
    report = autopar.verify(model, {"x": X}, tp=2, **SPLIT)
    assert report.ok and "dropout" not in report.plan.source(0)


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_each_mode_is_the_models_own(mesh: tuple[int, int]) -> None:
    """Batch statistics in training, running ones in evaluation; a model given in evaluation can be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    x, y = torch.randn(8, 8), torch.randn(8, 4)
    par = autopar.parallelize(model, (x, y), tp=mesh[0], pp=mesh[1], microbatches=2, loss_fn=F.mse_loss)
    assert len({par.step(x, y).item() for _ in range(3)}) == 3, "dropout"
    alone = copy.deepcopy(model)
    alone.load_state_dict(par.full_state_dict())
    assert alone[1].num_batches_tracked == 6
    torch.testing.assert_close(par.eval()(x, y), alone.eval()(x))
    assert torch.equal(par.full_state_dict()["1.running_mean"], alone[1].running_mean)
    assert model.training and model[3].training
    par.close()


def test_a_model_given_in_evaluation_can_be_trained_unless_that_updates_buffers() -> None:
    model = Dropped().eval()
    par = autopar.parallelize(model, {"x": X}, tp=2, microbatches=2, **SPLIT)
    assert len({par.step(x=X).item() for _ in range(3)}) == 1
    assert len({par.train().step(x=X).item() for _ in range(3)}) == 3
    assert not model.training and not model.drop.training
    par.close()
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    par = autopar.parallelize(model, (X, X[:, :4]), tp=2, loss_fn=F.mse_loss)
    par.step(X, X[:, :4])
    with pytest.raises(BadArgument, match=r"(?s)num_batches_tracked.*made for evaluation.*other mode"):
        par.train().step(X, X[:, :4])
    par.eval().step(X, X[:, :4])
    par.close()


def test_a_mode_that_changes_nothing_makes_no_further_programs() -> None:
    batch = gpt_batch()
    par = autopar.parallelize(GPT(), batch, tp=2)
    loss = par.step(**batch)
    assert par.eval()(**batch)[0].item() == pytest.approx(loss.item())
    assert {id(form.ranks()) for form in par._forms.values()} == {id(par._ranks())}
    par.close()


# ---- processes ----------------------------------------------------------------------------------------------------------


def job() -> tuple[dict[str, Tensor], list[Tensor], list[float]]:
    """One rank: its outputs in training, its parameters after two steps and the losses."""
    par = autopar.parallelize(Noisy("rand_like"), {"x": X, "y": X}, tp=2, microbatches=2, seed=3)
    optimizer = torch.optim.SGD(list(par.parameters()), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(par.step(x=X, y=X).item())
        optimizer.step()
    par.close()
    dropped = autopar.parallelize(Dropped(), {"x": X}, tp=2, microbatches=2, seed=3, **SPLIT)
    outputs = dropped._ranks().worker.forward({"x": X})  # type: ignore[attr-defined]
    whole = [
        tensor.detach().clone()
        for name, tensor in par.named_parameters()
        if "/" not in par.plan.parameter_notation[name]
    ]
    dropped.close()
    return outputs, whole, losses


@pytest.mark.filterwarnings("ignore:.*stays whole")
def test_processes_draw_what_threads_draw() -> None:
    ranks = autopar.launch(job, 2)
    par = autopar.parallelize(Dropped(), {"x": X}, tp=2, microbatches=2, seed=3, **SPLIT)
    threads = pieces(par, {"x": X})
    par.close()
    for (outputs, _, _), expected in zip(ranks, threads, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(outputs[name] != 0, tensor != 0), name
    assert ranks[0][2] == ranks[1][2]
    assert len(ranks[0][1]) > 0 and all(torch.equal(a, b) for a, b in zip(ranks[0][1], ranks[1][1], strict=True))

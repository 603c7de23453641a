"""Batches that are not the example's: other rows, other lengths, other arguments. The right number each time, or one clear error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch, tiny_llama
from test_equality import assert_equal_to
from torch import Tensor, nn

import autopar
from costmodel.errors import BadArgument, RankFailed


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=2)


class Recurrent(nn.Module):
    """An LSTM language model: its length is fixed when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lstm, self.head = nn.Embedding(50, 16), nn.LSTM(16, 16, 2, batch_first=True), nn.Linear(16, 50)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.lstm(self.embed(x))[0]).transpose(1, 2), y)


def sequences(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 50, (rows, tokens), generator=generator) for name in "xy"}


def step_both(par: autopar.ParallelModel, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """One step of both: the loss and every gradient are equal."""
    par.zero_grad()
    model.zero_grad()
    loss = par.step(**batch)
    output = model(**batch)
    expected = output if isinstance(output, Tensor) else output[0]
    expected.backward()
    assert_equal_to(model, par, loss, expected)


@pytest.mark.parametrize("mesh", [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 2), (2, 1))), (2, 2)])
def test_other_rows_and_lengths(mesh: tuple[int, int]) -> None:
    """More rows, rows that the microbatches do not divide, fewer than microbatches, one; longer, shorter, a single token."""
    model = gpt()
    par = autopar.parallelize(model, gpt_batch(8, 16), tp=mesh[0], pp=mesh[1], microbatches=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows, tokens in ((8, 16), (12, 16), (10, 16), (5, 9), (8, 1), (4, 32), (3, 16), (1, 7), (3, 5), (8, 16)):
            step_both(par, model, gpt_batch(rows, tokens, seed=rows))
    notices = [str(warning.message) for warning in said if "autopar" in str(warning.message)]
    assert notices == [
        "autopar: a batch of 3 rows: 3 microbatches instead of 4", "autopar: a batch of 1 rows: 1 microbatches instead of 4",
    ]  # fmt: skip
    par.close()


@pytest.mark.parametrize("mesh", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 2)])
def test_a_length_that_is_fixed_is_rebuilt_with_one_line(mesh: tuple[int, int]) -> None:
    model = Recurrent()
    par = autopar.parallelize(model, sequences(4, 6), tp=mesh[0], pp=mesh[1], microbatches=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows, tokens in ((4, 6), (4, 9), (6, 6), (5, 9), (1, 9), (4, 6)):
            step_both(par, model, sequences(rows, tokens, seed=rows))
    notices = [str(warning.message) for warning in said if "autopar:" in str(warning.message)]
    starts = ("autopar: programs rebuilt for another form of the call", "autopar: a batch of 1 rows")
    assert len(notices) == 2 and all(notice.startswith(start) for notice, start in zip(notices, starts, strict=True))
    assert all("\n" not in notice for notice in notices)
    par.close()


@pytest.mark.filterwarnings("ignore:autopar")
def test_training_goes_on_across_shapes() -> None:
    """One optimizer, parameters that all forms share: the same training as of the untouched model."""
    for model, make in (
        (gpt(), lambda rows, tokens, seed: gpt_batch(rows, tokens, seed=seed)),
        (Recurrent(), sequences),
    ):
        par = autopar.parallelize(model, make(4, 6, 0), tp=2, pp=2, microbatches=2)
        ours = torch.optim.AdamW(list(par.parameters()), lr=3e-3)
        theirs = torch.optim.AdamW(model.parameters(), lr=3e-3)
        shapes = ((4, 6), (4, 9), (1, 6), (3, 9), (1, 9), (4, 6))
        for seed, (rows, tokens) in enumerate(shapes):
            batch = make(rows, tokens, seed)
            ours.zero_grad()
            theirs.zero_grad()
            output = model(**batch)
            expected = output if isinstance(output, Tensor) else output[0]
            expected.backward()
            assert par.step(**batch).item() == pytest.approx(expected.item(), abs=2e-4)
            ours.step()
            theirs.step()
        par.close()


@pytest.mark.filterwarnings("ignore:autopar")
@pytest.mark.parametrize("mesh", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 2)])
def test_forward_with_and_without_targets(mesh: tuple[int, int]) -> None:
    model, batch = gpt(), gpt_batch(6, 12)
    par = autopar.parallelize(model, gpt_batch(8, 16), tp=mesh[0], pp=mesh[1], microbatches=4)
    loss, logits = par(**batch)
    expected_loss, expected = model(**batch)
    torch.testing.assert_close(logits, expected)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for rows, tokens in ((6, 12), (1, 5), (3, 12)):
        ids = gpt_batch(rows, tokens)["idx"]
        torch.testing.assert_close(par(idx=ids), model(ids))
        torch.testing.assert_close(par.eval()(ids), model(ids))
        par.train()
    step_both(par, model, batch)
    par.close()


def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"idx": zeros(8, 16, dtype=torch.float32), "targets": zeros(8, 16)}, "idx is torch.float32"),
    "rank": ({"idx": zeros(8, 16, 2), "targets": zeros(8, 16)}, r"idx is torch.int64 \(8, 16, 2\)"),
    "rows that differ": ({"idx": zeros(8, 16), "targets": zeros(6, 16)}, "dim 0 of targets is 6; 8"),
    "lengths that differ": ({"idx": zeros(8, 16), "targets": zeros(8, 9)}, "dim 1 of targets is 9; 16"),
    "no rows": ({"idx": zeros(0, 16), "targets": zeros(0, 16)}, ""),
    "a missing argument": ({"targets": zeros(8, 16)}, "idx"),
    "no loss": ({"idx": zeros(8, 16)}, "targets is missing|returns no loss"),
    "an unknown argument": ({**gpt_batch(8, 16), "mask": torch.ones(8, 16)}, "mask"),
    "a number for a tensor": ({**gpt_batch(8, 16), "idx": 3}, "idx"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:autopar")
@pytest.mark.parametrize("mesh", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 2)])
def test_wrong_batches_are_refused_and_lose_nothing(mesh: tuple[int, int]) -> None:
    model = gpt()
    par = autopar.parallelize(model, gpt_batch(8, 16), tp=mesh[0], pp=mesh[1], microbatches=4)
    step_both(par, model, gpt_batch(8, 16))
    for name, (batch, says) in WRONG.items():
        before = {
            key: parameter.grad.clone() for key, parameter in par.named_parameters() if parameter.grad is not None
        }
        with pytest.raises(BadArgument, match=says) as error:
            par.step(**batch)
        assert len(str(error.value).splitlines()) <= 4, f"{name}: {error.value}"
        assert all(
            torch.equal(parameter.grad, before[key]) for key, parameter in par.named_parameters() if key in before
        ), name
        loss = par.step(**gpt_batch(8, 16))
        assert loss.item() == pytest.approx(model(**gpt_batch(8, 16))[0].item(), rel=1e-6), name
        step_both(par, model, gpt_batch(8, 16))
    par.close()


@pytest.mark.filterwarnings("ignore:autopar")
def test_flags_and_other_arguments_are_part_of_the_form() -> None:
    """A Hugging Face model called with a mask that the example did not have, and back."""
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.randint(0, 64, (4, 8))
    batch = {"input_ids": ids, "labels": ids}
    masked = {**batch, "attention_mask": torch.ones(4, 8, dtype=torch.long).triu(-5)}
    par = autopar.parallelize(model, batch, tp=2, microbatches=2)
    for given in (batch, masked, batch, masked):
        assert par.step(**given).item() == pytest.approx(model(**given).loss.item(), rel=1e-6)
    par.close()


@pytest.mark.parametrize("placements", [{}, {"wte.weight": 0, "head.weight": 0}])
def test_an_index_out_of_range_fails_on_a_rank_and_the_next_step_works(placements: dict[str, int]) -> None:
    """As in the untouched model, and just so where the table or the classes are split."""
    torch.manual_seed(0)
    model, good = GPT(tied=False), gpt_batch(8, 16)
    par = autopar.parallelize(model, good, tp=2, pp=2, microbatches=2, overrides={"placements": placements})
    for name in ("idx", "targets"):
        with pytest.raises(RankFailed, match=r"(?s)Forward\(\d\).*out of (range|bounds)"):
            par.step(**{**good, name: good[name] + 64})
        step_both(par, model, good)
    with pytest.raises(RankFailed, match="out of range"):
        par.step(**gpt_batch(8, 64))  # longer than the position table
    step_both(par, model, good)
    par.close()


# ---- processes ----------------------------------------------------------------------------------------------------------


def job(kind: str) -> list[float | str]:
    """One rank: losses over shapes, and what was refused."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made: list[float | str] = []
    model, make = (gpt(), gpt_batch) if kind == "gpt" else (Recurrent(), sequences)
    par = autopar.parallelize(model, make(4, 6), tp=2, pp=2, microbatches=2)
    for rows, tokens in ((4, 6), (4, 9), (3, 6), (1, 9)):
        made.append(par.step(**make(rows, tokens)).item())
        try:
            par.step(**{name: tensor.float() for name, tensor in make(4, 6).items()})
        except BadArgument as error:
            made.append(str(error).splitlines()[0])
    par.close()
    return made


@pytest.mark.parametrize("kind", ["gpt", "recurrent"])
def test_processes(kind: str) -> None:
    model, make = (gpt(), gpt_batch) if kind == "gpt" else (Recurrent(), sequences)
    outputs = [model(**make(rows, tokens)) for rows, tokens in ((4, 6), (4, 9), (3, 6), (1, 9))]
    expected = [(output if isinstance(output, Tensor) else output[0]).item() for output in outputs]
    ranks = autopar.launch(job, 4, kind)
    for made in ranks:
        assert made == ranks[0]
        assert [loss for loss in made if isinstance(loss, float)] == pytest.approx(expected, rel=1e-6)
        assert sum(isinstance(loss, str) and "float32" in loss for loss in made) == 4

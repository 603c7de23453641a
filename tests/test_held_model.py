"""The user's model once its ranks are made: deleted, it leaves what no rank holds and no more; calls of another form still work."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import model_loss
from torch import Tensor, nn

import autopar


class Net(nn.Module):
    """A tied weight, a buffer that is read, one that is updated, a parameter that is not used, a size that is baked in, a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.kept = torch.arange(6.0)  # no buffer
        self.register_buffer("place", torch.randn(6, 8))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(idx) + self.place[: idx.shape[1]] + self.kept[: idx.shape[1], None].to(self.place.dtype)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        if idx.shape[1] == 6:
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.recurrent(x)[0]
        return F.cross_entropy(self.head(x).view(-1, 16), targets.view(-1))


def batch_of(tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {name: torch.randint(0, 16, (4, tokens), generator=generator) for name in ("idx", "targets")}


LAYOUTS: list[dict[str, Any]] = [
    {}, {"tp": 2}, {"pp": 2, "microbatches": 2}, {"dp": 2, "zero": 3}, {"precision": "bf16-mixed"}, {"precision": "bf16"}
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_deleted_model_leaves_what_no_rank_holds(layout: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    par = autopar.parallelize(model, batch_of(), **layout)
    first = par.step(**batch_of())
    storages = {name: weakref.ref(p.untyped_storage()) for name, p in model.named_parameters()}
    here = weakref.ref(model)
    del model
    gc.collect()
    assert here() is None
    assert [name for name, storage in storages.items() if storage() is not None] == ["unused"]
    whole = par.full_state_dict()
    assert list(whole) == list(reference.state_dict()) and not any(tensor.is_meta for tensor in whole.values())
    assert torch.equal(whole["unused"].float(), reference.state_dict()["unused"])
    if layout in ({}, {"tp": 2}):  # the others take statistics of a part of the batch
        torch.testing.assert_close(first, model_loss(reference, batch_of()), rtol=1e-6, atol=1e-6)
    par.eval()
    reference.eval()
    reference.load_state_dict(whole)
    with torch.no_grad():
        expected, found = model_loss(reference, batch_of()), par(**batch_of())
    assert abs(found - expected) < (0.05 if "precision" in layout else 1e-5)
    par.close()


def test_a_call_of_another_form_is_traced_without_the_model() -> None:
    torch.manual_seed(0)
    reference = Net()
    par = autopar.parallelize(copy.deepcopy(reference), batch_of())
    par.step(**batch_of())
    model_loss(reference, batch_of()).backward()
    with pytest.warns(UserWarning, match="another form of the call"):
        loss = par.step(**batch_of(4))
    expected = model_loss(reference, batch_of(4))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    for name, parameter in par.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-5, atol=1e-6)
    par.close()


def test_a_deleted_model_that_had_values_is_not_initialized() -> None:
    torch.manual_seed(0)
    reference = Net()
    par = autopar.parallelize(copy.deepcopy(reference), batch_of())
    par.initialize(1)
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in par.full_state_dict().items())
    par.close()


def test_a_model_that_cannot_be_copied_is_kept() -> None:
    torch.manual_seed(0)
    model = Net()
    model.lock = threading.Lock()  # type: ignore[assignment]
    par = autopar.parallelize(model, batch_of())
    par.step(**batch_of())
    del model
    gc.collect()
    whole = par.full_state_dict()
    assert not any(tensor.is_meta for tensor in whole.values())
    par.close()


def test_a_model_that_is_kept_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = Net()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    par = autopar.parallelize(model, batch_of(), dp=2)
    par.step(**batch_of())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    model.load_state_dict(par.full_state_dict())
    par.close()

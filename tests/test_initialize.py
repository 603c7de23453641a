"""Deferred initialisation: a model on meta gets, shard by shard, the values that the whole model gets with the same seed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import causal_batch, tiny_gpt2, tiny_llama
from reference import wide
from torch import Tensor, nn

import autopar
from autopar.initialize import initialized
from costmodel.errors import WeightsMissing

SEED = 11


class Plain(nn.Module):
    """Layers of torch with their own reset_parameters, built in the order in which they are registered; a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(32, 16, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)) for _ in range(4))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        x = self.norm(x).flatten(0, 1)
        return F.cross_entropy(self.head(x), targets.view(-1))


def plain_batch() -> dict[str, Tensor]:
    return {"idx": torch.arange(32).view(8, 4), "targets": torch.arange(32).view(8, 4)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "plain": (Plain, plain_batch),
    "gpt2": (tiny_gpt2, causal_batch),
    "llama": (tiny_llama, causal_batch),
}


def whole(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with values, each module initialised in place after its children."""
    model = make()
    torch.manual_seed(SEED)
    if hasattr(model, "initialize_weights"):
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
    else:
        model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    return model


LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2, "pp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}]
QUICK = [("gpt2", LAYOUTS[1]), ("llama", LAYOUTS[3])]


@pytest.mark.parametrize(
    ("name", "layout"),
    wide([(name, layout) for name in MODELS for layout in LAYOUTS], lambda *case: case[0] == "plain" or case in QUICK),
    ids=str,
)
def test_values_are_those_of_the_whole_model(name: str, layout: dict[str, int]) -> None:
    make, batch = MODELS[name]
    expected = whole(make)
    with torch.device("meta"):
        model = make()
    par = autopar.parallelize(model, batch(), **layout, device="cpu")
    before = torch.random.get_rng_state()
    par.initialize(SEED)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(tensor.is_meta for tensor in model.parameters()), "the user's model is left as it is"
    found = par.full_state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found[key], tensor), key
    loss = expected.train()(**batch())
    loss = loss if isinstance(loss, Tensor) else loss.loss
    torch.testing.assert_close(par.step(**batch()), loss.detach(), rtol=1e-5, atol=1e-6)
    par.close()


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)), nn.LSTM(8, 4))


def test_values_are_those_of_building_the_model_with_the_seed() -> None:
    with torch.device("meta"):
        model = layers()
    found = {name: value.clone() for name, value in initialized(model, SEED)}
    torch.manual_seed(SEED)
    expected = layers().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Without(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.scale).square().mean()


class Reading(nn.Module):
    """Its function builds on what its layer's has set."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.linear.weight[0].fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def test_a_function_that_reads_what_another_has_set_is_named() -> None:
    with torch.device("meta"):
        model = Reading()
    par = autopar.parallelize(model, {"x": torch.ones(4, 4)}, device="cpu")
    with pytest.raises(WeightsMissing, match=r"(?s)linear.weight.*Reading"):
        par.initialize(SEED)


def test_parameters_that_no_function_sets_are_named() -> None:
    with torch.device("meta"):
        model = Without()
    par = autopar.parallelize(model, {"x": torch.ones(4, 4)}, device="cpu")
    with pytest.raises(WeightsMissing, match=r"(?s)scale first.*Without.*reset_parameters"):
        par.initialize(SEED)


def matrices_alive() -> int:
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.shape == (64, 64)]
    return len({each.untyped_storage()._cdata for each in found if not each.is_meta})


def test_one_modules_tensors_are_held_at_a_time() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    before, alive = matrices_alive(), []
    for _, value in initialized(model, SEED):
        del value
        alive.append(matrices_alive() - before)
    assert len(alive) == 32 and max(alive) <= 1
    kept = [value for _, value in initialized(model, SEED)]
    assert matrices_alive() - before == len(kept) / 2, "what the count is worth"

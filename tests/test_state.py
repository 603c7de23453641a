"""The state of a parallel model: whole tensors, DTensors for checkpoints, and values for a model without any."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import GPT, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from reference import differing, wide
from torch import Tensor, nn

import autopar
from costmodel.errors import DifferentModel, WeightsMissing

MODELS: dict[str, tuple[Any, Any, str]] = {
    "gpt": (GPT, gpt_batch, "idx"),
    "hf-gpt2": (tiny_gpt2, causal_batch, "input_ids"),
    "hf-llama": (tiny_llama, causal_batch, "input_ids"),
}


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().eval()


def logits_of(model: nn.Module, name: str, batch: Any) -> Tensor:
    _, _, key = MODELS[name]
    with torch.no_grad():
        output = model(**{key: batch[key]})
    return output if isinstance(output, Tensor) else output.logits


def updated(par: autopar.ParallelModel, batch: Any) -> None:
    par.step(**batch)
    torch.optim.SGD(list(par.parameters()), lr=0.5).step()


EACH = [(name, mesh) for name in MODELS for mesh in ((1, 1), (4, 1), (2, 2))]


@pytest.mark.parametrize(("name", "mesh"), wide(EACH, lambda name, mesh: name == "gpt" or (name, mesh) == ("hf-gpt2", (2, 2))))
def test_whole_tensors_load_into_the_untouched_model_and_give_the_same_logits(name: str, mesh: tuple[int, int]) -> None:
    model, batch = built(name), MODELS[name][1]()
    par = autopar.parallelize(model, batch, tp=mesh[0], pp=mesh[1])
    assert differing(par.full_state_dict(), model.state_dict()) == [], "split and put together: not a bit changes"
    updated(par, batch)
    whole = par.full_state_dict()
    assert list(whole) == list(model.state_dict())
    fresh = built(name, seed=1)
    fresh.load_state_dict(whole, strict=True)
    output = par.eval()(**batch)
    logits = output[1] if isinstance(output, tuple) else output.logits
    torch.testing.assert_close(logits, logits_of(fresh, name, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, logits_of(model, name, batch), rtol=1e-3, atol=1e-3), "it was trained"
    par.close()


@pytest.mark.parametrize("alias", ["wte.weight", "head.weight"])
def test_values_of_whole_tensors_are_taken_and_tied_ones_under_any_of_their_names(alias: str) -> None:
    model, other, batch = built("gpt"), built("gpt", seed=1), gpt_batch()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    state = {name: tensor for name, tensor in other.state_dict().items() if name not in ("wte.weight", "head.weight")}
    par.load_state_dict({**state, alias: other.state_dict()[alias]})
    assert differing(par.full_state_dict(), other.state_dict()) == []
    torch.testing.assert_close(par.step(**batch), other(**batch)[0], rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(list(par.parameters()), lr=0.1)
    optimizer.step()  # values go into the parameters that an optimizer may hold already
    par.load_state_dict(other.state_dict())
    torch.testing.assert_close(par.step(**batch), other(**batch)[0], rtol=1e-6, atol=1e-6)
    par.close()


def test_a_state_dict_has_the_names_of_the_models_own() -> None:
    """Buffers that are not persistent, such as rotary frequencies, are in neither."""
    model, batch = built("hf-llama"), causal_batch()
    par = autopar.parallelize(model, batch, tp=2)
    found = par.state_dict()
    assert set(found) == set(model.state_dict())
    built("hf-llama", seed=1).load_state_dict(found, strict=True)
    par.close()


def test_a_plain_process_gives_whole_tensors_in_its_state_dict_too() -> None:
    model = built("gpt")
    par = autopar.parallelize(model, gpt_batch(), tp=2, pp=2)
    assert differing(par.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("norm.weight"), r"missing: norm\.weight"),
        (lambda state: state.update({"h.7.up.weight": torch.zeros(1)}), r"unknown: h\.7\.up\.weight"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(31)}),
            r"norm\.weight is \(31,\); the model's is \(32,\)",
        ),
    ],
)
def test_a_state_dict_of_another_model_changes_nothing(change: Any, says: str) -> None:
    model, other = built("gpt"), built("gpt", seed=1)
    par = autopar.parallelize(model, gpt_batch(), tp=2, pp=2)
    state = dict(other.state_dict())
    change(state)
    with pytest.raises(DifferentModel, match=says):
        par.load_state_dict(state)
    assert differing(par.full_state_dict(), model.state_dict()) == []


def test_a_state_dict_without_a_persistent_buffer_is_refused() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)).square().mean()

    model = Normed()
    par = autopar.parallelize(model, {"x": torch.randn(4, 8)}, tp=2)
    state = {name: value + 1 for name, value in model.state_dict().items() if name != "norm.running_mean"}
    with pytest.raises(DifferentModel, match=r"missing: norm\.running_mean"):
        par.load_state_dict(state)
    assert differing(par.full_state_dict(), model.state_dict()) == []
    par.load_state_dict({**state, "norm.running_mean": torch.ones(8)})
    par.close()


@pytest.mark.parametrize("name", ["gpt", "hf-llama"])
def test_a_model_without_values_gets_them_and_trains(name: str) -> None:
    real, batch = built(name), MODELS[name][1]()
    with torch.device("meta"):
        empty = MODELS[name][0]().eval()
    par = autopar.parallelize(empty, batch, tp=2, pp=2)
    with pytest.raises(WeightsMissing, match="have no values") as caught:
        par.step(**batch)
    assert "par.load_state_dict(...)" in str(caught.value)
    par.load_state_dict({**real.state_dict(), **dict(real.named_buffers())})
    loss = par.step(**batch)
    output = real(**batch)
    torch.testing.assert_close(loss, output[0] if isinstance(output, tuple) else output.loss, rtol=1e-6, atol=1e-6)
    assert differing(par.full_state_dict(), real.state_dict()) == []
    assert all(parameter.is_meta for parameter in empty.parameters())
    par.close()


# ---- processes -----------------------------------------------------------------------------------------------


class Checkpoint(dict[str, Any]):
    """What a rank of `job` reports."""


def job(folder: str) -> Checkpoint:
    """Train a step on tp=2 x pp=2, write a checkpoint, and read it into models split in other ways."""
    from torch.distributed.tensor import DTensor

    batch = gpt_batch()
    par = autopar.parallelize(built("gpt"), batch, tp=2, pp=2)
    updated(par, batch)
    report = Checkpoint(whole=par.full_state_dict(), names=[name for name, _ in par.named_parameters()])
    state = par.state_dict()
    report["types"] = {name: type(value) is DTensor for name, value in state.items()}
    report["shapes"] = {name: tuple(value.shape) for name, value in state.items()}
    report["placements"] = {name: str(value.placements) for name, value in state.items()}
    report["values"] = {name: value.full_tensor() for name, value in state.items()}
    dcp.save(state, checkpoint_id=folder)
    for tp, pp in ((4, 1), (1, 4)):
        other = autopar.parallelize(built("gpt", seed=1), batch, tp=tp, pp=pp)
        found = other.state_dict()
        dcp.load(found, checkpoint_id=folder)
        other.load_state_dict(found)
        report[f"tp={tp} pp={pp}"] = other.full_state_dict()
        other.close()
    with torch.device("meta"):
        empty = GPT().eval()
    third = autopar.parallelize(empty, batch, tp=2, pp=2)
    third.load_state_dict(built("gpt", seed=1).state_dict())
    report["loss of loaded"] = third.step(**batch)
    third.close()
    output = par.eval()(**batch)
    report["logits"] = None if output is None else output[1]
    par.close()
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoint")
    found = autopar.launch(job, 4, str(folder))
    assert (Path(folder) / ".metadata").exists()
    return found


def test_processes_whole_tensors_are_on_rank_0_and_the_logits_on_the_last_stage(reports: list[Checkpoint]) -> None:
    fresh, batch = built("gpt", seed=1), gpt_batch()
    fresh.load_state_dict(reports[0]["whole"], strict=True)
    assert all(report["whole"] == {} for report in reports[1:])
    assert [report["logits"] is None for report in reports] == [True, True, False, False]
    expected = logits_of(fresh, "gpt", batch)
    for report in reports[2:]:
        torch.testing.assert_close(report["logits"], expected, rtol=1e-5, atol=1e-5)


def test_processes_parameters_have_the_users_names(reports: list[Checkpoint]) -> None:
    names = dict(GPT().named_parameters())
    assert reports[0]["names"] == reports[1]["names"] and reports[2]["names"] == reports[3]["names"]
    assert {*reports[0]["names"], *reports[2]["names"]} == set(names)
    assert "wte.weight" in reports[0]["names"] and "wte.weight" in reports[2]["names"], "tied: on both stages"


def test_a_state_dict_holds_dtensors_under_the_users_names(reports: list[Checkpoint]) -> None:
    whole = reports[0]["whole"]
    for report in reports:
        assert all(report["types"].values())
        assert report["shapes"] == {name: tuple(whole[name].shape) for name in report["shapes"]}
        assert differing(report["values"], {name: whole[name] for name in report["values"]}) == []
    assert {*reports[0]["values"], *reports[2]["values"]} == set(whole), "tied ones under every name"
    placements = reports[0]["placements"] | reports[2]["placements"]
    assert placements["h.0.attn.qkv.weight"] == "(Shard(dim=0),)" and placements["norm.weight"] == "(Replicate(),)"


@pytest.mark.parametrize("mesh", ["tp=4 pp=1", "tp=1 pp=4"])
def test_a_distributed_checkpoint_can_be_read_by_any_mesh(reports: list[Checkpoint], mesh: str) -> None:
    assert differing(reports[0][mesh], reports[0]["whole"]) == []


def test_processes_fill_a_model_without_values(reports: list[Checkpoint]) -> None:
    expected = built("gpt", seed=1)(**gpt_batch())[0]
    for report in reports:
        torch.testing.assert_close(report["loss of loaded"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_can_be_read_without_autopar(
    reports: list[Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(tmp_path_factory.getbasetemp().glob("checkpoint*"))
    state = copy.deepcopy(built("gpt", seed=1).state_dict())
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    assert differing(state, reports[0]["whole"]) == []

"""What an optimizer's step is preceded by: gradient norms and clipping, loss scaling, several steps for one update."""

from __future__ import annotations

import copy
import math
import sys
import time
from typing import Any

import pytest
import torch
from models import GPT
from reference import microbatches_of
from torch import Tensor, nn

import autopar
from autopar.errors import BadArgument, NonFinite

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def made() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = GPT()
    return model, {"idx": torch.randint(64, (8, 32)), "targets": torch.randint(64, (8, 32))}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output[0] if isinstance(output, tuple) else output


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), MESHES)
def test_norms_of_every_order_are_the_whole_models(tp: int, pp: int) -> None:
    """The weight of embedding and head is tied on two stages; norms are whole on all ranks of tp."""
    model, batch = made()
    par = autopar.parallelize(model, batch, tp=tp, pp=pp)
    par.step(**batch)
    loss_of(model, batch).backward()
    for norm_type in (1, 2, 3.5, math.inf):
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type)
        torch.testing.assert_close(par.clip_grad_norm_(math.inf, norm_type), expected, rtol=1e-5, atol=0.0)
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=math.inf)
    torch.testing.assert_close(par.clip_grad_norm_(0.01, norm_type=math.inf), expected, rtol=1e-5, atol=0.0)
    for key, parameter in model.named_parameters():
        found = par._ranks().whole(key, "grad")  # type: ignore[attr-defined]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-8)
    par.close()


class Regression(nn.Module):
    """Means over elements and over labels that are not ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, y: Tensor, label: Tensor) -> Tensor:
        out = self.b(torch.tanh(self.a(x)))
        return nn.functional.mse_loss(out, y) + nn.functional.cross_entropy(out, label)


@pytest.mark.parametrize("layout", [{"dp": 3}, {"pp": 2, "microbatches": 3}, {"tp": 2, "dp": 2, "zero": 1}], ids=str)
def test_a_float64_model_is_trained_in_float64(layout: dict[str, int]) -> None:
    """Parts of the loss and the norm that clips are not rounded to float32: 1e-13, where the loss is about 3."""
    torch.manual_seed(0)
    model = Regression().double()
    batch = {"x": torch.randn(7, 6).double(), "y": torch.randn(7, 5).double(), "label": torch.tensor([0, 1, -100, 2, 3, -100, 4])}
    par = autopar.parallelize(model, batch, **layout)
    loss = par.step(**batch)
    expected = model(**batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=0.0, atol=1e-13)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(par.clip_grad_norm_(0.1), norm, rtol=0.0, atol=1e-13)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(par._ranks().whole(key, "grad"), parameter.grad, rtol=0.0, atol=1e-13)  # type: ignore[attr-defined]
    par.close()


@pytest.mark.parametrize("max_norm", [None, "one", math.nan, [1.0, 2.0]], ids=str)
def test_a_largest_norm_that_is_no_number_is_refused(max_norm: Any) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch)
    par.step(**batch)
    with pytest.raises(BadArgument, match="max_norm"):
        par.clip_grad_norm_(max_norm)


@pytest.mark.parametrize("norm_type", [0, -1, math.nan, None, "two"])
def test_other_orders_are_refused(norm_type: Any) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch)
    par.step(**batch)
    with pytest.raises(BadArgument, match="norm_type"):
        par.clip_grad_norm_(1.0, norm_type=norm_type)


def spoiled(value: float) -> list[Any]:
    """On one rank of four the gradient of a weight that it alone holds is not finite: what this rank sees, and its gradients."""
    model, batch = made()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    par.step(**batch)
    rank = torch.distributed.get_rank()
    first = next(p for name, p in par.named_parameters() if name.endswith("up.weight"))
    assert first.grad is not None
    if rank == 3:
        first.grad[0, 0] = value
    seen: list[Any] = []
    before = [p.grad.clone() for p in par.parameters() if p.grad is not None]
    for norm_type in (2.0, math.inf):
        try:
            par.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
        except NonFinite as error:
            seen.append(str(error))
    after = [p.grad for p in par.parameters() if p.grad is not None]
    seen.append(all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)))
    seen.append([par.clip_grad_norm_(1.0, norm_type).item() for norm_type in (math.inf, 2.0)])
    seen.append(any(bool(p.grad.isfinite().all()) for p in par.parameters() if p.grad is not None))
    par.close()
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_on_one_rank_is_seen_by_all(value: float) -> None:
    reports = autopar.launch(spoiled, 4, value)
    for two, largest, unchanged, norms, finite in reports:
        assert str(value) in two and str(value) in largest and "rank" in two
        assert unchanged
        # the first clipping has made all others NaN or 0, as torch's does; 0 times infinity is NaN
        assert not math.isfinite(norms[0]) and math.isnan(norms[1])
        assert not finite or value == math.inf


# ---- loss scaling ----------------------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Gradients that grow on their way to the first layer: with a large scale they overflow in fp16 there, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x) * 300.0
        return (torch.tanh(self.second(x) * 0.01).float() - y).square().sum()


def trained(
    split: Any, model: nn.Module, batch: dict[str, Tensor], steps: int, replicas: int = 1
) -> tuple[list[float], list[float]]:
    """Losses and scales, of a ParallelModel or (None) of the model by torch.autocast and GradScaler. A sum in fp16 of all rows may overflow
    where those of `replicas` parts do not, so the model goes through them one by one; their losses add up."""
    parameters = model.parameters() if split is None else split.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    losses, scales = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        if split is None:
            loss = torch.zeros(())
            for part in microbatches_of(batch, replicas):
                with torch.autocast("cpu", dtype=torch.float16):
                    summand = loss_of(model, part)
                scaler.scale(summand).backward()
                loss += summand.detach()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        else:
            loss = split.step(**batch)
            assert len({parameter.grad is None for parameter in split.parameters()}) == 1
            optimizer.step()
            scales.append(split.loss_scale)
        losses.append(loss.item())
    return losses, scales


@pytest.mark.parametrize(("tp", "pp"), MESHES)
def test_overflows_are_skipped_by_all_ranks_as_a_grad_scaler_skips_them(tp: int, pp: int) -> None:
    torch.manual_seed(0)
    model, batch = Steep(), {"x": torch.randn(8, 16), "y": torch.randn(8, 16)}
    par = autopar.parallelize(model, batch, tp=tp, pp=pp, microbatches=1, precision="fp16-mixed")
    losses, scales = trained(par, model, batch, 12)
    expected = trained(None, copy.deepcopy(model), batch, 12)
    assert scales == expected[1]
    assert scales[0] == 2.0**15 and scales[-1] == scales[-2] < 2.0**15, "the first step overflows, the last do not"
    # fp16 rounds to 5e-4 of a value; the split sums in another order
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=0.0)
    whole = par.full_state_dict()
    assert not torch.equal(whole["first.weight"], model.state_dict()["first.weight"])
    par.close()


def test_gradients_are_unscaled_and_added_to_those_there() -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch, precision="fp16-mixed")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model, batch)
    (loss * 2.0**16).backward()
    for times in (1, 2):
        assert torch.equal(par.step(**batch, accumulate=times == 1), loss)
        for name, parameter in par.named_parameters():
            expected = model.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(parameter.grad, expected * (times * 2.0**-16), rtol=1e-6, atol=0.0)


def test_an_overflow_in_any_step_of_an_update_is_one_of_the_update() -> None:
    torch.manual_seed(0)
    model, batch = Steep(), {"x": torch.randn(8, 16), "y": torch.randn(8, 16)}
    small = {"x": batch["x"], "y": torch.tanh(model.second(model.first(batch["x"]) * 300.0) * 0.01).detach()}
    par = autopar.parallelize(model, batch, precision="fp16-mixed")
    par.step(**small)
    assert all(parameter.grad is not None for parameter in par.parameters()) and par.loss_scale == 2.0**16
    par.zero_grad()
    par.step(**batch, accumulate=True)
    assert par.loss_scale == 2.0**16, "one update has one scale"
    par.step(**small)
    assert all(parameter.grad is None for parameter in par.parameters()) and par.loss_scale == 2.0**15


def test_other_precisions_have_no_scale() -> None:
    model, batch = made()
    assert autopar.parallelize(model, batch, precision="bf16-mixed").loss_scale is None


# ---- several steps for one update --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), MESHES)
def test_accumulated_steps_are_one_step_of_the_sum_of_their_losses(tp: int, pp: int) -> None:
    model, batch = made()
    batches = [{name: tensor[start : start + 4] for name, tensor in batch.items()} for start in (0, 4)]
    par = autopar.parallelize(model, batches[0], tp=tp, pp=pp)
    optimizer, own = torch.optim.SGD(par.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for part in batches:
            expected = loss_of(model, part)
            expected.backward()
            torch.testing.assert_close(par.step(**part, accumulate=part is batches[0]), expected.detach(), rtol=1e-5, atol=0)
        for each in (optimizer, own):
            each.step()
            each.zero_grad()
    for name, tensor in par.full_state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    par.close()


# ---- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_come_with_every_step(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch, tp=2, pp=2)
    with pytest.raises(BadArgument, match="no metrics yet"):
        _ = par.metrics
    par.report(tensorboard=str(tmp_path))
    for number in (1, 2):
        loss = par.step(**batch)
        assert par.metrics.step == number and par.metrics.loss is loss and par.metrics.grad_norm is None
        norm = par.clip_grad_norm_(1.0)
        assert par.metrics.grad_norm is norm and par.metrics.loss is loss
        par.zero_grad()
    found = par.metrics
    assert found.tokens == 8 * 32 and 0 < found.step_seconds < 60 and found.loss_scale is None
    assert found.tokens_per_second == 256 / found.step_seconds
    assert found.bubble_fraction == par.plan.predicted.bubble_fraction and found.memory_bytes > 2**20
    planned = par.plan.predicted
    assert found.mfu == pytest.approx(planned.mfu * planned.step_seconds / found.step_seconds)
    half = {name: tensor[:4] for name, tensor in batch.items()}
    par.step(**half)
    assert par.metrics.tokens == 4 * 32
    assert par.metrics.mfu == pytest.approx(planned.mfu * planned.step_seconds / par.metrics.step_seconds / 2)
    par.close()
    written, shown = capsys.readouterr()
    assert written == shown == "", "quiet in a pipe"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("train/grad_norm")[1].value == pytest.approx(norm.item(), rel=1e-6)


def test_evaluation_is_no_part_of_a_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch)
    par.step(**batch)
    ranks = par._ranks()
    forward = ranks.forward
    monkeypatch.setattr(ranks, "forward", lambda given: time.sleep(0.5) or forward(given))
    start = time.perf_counter()
    par(**batch)
    par.step(**batch)
    assert par.metrics.step_seconds < time.perf_counter() - start - 0.5 + 1e-3


def test_a_terminal_gets_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    par.report()
    par.step(**batch)
    par.clip_grad_norm_(1.0)
    par.close()
    shown = capsys.readouterr().err
    assert shown.startswith("\r\x1b[2Kstep 1: loss ") and shown.endswith("\n")
    assert "grad norm" in shown and "tokens/s" in shown and "GiB" in shown and "bubble" in shown


def test_tensorboard_that_is_not_installed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadArgument, match=r"autopar\[tensorboard\]"):
        par.report(tensorboard=str(tmp_path))


# ---- beside data parallelism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_norms_and_overflows_are_alike_on_all_replicas(zero: int) -> None:
    model, batch = made()
    par = autopar.parallelize(model, batch, tp=2, dp=2, zero=zero)
    par.step(**batch)
    loss_of(model, batch).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for norm_type in (2, math.inf):
        expected = torch.nn.utils.get_total_norm(gradients, norm_type)
        torch.testing.assert_close(par.clip_grad_norm_(math.inf, norm_type), expected, rtol=1e-5, atol=0.0)
    par.close()
    torch.manual_seed(0)
    steep, points = Steep(), {"x": torch.randn(8, 16), "y": torch.randn(8, 16)}
    par = autopar.parallelize(steep, points, dp=2, pp=2, microbatches=1, zero=zero, precision="fp16-mixed")
    losses, scales = trained(par, steep, points, 8)
    expected_losses, expected_scales = trained(None, copy.deepcopy(steep), points, 8, replicas=2)
    assert scales == expected_scales and scales[0] == 2.0**15
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=0.0)  # fp16: 5e-4 of a value
    par.close()

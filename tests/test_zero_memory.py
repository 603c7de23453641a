"""Memory of data-parallel ranks: what the plan predicts beside what a step allocates, and the formula of the ZeRO paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import wide
from test_memory import measured_peaks
from torch import Tensor, nn

import autopar
from costmodel.memory import state_bytes


def heavy() -> tuple[nn.Module, dict[str, Tensor]]:
    """Parameters outweigh activations."""
    torch.manual_seed(0)
    return GPT(vocab=256, dim=128, heads=4, layers=6, flash=False), gpt_batch(rows=8, tokens=16, vocab=256)


PEAKS = [
    *((options, zero) for options in ({"microbatches": 1}, {"microbatches": 2}) for zero in range(4)),
    *(({"pp": 2, "microbatches": 2}, zero) for zero in range(4)),
    ({"pp": 2, "microbatches": 1}, 3),
]


QUICK = [({"microbatches": 1}, 3), ({"microbatches": 2}, 1), ({"pp": 2, "microbatches": 2}, 2)]


@pytest.mark.parametrize(("options", "zero"), wide(PEAKS, lambda *case: case in QUICK), ids=str)
def test_predicted_peaks_are_within_5_percent_of_measured_ones(
    options: dict[str, Any], zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = heavy()
    replica = {name: value[:4] for name, value in rows.items()}
    par = autopar.parallelize(model, replica, dp=2, zero=zero, **options)
    predicted = {par.plan.stage_ranks[stage.index]: stage.cost.peak_bytes for stage in par.plan.stages}
    measured = measured_peaks(par, rows, monkeypatch)
    for rank, num_bytes in measured.items():
        assert predicted[rank] == pytest.approx(num_bytes, rel=0.02), (rank, predicted, measured)


@pytest.mark.parametrize(("zero",), wide([(0,), (1,), (2,), (3,)], lambda zero: zero in (1, 3)))
def test_state_between_steps_is_the_textbooks(zero: int) -> None:
    """Parameters, gradients and AdamW's moments of a replica: `state_bytes` to the byte, but that stage 1 shares out gradients too."""
    model, rows = heavy()
    par = autopar.parallelize(model, rows, dp=2, zero=zero)
    optimizer = torch.optim.AdamW(par.parameters())
    par.step(**rows)
    optimizer.step()
    own = [parameter for name, parameter in par.named_parameters() if name.startswith("rank 0: ")]
    whole = par._ranks().parameters_of[0].values()  # type: ignore[attr-defined]
    held = own if zero == 3 else list(whole)
    found = (
        sum(each.numel() * 4 for each in held),
        sum(each.grad.numel() * 4 for each in {*own, *whole} if each.grad is not None),
        sum(state[name].numel() * 4 for each in own for state in (optimizer.state[each],) for name in ("exp_avg", "exp_avg_sq")),
    )
    par.close()
    sizes = [parameter.numel() for parameter in model.parameters()]
    expected = [state_bytes(numel, zero=zero, dp_size=2) for numel in sizes]
    gradients = [state_bytes(numel, zero=max(zero, 2) if zero else 0, dp_size=2).gradients for numel in sizes]
    assert found == (sum(each.parameters for each in expected), sum(gradients), sum(each.optimizer for each in expected))

"""The receive rings at work: memory is handed out for a new receive only when nobody will read what was in it.

Whatever is still read from a buffer that is given out again would be nan: every taken buffer is filled with it. A schedule
that then trains to the bits of one process has read nothing too late. The same with a ring that frees too early fails.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import differing, train, trained_alone
from torch import Tensor, nn

import autopar
from autopar.runtime.buffers import Ring
from passes.prove import in_flight
from passes.schedules import SCHEDULES

taken_by_ring = Ring.take


def filled(buffer: Tensor) -> Tensor:
    """As a transfer fills it: autograd does not see it, and cannot warn."""
    buffer.data.fill_(torch.nan if buffer.is_floating_point() else -1)
    return buffer


def poisoned(ring: Ring) -> Tensor:
    return filled(taken_by_ring(ring))


def freed_too_early(ring: Ring) -> Tensor:
    """Two buffers in turns, whoever still reads them."""
    ring._next += 1
    if len(ring._buffers) < 2:
        return taken_by_ring(ring)
    return filled(ring._buffers[ring._next % 2].detach())


class PassesOn(nn.Module):
    """Stages that hand on views of what they received, keep it for the weight gradients, and send one value to all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, h = torch.sigmoid(self.blocks[0](x)), torch.tanh(x)
        for block in list(self.blocks)[1:]:
            h = block(h).tanh() + first.view(-1, 8)
        return h.square().mean()


def trains_as_one_process(model: nn.Module, batches: list[Any], schedule: str, **options: Any) -> bool:
    par = autopar.parallelize(model, batches[0], pp=2, microbatches=6, schedule=schedule, **options)
    losses = train(lambda batch: par.step(**batch), par.parameters(), batches)
    expected, state = trained_alone(copy.deepcopy(model), batches, 6)
    same = all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    same = same and not differing(par.full_state_dict(), state)
    for rank, thread in enumerate(par._ranks()._threads._ranks):  # type: ignore[attr-defined]
        most = in_flight(par.plan.instructions[rank])
        for chunk in thread.worker._chunks:
            for rings in chunk._ring_table.kept.values():
                for ring in (*rings.received[0], *rings.gradients[0]):
                    # one more is posted ahead of the schedule; a first gradient's memory may become a parameter's
                    assert len(ring) <= most + 2, (schedule, rank)
    par.close()
    return same


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_receive_overwrites_what_is_still_read(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "take", poisoned)
    torch.manual_seed(0)
    several = SCHEDULES[schedule].default_virtual_stages > 1
    overrides = {"cuts": [f"blocks.{number}" for number in ((1, 2, 3) if several else (2,))]}
    batches: list[Any] = [{"x": torch.randn(6, 8)} for _ in range(3)]
    assert trains_as_one_process(PassesOn(), batches, schedule, overrides=overrides)
    texts: list[Any] = [gpt_batch(rows=6, tokens=4, seed=seed) for seed in range(2)]
    assert trains_as_one_process(GPT(layers=4, dim=16), texts, schedule)


def test_a_ring_that_frees_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "take", freed_too_early)
    torch.manual_seed(0)
    batches: list[Any] = [gpt_batch(rows=6, tokens=4, seed=seed) for seed in range(2)]
    assert not trains_as_one_process(GPT(layers=4, dim=16), batches, "gpipe")

"""Torch's optimizers, with groups and schedulers, on every kind of part: three updates equal the untouched model's.

Tolerance: 2e-6 of parameters up to 1 (float32 sums in another order; eps is large, so that gradients near 0 stay near 0).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from models import GPT, gpt_batch
from reference import model_loss
from torch import Tensor, nn, optim

import autopar

TOLERANCE, UPDATES, EPS = 2e-6, 3, 1e-2
Named = list[tuple[str, nn.Parameter]]
SPLIT = {"placements": {"h.*.up.weight": 0, "h.*.down.weight": 1, "h.*.attn.qkv.weight": 0, "h.*.attn.out.weight": 1}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp, tp, zero 1": {"dp": 2, "tp": 2, "zero": 1, "overrides": SPLIT},
    "dp, pp, zero 3": {"dp": 2, "pp": 2, "zero": 3, "microbatches": 2},
    "dp, tp": {"dp": 2, "tp": 2, "overrides": SPLIT},
}


def _by_name(named: Named) -> list[dict[str, Any]]:
    """Biases and norms without weight decay and with a rate of their own, as users write it."""
    plain = [parameter for name, parameter in named if "bias" in name or "norm" in name or ".ln" in name]
    others = [parameter for name, parameter in named if not ("bias" in name or "norm" in name or ".ln" in name)]
    return [{"params": plain, "weight_decay": 0.0, "lr": 2e-2}, {"params": others}]


def _plain(named: Named) -> list[nn.Parameter]:
    return [parameter for _, parameter in named]


def _of(kind: Any, parameters: Callable[[Named], Any] = _plain, **options: Any) -> Callable[[Named], optim.Optimizer]:
    return lambda named: kind(parameters(named), **options)


OPTIMIZERS: dict[str, Callable[[Named], optim.Optimizer]] = {
    "SGD": _of(optim.SGD, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": _of(optim.SGD, lr=1e-1, momentum=0.9, fused=True),
    "Adam": _of(optim.Adam, lr=1e-2, eps=EPS, amsgrad=True, weight_decay=0.1),
    "AdamW, foreach": _of(optim.AdamW, lr=1e-2, eps=EPS, foreach=True),
    "AdamW, fused": _of(optim.AdamW, lr=1e-2, eps=EPS, fused=True),
    "AdamW, groups": _of(optim.AdamW, _by_name, lr=1e-2, eps=EPS, weight_decay=0.1),
    "AdamW, names": _of(optim.AdamW, list, lr=1e-2, eps=EPS),
    "Adagrad": _of(optim.Adagrad, lr=1e-2, eps=EPS),
    "RMSprop": _of(optim.RMSprop, lr=1e-3, eps=EPS, centered=True, momentum=0.5),
    "NAdam": _of(optim.NAdam, lr=1e-2, eps=EPS),
    "RAdam": _of(optim.RAdam, lr=1e-2, eps=EPS),
    "Adadelta": _of(optim.Adadelta, lr=1e-1, eps=EPS),
    "Adamax": _of(optim.Adamax, lr=1e-2, eps=EPS),
    "ASGD": _of(optim.ASGD, lr=1e-1),
}
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "warm-up": lambda optimizer: optim.lr_scheduler.SequentialLR(
        optimizer,
        [optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 1), optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [1],
    ),
    "plateau": partial(optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0),
}


def built() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=2, dim=16, heads=4)


BATCHES = [gpt_batch(rows=4, seed=seed) for seed in range(UPDATES)]


def trained(
    step: Callable[[Any], Tensor], named: Iterable[tuple[str, nn.Parameter]], kind: str, scheduler: str = "warm-up"
) -> None:
    optimizer = OPTIMIZERS[kind]([(name.rpartition(": ")[2], p) if kind != "AdamW, names" else (name, p) for name, p in named])
    schedule = SCHEDULERS[scheduler](optimizer)
    for batch in BATCHES:
        loss = step(batch)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(*([loss.item()] if scheduler == "plateau" else []))


@pytest.fixture(scope="module", params=LAYOUTS)
def parallel(request: pytest.FixtureRequest) -> Iterator[tuple[autopar.ParallelModel, dict[str, Tensor]]]:
    """A model on several ranks, and its values before any training."""
    par = autopar.parallelize(built(), BATCHES[0], **LAYOUTS[request.param])
    yield par, par.full_state_dict()
    par.close()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_update_parts_as_they_do_the_whole(parallel: tuple[autopar.ParallelModel, dict[str, Tensor]], kind: str) -> None:
    _compare(*parallel, kind, "warm-up")


def test_a_scheduler_that_looks_at_losses(parallel: tuple[autopar.ParallelModel, dict[str, Tensor]]) -> None:
    _compare(*parallel, "SGD", "plateau")


def _compare(par: autopar.ParallelModel, start: dict[str, Tensor], kind: str, scheduler: str) -> None:
    reference = built()

    def alone(batch: Any) -> Tensor:
        loss = model_loss(reference, batch)
        loss.backward()
        return loss.detach()

    trained(alone, reference.named_parameters(), kind, scheduler)
    par.load_state_dict(copy.deepcopy(start))
    par.zero_grad()
    trained(lambda batch: par.step(**batch), par.named_parameters(), kind, scheduler)
    found, expected = par.full_state_dict(), reference.state_dict()
    assert max((expected[key] - start[key]).abs().max().item() for key in start) > 1e-3, "this optimizer does next to nothing"
    assert max((found[key] - expected[key]).abs().max().item() for key in expected) <= TOLERANCE

"""Whatever a search returns can be emitted and trained: random searches over small models of several kinds, random plans of their results.

Loss within 2e-5 (relative) and gradient norm within 1e-4 of the untouched model's on all replicas' rows together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPT, gpt_batch
from reference import model_loss
from torch import nn

import autopar
from autopar.search import search

Batch = dict[str, torch.Tensor]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(7))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, y)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)) for _ in range(5))
        self.head = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), y)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.body = nn.Transformer(24, 4, 2, 3, 48, batch_first=True, dropout=0.0)
        self.head = nn.Linear(24, 40)

    def forward(self, source: torch.Tensor, target: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.body(self.embed(source), self.embed(target))).flatten(0, 1), y.flatten())


def _conv_batch(rows: int) -> Batch:
    return {"x": torch.randn(rows, 3, 6, 6), "y": torch.randint(0, 7, (rows,))}


def _translation_batch(rows: int) -> Batch:
    return {name: torch.randint(0, 40, (rows, count)) for name, count in (("source", 9), ("target", 6), ("y", 6))}


def _vector_batch(rows: int) -> Batch:
    return {"x": torch.randn(rows, 16), "y": torch.randn(rows, 16)}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "perceptron": (Perceptron, _vector_batch),
    "conv": (ConvNet, _conv_batch),
    "gpt": (lambda: GPT(layers=5), lambda rows: gpt_batch(rows)),
    "encoder-decoder": (EncoderDecoder, _translation_batch),
}


def _trained(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """(loss, gradient norm) of one process."""
    loss = model_loss(model, batch)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.item(), torch.cat([each.flatten() for each in gradients]).norm().item()


@pytest.mark.parametrize("searches", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_random_searches_train_as_one_process(kind: str, searches: int) -> None:
    build, batch_of = KINDS[kind]
    draw = random.Random(f"{kind} {searches}")
    for _ in range(searches):
        torch.manual_seed(draw.randrange(1000))
        model, rows = build(), draw.choice((2, 4, 6))
        options: dict[str, Any] = {
            "gpus": draw.choice((1, 2, 3, 4, 6)), "hardware": draw.choice(("cpu", "a100-80gb")),
            "recompute": draw.choice(("auto", "auto", "full")), "zero": draw.choice(("auto", "auto", 1, 3)),
        }  # fmt: skip
        plans = search(model, batch_of(rows), **options, top=1000)
        for plan in draw.sample(list(plans), min(2, len(plans))):
            batch = batch_of(rows * plan.mesh.get("dp", 1))
            expected = _trained(model, batch)
            for rank in range(plan.num_ranks):
                compile(plan.source(rank), f"rank {rank}", "exec")
            par = autopar.parallelize(model, batch_of(rows), plan=plan)
            try:
                loss = par.step(**batch).item()
                norm = float(par.clip_grad_norm_(1e9))
            finally:
                par.close()
            assert loss == pytest.approx(expected[0], rel=2e-5), (options, plan)
            assert norm == pytest.approx(expected[1], rel=1e-4), (options, plan)

"""What one process gives that runs the untouched model: the yardstick of the tests of the whole path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model returns: itself, the first of a tuple, or `.loss`."""
    output = model(**batch)
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.loss


def rows_of(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def microbatches_of(batch: Batch, count: int) -> list[dict[str, Tensor]]:
    """The rows of each microbatch: 10 rows in 4 are 3, 3, 2, 2."""
    pieces = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: pieces[name][index] for name in batch} for index in range(count)]


def accumulate(model: nn.Module, batch: Batch, count: int, loss: Loss = model_loss) -> Tensor:
    """One process, microbatch after microbatch, each weighed by its rows; gradients are added to `.grad`."""
    total = torch.zeros(())
    for part in microbatches_of(batch, count):
        share = loss(model, part) * (rows_of(part) / rows_of(batch))
        share.backward()
        total = total + share.detach()
    return total


def train(step: Callable[[Batch], Tensor], parameters: Any, batches: list[Any], **options: Any) -> list[Tensor]:
    """The losses of one AdamW step per batch."""
    optimizer = torch.optim.AdamW(list(parameters), **{"lr": 3e-3, **options})
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(step(batch).clone())
        optimizer.step()
    return losses


def trained_alone(model: nn.Module, batches: list[Any], count: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(losses, state dict) of a copy of the model trained by `accumulate`."""
    alone = copy.deepcopy(model)
    losses = train(lambda batch: accumulate(alone, batch, count), alone.parameters(), batches)
    return losses, alone.state_dict()


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names whose tensors are not equal to the last bit, and those missing on either side."""
    return sorted(
        name
        for name in {*found, *expected}
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    )


def wide(cases: Iterable[tuple[Any, ...]], quick: Callable[..., bool]) -> list[Any]:
    """The rows of a table; those that `quick` is false for run with the slow tests only."""
    return [case if quick(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]

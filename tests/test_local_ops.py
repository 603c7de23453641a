"""What a rank computes of a split vocabulary, and of the split channels of a batch norm, equals the whole op."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_threads import rank_threads

from passes.local_ops import sharded_batch_norm, sharded_cross_entropy, sharded_embedding

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axis_size", [2, 4])
@pytest.mark.parametrize("padding_idx", [-1, 0, 3, 4, 7, 8, 15])
def test_embedding(axis_size, padding_idx):
    torch.manual_seed(0)
    table, indices = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 16, (5, 7))
    indices[0, :5] = torch.tensor([0, 3, 4, 8, 15])
    gradient = torch.randn(5, 7, 6, dtype=torch.float64)
    weight = table.clone().requires_grad_()
    expected = torch.ops.aten.embedding.default(weight, indices, padding_idx)
    expected.backward(gradient)

    def run(axis: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mine = table.chunk(axis_size)[axis.coord].clone().requires_grad_()
        result = sharded_embedding(mine, indices, axis, padding_idx=padding_idx)
        result.backward(gradient)
        return result.detach(), mine.grad

    results, grads = zip(*rank_threads(axis_size).run(run), strict=True)
    close(torch.stack(results).sum(0), expected.detach())
    close(torch.cat(grads), weight.grad)
    assert padding_idx < 0 or not torch.cat(grads)[padding_idx].any()


def run_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, gradient: torch.Tensor, axis_size: int, **options: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each rank's loss, and the gradient of all logits."""
    dim = 1 if logits.ndim > 1 else 0

    def run(axis: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mine = logits.chunk(axis_size, dim)[axis.coord].clone().requires_grad_()
        result = sharded_cross_entropy(mine, target, axis, **options)
        result.backward(gradient.to(result.dtype))
        return result.detach(), mine.grad

    results, grads = zip(*rank_threads(axis_size).run(run), strict=True)
    return list(results), torch.cat(grads, dim)


@pytest.mark.parametrize("axis_size", [2, 4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(10, 16), (3, 16, 5), (16,), (2, 16, 3, 2)])
def test_cross_entropy(shape, reduction, label_smoothing, axis_size):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 16, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    if len(shape) > 1:
        target.view(-1)[::3] = -100
    expected = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    results, grad = run_cross_entropy(
        logits.detach(), target, gradient, axis_size, reduction=REDUCTIONS[reduction], label_smoothing=label_smoothing
    )
    for result in results:
        close(result, expected.detach())
    close(grad, logits.grad)


def test_cross_entropy_with_another_ignored_index_and_large_logits():
    torch.manual_seed(0)
    logits, target = (1000 * torch.randn(12, 8, dtype=torch.float64)).requires_grad_(), torch.randint(0, 8, (12,))
    expected = F.cross_entropy(logits, target, ignore_index=3)
    expected.backward()
    results, grad = run_cross_entropy(logits.detach(), target, torch.tensor(1.0), 2, ignore_index=3)
    close(results[0], expected.detach())
    close(grad, logits.grad)


def test_cross_entropy_of_nothing_but_ignored_targets_is_nan_as_in_torch():
    logits, target = torch.randn(4, 8), torch.full((4,), -100)
    results, _ = run_cross_entropy(logits, target, torch.tensor(1.0), 2)
    assert F.cross_entropy(logits, target).isnan() and results[0].isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_in_bfloat16_is_as_close_to_the_truth_as_torch(reduction):
    torch.manual_seed(0)
    logits, target = torch.randn(300, 64).bfloat16(), torch.randint(0, 64, (300,))
    target[::4] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction=reduction)
    expected.backward()
    results, grad = run_cross_entropy(logits, target, torch.tensor(1.0), 2, reduction=REDUCTIONS[reduction])
    assert results[0].dtype == torch.bfloat16 and grad.dtype == torch.bfloat16
    plain = logits.clone().requires_grad_()
    theirs = F.cross_entropy(plain, target, reduction=reduction)
    theirs.backward()
    assert (results[0].double() - expected).abs() <= 2 * max((theirs.double() - expected).abs(), expected.abs() * 2**-8)
    scale = exact.grad.abs().max()
    assert (grad.double() - exact.grad).abs().max() <= 2 * max(
        (plain.grad.double() - exact.grad).abs().max(), scale * 2**-8
    )


@pytest.mark.parametrize("axis_size", [2, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine, training, axis_size):
    torch.manual_seed(0)
    whole = torch.randn(5, 8, 3, dtype=torch.float64)
    parameters = [torch.randn(8, dtype=torch.float64) for _ in range(2)] if affine else []
    mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    gradient = torch.randn_like(whole)
    own = [t.clone().requires_grad_() for t in (whole, *parameters)]
    stats = [mean.clone(), var.clone()]
    expected = F.batch_norm(own[0], *stats, *(own[1:] or (None, None)), training, 0.3, 1e-3)
    expected.backward(gradient)

    def run(axis: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        x = whole.chunk(axis_size, 1)[axis.coord].clone().requires_grad_()
        more = [p.chunk(axis_size)[axis.coord].clone().requires_grad_() for p in parameters]
        running = [mean.clone(), var.clone()]
        result = sharded_batch_norm(
            x, *(more or (None, None)), *running, axis, training=training, momentum=0.3, eps=1e-3
        )
        result.backward(gradient.chunk(axis_size, 1)[axis.coord])
        return result.detach(), [x.grad, *(p.grad for p in more)], running

    results = rank_threads(axis_size).run(run)
    close(torch.cat([r[0] for r in results], 1), expected.detach())
    close(torch.cat([r[1][0] for r in results], 1), own[0].grad)
    for k in range(1, len(own)):
        close(torch.cat([r[1][k] for r in results]), own[k].grad)
    for _, _, running in results:
        close(running[0], stats[0])
        close(running[1], stats[1])

"""Small models that each stand for one hard thing; entries of the zoo like the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stack(nn.Module):
    """Four residual MLPs: enough places to cut."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Contrastive(Stack):
    """Rows of the batch are compared with each other: only the whole batch gives this loss."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        similarity = F.normalize(self.run(x), dim=-1) @ F.normalize(y, dim=-1).t()
        rows = torch.arange(x.shape[0], device=x.device)
        return (F.cross_entropy(similarity, rows) + F.cross_entropy(similarity.t(), rows)) / 2


class RootMeanSquare(Stack):
    """A mean over the batch that is not the last thing done to it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.run(x) - y).square().mean().sqrt()


class ClassWeights(Stack):
    """A loss that weighs labels by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.rand(16) + 0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.run(x), labels, weight=self.weights, label_smoothing=0.1)


class MovingAverage(Stack):
    """A buffer that is updated from activations and read by later layers, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.count += 1
        return F.mse_loss(self.run(x - self.mean.clone()), y)


class OtherTypes(Stack):
    """Integers, booleans and values without gradient go from early layers to late ones; frozen ones make labels."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.embed = nn.Embedding(16, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        x = x + self.blocks[0](x)
        largest, positive, before = x.argmax(-1), x > 0.5, x.detach() * 2
        with torch.no_grad():
            labels = self.frozen(x).argmax(-1)
        x = self.run(x) + self.embed(largest) * positive + before
        loss = F.cross_entropy(x, labels) + x.square().mean()
        return {"loss": loss, "largest": largest, "positive": positive, "parameter": self.frozen.bias, "layers": 4}


class SharedParameters(nn.Module):
    """Every parameter is used at all depths, so on several stages; not the same ones on each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(4, 32, 8) * 0.1) for _ in range(2))
        self.out = nn.Parameter(torch.randn(4, 8, 32) * 0.1)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            q, k = (torch.einsum("btd,hdk->bhtk", x, weight) for weight in (self.q, self.k))
            scores = torch.einsum("bhtk,bhsk->bhts", q, k).softmax(-1)
            mixed = torch.einsum("bhts,bhsk->bhtk", scores, k)
            x = self.norm(x + torch.einsum("bhtk,hkd->btd", mixed, self.out))
        return F.smooth_l1_loss(x, y)


class FixedBatch(Stack):
    """A batch size that is written in the code."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.run(x.view(2, 3, 16)).reshape(6, 16), y)


class Autocast(Stack):
    """Half precision inside, by autocast."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.run(x)
        return F.mse_loss(x.float(), y)


class OddSizes(nn.Module):
    """Sizes that few numbers of ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(18, 10), nn.ReLU(), nn.Linear(10, 18), nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 18)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.layers(x), y)

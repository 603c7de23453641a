"""Small models that each stand for one hard thing; entries of the zoo like the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


class TimeFirst(nn.Module):
    """Dim 0 is time, as torch's own transformer layers have it by default: attention looks across rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, y)


class RolledRows(Stack):
    """Every row is compared with the next row of the batch; the shapes do not show it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.run(x)
        return F.mse_loss(x - x.roll(1, 0), y)


class Teacher(Stack):
    """Labels from a part that runs in inference mode, checks of values, checkpointed parts."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            labels = self.teacher(x)
        if labels.isnan().any():
            raise ValueError("the teacher diverged")
        assert (labels < 1e9).all() and not x.isinf().any()
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = x + checkpoint(block, x, use_reentrant=True)
        return F.mse_loss(x, labels.clone())


class ComputedWeights(nn.Module):
    """Weights computed from parameters in forward, a submodule called with other weights, sparse gradients, one module
    at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 16, sparse=True)
        self.bags = nn.EmbeddingBag(16, 16)
        self.first = nn.utils.weight_norm(nn.Linear(16, 32))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
        self.change = nn.Parameter(torch.randn(32, 16) * 0.1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.second(self.first(x).relu())
        changed = {"weight": self.first.weight + self.change}
        hidden = torch.func.functional_call(self.first, changed, (self.embed(labels),), tie_weights=False)
        return F.cross_entropy(x + self.second(hidden) + self.bags(labels[:, None]), labels)


class ComplexRotary(nn.Module):
    """Rotary positions by complex numbers, linear attention by running sums, einsum."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        angles = torch.outer(torch.arange(16.0), 1.0 / 10 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)

        def turned(part: Tensor) -> Tensor:
            pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(-2)

        q, k = F.elu(turned(q)) + 1, F.elu(turned(k)) + 1
        memory = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
        scale = torch.einsum("bthd,bthd->bth", q, k.cumsum(1))
        mixed = torch.einsum("bthd,bthde->bthe", q, memory) / scale.unsqueeze(-1)
        return F.mse_loss(self.out(mixed.flatten(2)), y)

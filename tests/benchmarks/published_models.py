"""The models of published training measurements, as anyone would write them: GPT with learned positions, and Llama's kind.

Built on the meta device at full depth from a record's dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder; `gated`: three MLP matrices with SiLU, RMS norms and rotary positions."""

    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool
    flash: bool
    dropout: float
    dtype: torch.dtype
    tied: bool


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.hidden // shape.heads
        self.flash, self.rotary, self.dropout = shape.flash, shape.gated, shape.dropout
        self.q = nn.Linear(shape.hidden, self.heads * self.dim, bias=not shape.gated)
        self.kv = nn.Linear(shape.hidden, 2 * self.kv_heads * self.dim, bias=not shape.gated)
        self.qkv = None
        if self.heads == self.kv_heads:
            del self.q, self.kv
            self.qkv = nn.Linear(shape.hidden, 3 * self.heads * self.dim, bias=not shape.gated)
        self.out = nn.Linear(self.heads * self.dim, shape.hidden, bias=not shape.gated)

    def forward(self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        rows, tokens, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).split(self.heads * self.dim, dim=2)
        else:
            q, (k, v) = self.q(x), self.kv(x).split(self.kv_heads * self.dim, dim=2)
        q = q.view(rows, tokens, self.heads, self.dim).transpose(1, 2)
        k = k.view(rows, tokens, self.kv_heads, self.dim).transpose(1, 2)
        v = v.view(rows, tokens, self.kv_heads, self.dim).transpose(1, 2)
        if angles is not None:
            q, k = rotated(q, *angles), rotated(k, *angles)
        if self.flash:
            grouped = self.heads != self.kv_heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            scores = (q @ k.transpose(-2, -1)) * self.dim**-0.5
            assert mask is not None
            y = F.dropout(F.softmax(scores.masked_fill(mask, -10000.0), dim=-1), self.dropout) @ v
        return self.out(y.transpose(1, 2).reshape(rows, tokens, self.heads * self.dim))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(shape.hidden), norm(shape.hidden)
        self.attention, self.dropout = Attention(shape), shape.dropout
        self.gate = nn.Linear(shape.hidden, shape.ffn_hidden, bias=False) if shape.gated else None
        self.up = nn.Linear(shape.hidden, shape.ffn_hidden, bias=not shape.gated)
        self.down = nn.Linear(shape.ffn_hidden, shape.hidden, bias=not shape.gated)

    def forward(self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        attended = self.attention(self.norm1(x), mask, angles)
        x = x + (F.dropout(attended, self.dropout) if self.dropout else attended)
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gate is not None else F.gelu(self.up(h))
        h = self.down(h)
        return x + (F.dropout(h, self.dropout) if self.dropout else h)


class Decoder(nn.Module):
    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.positions = None if shape.gated else nn.Embedding(context, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = (nn.RMSNorm if shape.gated else nn.LayerNorm)(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        count, device = tokens.shape[1], tokens.device
        x = self.embedding(tokens)
        angles = mask = None
        if self.positions is not None:
            x = x + self.positions(torch.arange(count, device=device))
            x = F.dropout(x, self.shape.dropout) if self.shape.dropout else x
        else:
            dim = self.shape.hidden // self.shape.heads
            steps = torch.arange(0, dim, 2, device=device) / dim
            turned = torch.arange(count, device=device)[:, None] / (500000.0 ** torch.cat([steps, steps]))[None, :]
            angles = turned.cos().to(x.dtype), turned.sin().to(x.dtype)
        if not self.shape.flash:
            mask = torch.triu(torch.ones(count, count, dtype=torch.bool, device=device), diagonal=1)
        for layer in self.layers:
            x = layer(x, mask, angles)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.view(-1))


def built(shape: Shape, tokens: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """(model, example inputs of two rows) on the meta device."""
    with torch.device("meta"):
        model = Decoder(shape, max(tokens, 2048)).to(shape.dtype)
        batch = {name: torch.zeros(2, tokens, dtype=torch.long) for name in ("tokens", "targets")}
    return model, batch

"""Small plain PyTorch models that many tests use, written as anyone would write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """x [B, d] -> [B, d], with an in-place activation."""

    def __init__(self, dim: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = heads, flash
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
            scores = scores.masked_fill(~mask, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.out(y)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, flash)
        self.ln2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        h = F.gelu(self.up(self.ln2(x)))
        return x + self.down(h)


class GPT(nn.Module):
    """A byte-level GPT with a fused qkv; (loss, logits) when targets are given."""

    def __init__(
        self,
        vocab: int = 64,
        dim: int = 32,
        heads: int = 4,
        layers: int = 2,
        context: int = 32,
        tied: bool = True,
        flash: bool = True,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(context, dim)
        self.h = nn.ModuleList(Block(dim, heads, flash) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        T = idx.shape[1]
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return loss, logits


def gpt_batch(rows: int = 4, tokens: int = 16, vocab: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `GPT`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, vocab, (rows, tokens + 1), generator=generator)
    return {"idx": text[:, :-1].contiguous(), "targets": text[:, 1:].contiguous()}


def tiny_llama(**changes: Any) -> nn.Module:
    """A Hugging Face Llama with grouped-query attention and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes}))


def tiny_gpt2(**changes: Any) -> nn.Module:
    """A Hugging Face GPT-2: tied, fused qkv, dropout off unless asked for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, bos_token_id=1, eos_token_id=2)
    off = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, loss_type="ForCausalLMLoss")
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **off, **changes}))


def causal_batch(rows: int = 4, tokens: int = 16, vocab: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a Hugging Face causal model; labels and input_ids are one tensor object, as people write it."""
    ids = torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}

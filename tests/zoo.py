"""The zoo: tiny models of every family with a batch each, plain PyTorch ones and Hugging Face ones from configs with
random weights.

An entry is a function that builds an `Example`; `ZOO` holds them by name. Sizes are as small as the structure allows:
two layers, four heads (two of keys and values where they are grouped), so that tp = 4 splits them and pp = 4 finds
places to cut. Nothing here knows autopar, and nothing in autopar knows these models: an entry is what a user would
write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import zoo_corners
from models import GPT, MLP, gpt_batch
from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """A model, the arguments of one call, and the loss function if forward returns no loss."""

    model: nn.Module
    inputs: dict[str, Any]
    loss_fn: Callable[..., Tensor] | None = None


def _tokens(rows: int = 4, length: int = 12, vocab: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def _floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- plain PyTorch --------------------------------------------------------------------------------------------------


def mlp() -> Example:
    """An in-place activation, a loss function."""
    return Example(
        MLP(), {"x": _floats(6, 16), "target": _floats(6, 16, seed=1)}, lambda out, target: F.mse_loss(out, target)
    )


class SelfAttention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return F.cross_entropy(self.head(self.norm(x + attended)).mean(1), labels)


def multihead_attention() -> Example:
    """nn.MultiheadAttention: a fused qkv weight, dims in the order [T, B, C] inside."""
    return Example(SelfAttention(), {"x": _floats(4, 6, 32), "labels": _tokens(4, 1, 10)[:, 0]})


class WithWeights(SelfAttention):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        attended, weights = self.attention(x, x, x)
        return F.cross_entropy(self.head(self.norm(x + attended)).mean(1), labels) + 0.1 * weights.square().mean()


def attention_weights() -> Example:
    """nn.MultiheadAttention that returns its averaged weights, used in the loss."""
    return Example(WithWeights(), {"x": _floats(4, 6, 32), "labels": _tokens(4, 1, 10)[:, 0]})


class Tagger(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, dim, padding_idx=0)
        layer = nn.TransformerEncoderLayer(dim, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 64)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten(), ignore_index=0)


def transformer_encoder() -> Example:
    """nn.TransformerEncoder with a padding mask, padding_idx, and rows with different numbers of labels."""
    tokens, labels = _tokens(), _tokens(seed=1)
    tokens[0, 9:], tokens[2, 4:], labels[0, 9:], labels[2, 4:] = 0, 0, 0, 0
    return Example(Tagger(), {"tokens": tokens, "labels": labels})


class Translator(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, dim)
        self.transformer = nn.Transformer(dim, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(dim, 64)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        before = target[:, :-1]
        mask = nn.Transformer.generate_square_subsequent_mask(before.shape[1])
        hidden = self.transformer(self.embed(source), self.embed(before), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target[:, 1:].flatten())


def transformer() -> Example:
    """nn.Transformer, encoder and decoder, two lengths, one shared embedding."""
    return Example(Translator(), {"source": _tokens(4, 9), "target": _tokens(4, 7, seed=1)})


def gpt() -> Example:
    """Fused qkv, tied, flash attention."""
    return Example(GPT(), gpt_batch())


def gpt_by_hand() -> Example:
    """Fused qkv, untied, hand-written attention."""
    return Example(GPT(tied=False, flash=False), gpt_batch())


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.layers = nn.Sequential(Residual(8, 16), Residual(16, 32, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.fc(torch.flatten(self.pool(self.layers(self.stem(images))), 1))
        return F.cross_entropy(logits, labels), logits


def resnet() -> Example:
    """Convolutions, BatchNorm in evaluation."""
    return Example(ResNet().eval(), {"images": _floats(4, 3, 16, 16), "labels": _tokens(4, 1, 10)[:, 0]})


def resnet_training() -> Example:
    """The same with BatchNorm in training: statistics of each microbatch, buffers updated."""
    return Example(ResNet(), {"images": _floats(8, 3, 16, 16), "labels": _tokens(8, 1, 10)[:, 0]})


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inside: int, outside: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.SiLU())

        self.down1, self.down2, self.middle = block(3, width), block(width, 2 * width), block(2 * width, 2 * width)
        self.pool = nn.AvgPool2d(2)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.merge2, self.merge1 = block(4 * width, width), block(2 * width, width)
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        a = self.down1(noisy)
        b = self.down2(self.pool(a))
        c = self.middle(self.pool(b))
        c = self.merge2(torch.cat([self.up2(c), b], dim=1))
        c = F.interpolate(c, scale_factor=2, mode="nearest")
        return F.mse_loss(self.out(self.merge1(torch.cat([c, a], dim=1))), clean)


def unet() -> Example:
    """Long skips over the stages, group norms, a transposed convolution."""
    return Example(UNet(), {"noisy": _floats(4, 3, 16, 16), "clean": _floats(4, 3, 16, 16, seed=1)})


class RecurrentModel(nn.Module):
    def __init__(self, vocab: int = 64, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(tokens))
        return self.head(hidden)


def lstm() -> Example:
    """A recurrent language model: one op of torch that holds all layers."""

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return Example(RecurrentModel(), {"tokens": _tokens(), "labels": _tokens(seed=1)}, loss_fn)


class TwoTowers(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.users = nn.Embedding(50, dim)
        self.user = nn.Sequential(nn.Linear(dim + 4, 32), nn.ReLU(), nn.Linear(32, dim))
        self.item = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, dim))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, batch: dict[str, Tensor], *, temperature: float = 0.5, normalize: bool = True
    ) -> dict[str, Tensor]:
        user = self.user(torch.cat([self.users(batch["user_id"]), batch["user"]], dim=-1))
        item = self.item(batch["item"])
        if normalize:
            user, item = F.normalize(user, dim=-1), F.normalize(item, dim=-1)
        score = (user * item).sum(-1) * self.scale / temperature
        return {"loss": F.binary_cross_entropy_with_logits(score, batch["clicked"]), "score": score, "user": user}


def two_towers() -> Example:
    """Dict inputs, keyword-only arguments that are no tensors, several outputs."""
    batch = {
        "user_id": _tokens(6, 1, 50)[:, 0],
        "user": _floats(6, 4),
        "item": _floats(6, 8, seed=1),
        "clicked": _tokens(6, 1, 2)[:, 0].float(),
    }
    return Example(TwoTowers(), {"batch": batch, "temperature": 0.7, "normalize": True})


class KeywordOnly(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))
        self.frozen = nn.Linear(dim, dim).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(
        self, *, x: Tensor, weight: Tensor, power: int = 2, names: tuple[str, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        early = self.layers[0](x).tanh()
        with torch.no_grad():
            teacher = self.frozen(x)
        h = early
        for layer in self.layers[1:]:
            h = h + torch.tanh(layer(h))
        self.steps += 1
        loss = ((h - teacher).abs() ** power * weight).mean() + 0.01 * early.square().sum()
        return loss, {"early": early, "late": h.argmax(-1)}


def keyword_only() -> Example:
    """Keyword-only tensors, baked arguments, a frozen layer under no_grad, a counter, early outputs, two loss terms."""
    return Example(
        KeywordOnly(), {"x": _floats(6, 16), "weight": _floats(6, 16, seed=1).abs(), "power": 2, "names": ("a",)}
    )


def corner(kind: Callable[[], nn.Module]) -> Example:
    """A model of tests/zoo_corners.py with tensors for the arguments that its forward names."""
    model = kind()
    sizes = {
        zoo_corners.SharedParameters: (6, 5, 32), zoo_corners.OddSizes: (6, 18), zoo_corners.TimeFirst: (5, 4, 32),
        zoo_corners.ComplexRotary: (6, 5, 32),
    }  # fmt: skip
    size = sizes.get(kind, (6, 16))
    given = {"x": _floats(*size), "y": _floats(*size, seed=1), "labels": _tokens(6, 1, 16)[:, 0]}
    return Example(model, {name: given[name] for name in inspect.signature(model.forward).parameters})


_CORNERS = tuple(
    kind
    for kind in vars(zoo_corners).values()
    if isinstance(kind, type) and kind.__module__ == "zoo_corners" and "forward" in vars(kind)
)


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

_SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=64,
)
_ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _language(kind: str, attention: str, **options: Any) -> Example:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**_ENDS, **options}, attn_implementation=attention)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config).eval()
    ids = _tokens()
    return Example(model, {"input_ids": ids, "labels": ids})


def gpt2(attention: str) -> Example:
    """Tied, fused qkv by a transposed weight."""
    return _language("GPT2", attention, n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64)


def llama(attention: str) -> Example:
    """Grouped keys and values, rotary positions, rms norms."""
    return _language("Llama", attention, **_SMALL, num_key_value_heads=2)


def mistral(attention: str) -> Example:
    """A sliding window shorter than the batch."""
    return _language("Mistral", attention, **_SMALL, num_key_value_heads=2, sliding_window=8)


def qwen3(attention: str) -> Example:
    """Norms of queries and keys inside the heads."""
    return _language("Qwen3", attention, **_SMALL, num_key_value_heads=2, head_dim=8)


def gemma2(attention: str) -> Example:
    """Soft caps, scaled embeddings, alternating windows, tied."""
    return _language(
        "Gemma2", attention, **_SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8
    )


def phi3(attention: str) -> Example:
    """Fused qkv of different sizes, fused gate and up."""
    return _language("Phi3", attention, **_SMALL, num_key_value_heads=2)


def gpt_neox(attention: str) -> Example:
    """Parallel attention and MLP, fused qkv by head, partly rotary."""
    return _language("GPTNeoX", attention, **_SMALL, use_parallel_residual=True)


def mixtral(attention: str) -> Example:
    """Experts in their grouped form: sorted tokens, one op of the library's own for all experts."""
    return _language("Mixtral", attention, **_SMALL, num_key_value_heads=2, num_local_experts=4)


def mixtral_batched(attention: str) -> Example:
    """Experts by a batched matmul over gathered weights."""
    return _language(
        "Mixtral", attention, **_SMALL, num_key_value_heads=2, num_local_experts=4, experts_implementation="batched_mm"
    )


def bert(attention: str) -> Example:
    """An encoder with token types, a padding mask and masked labels."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**_SMALL, attn_implementation=attention)
    ids, labels, mask = _tokens(), _tokens(seed=1), torch.ones(4, 12, dtype=torch.long)
    labels[:2, 3:], mask[1, 8:] = -100, 0
    return Example(BertForMaskedLM(config).eval(), {"input_ids": ids, "attention_mask": mask, "labels": labels})


def t5(attention: str) -> Example:
    """Encoder and decoder, a trained position bias, tied three times, two lengths."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        decoder_start_token_id=0,
        attn_implementation=attention,
        **_ENDS,
    )
    return Example(
        T5ForConditionalGeneration(config).eval(), {"input_ids": _tokens(4, 9), "labels": _tokens(4, 7, seed=1)}
    )


def vit(attention: str) -> Example:
    """An image encoder: patches by convolution, a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in _SMALL.items() if key not in ("vocab_size", "max_position_embeddings")}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=8, attn_implementation=attention)
    return Example(
        ViTForImageClassification(config).eval(),
        {"pixel_values": _floats(4, 3, 16, 16), "labels": _tokens(4, 1, 8)[:, 0]},
    )


def whisper(attention: str) -> Example:
    """Audio encoder, text decoder, one dim convolutions."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, attn_implementation=attention, **_ENDS,
    )  # fmt: skip
    return Example(
        WhisperForConditionalGeneration(config).eval(), {"input_features": _floats(4, 8, 32), "labels": _tokens(4, 7)}
    )


def mpt(attention: str) -> Example:
    """Positions as a bias of the scores, growing with distance (ALiBi); no biases."""
    return _language("Mpt", attention, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64)


def gptj(attention: str) -> Example:
    """Attention and MLP side by side on one norm, interleaved rotary positions."""
    return _language("GPTJ", attention, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, vocab_size=64)


def deepseek_v3(attention: str) -> Example:
    """Latent attention (queries, keys and values by low rank), a shared expert beside routed ones."""
    return _language(
        "DeepseekV3", attention, **_SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip


def mamba(attention: str) -> Example:
    """No attention: a short convolution and a recurrence over the sequence."""
    return _language("Mamba", attention, hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=64)


def swin(attention: str) -> Example:
    """Attention in windows that shift, patches merged between stages."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=8,
        attn_implementation=attention,
    )  # fmt: skip
    return Example(
        SwinForImageClassification(config).eval(),
        {"pixel_values": _floats(4, 3, 16, 16), "labels": _tokens(4, 1, 8)[:, 0]},
    )


_PLAIN = (
    mlp, multihead_attention, attention_weights, transformer_encoder, transformer, gpt, gpt_by_hand, resnet,
    resnet_training, unet, lstm, two_towers, keyword_only,
)  # fmt: skip
_HUGGING_FACE = (
    gpt2, llama, mistral, qwen3, phi3, gpt_neox, mixtral, mixtral_batched, bert, t5, vit, whisper, deepseek_v3,
)  # fmt: skip
_HUGGING_FACE_EAGER = (gemma2, mpt, gptj, mamba, swin)  # all that the library has for them

ZOO: dict[str, Callable[[], Example]] = {build.__name__: build for build in _PLAIN}
ZOO |= {re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): partial(corner, kind) for kind in _CORNERS}
ZOO |= {
    f"{build.__name__}-{attention}": partial(build, attention)
    for build in (*_HUGGING_FACE, *_HUGGING_FACE_EAGER)
    for attention in ("sdpa", "eager")
    if attention == "eager" or build not in _HUGGING_FACE_EAGER
}

LAYOUTS = ((2, 1), (4, 1), (1, 2), (1, 4), (2, 2))  # (tp, pp)

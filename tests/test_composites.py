"""Ops that ATen makes of others are written out where they have no rule; what is fused by hand is split as if by one op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from canonical_interpreter import check_equal
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import autopar
from autopar.trace import Traced, trace
from passes import canonical_import
from passes.rules import rule_of
from passes.values import depends_on_parameters, is_call

aten = torch.ops.aten


class Of(nn.Module):
    """`function` between two projections, the last dim kept or not."""

    def __init__(self, function: Callable[[Tensor], Tensor], inside: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function = nn.Linear(8, inside), function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.function(self.first(x)) * self.scale).square().mean()


def inputs(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(0))}


COMPOSITES: dict[str, Callable[[Tensor], Tensor]] = {
    "concat": lambda h: torch.concat([h, h.flip(0)], 1),
    "tile": lambda h: torch.tile(h, (2, 1)),
    "vstack": lambda h: torch.vstack([h, h]),
    "multiply": lambda h: torch.multiply(h, h),
    "clip": lambda h: torch.clip(h, -0.5, 0.5),
    "greater": lambda h: torch.where(torch.greater(h, 0.1), h, -h),
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.roll(1, 1)),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(h, h.roll(1, 0), torch.tensor([1, -1, 1, 1])),
    "triplet_margin_loss": lambda h: F.triplet_margin_loss(h, h.roll(1, 0), h.roll(2, 0)),
    "margin_ranking_loss": lambda h: F.margin_ranking_loss(h, h.roll(1, 0), h.sign().detach()),
    "pairwise_distance": lambda h: F.pairwise_distance(h, h.roll(1, 0)),
    "special_logit": lambda h: torch.special.logit(h.sigmoid()),
    "fft_rfft": lambda h: torch.fft.rfft(h).abs(),
    "fft_fft2": lambda h: torch.fft.fft2(h).imag,
    "kron": lambda h: torch.kron(h, h[:2]),
    "inner": lambda h: torch.inner(h, h),
    "take_along_dim": lambda h: torch.take_along_dim(h, h.argsort(1), 1),
    "linalg_norm": lambda h: torch.linalg.norm(h, dim=-1),
}


def ops(traced: Traced) -> set[str]:
    return {str(node.target).split(".")[1] for node in traced.graph_module.graph.nodes if str(node.target).startswith("aten.")}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_written_out_gives_the_same_bits(name: str) -> None:
    traced = check_equal(Of(COMPOSITES[name]), (), inputs(4, 8), gradient_tolerance=0.0)
    assert name not in ops(traced)
    graph = traced.graph_module.graph
    computed = depends_on_parameters(graph)
    assert not [node for node in graph.nodes if node in computed and is_call(node) and rule_of(node.target) is None]


def test_sizes_in_composites_stay_symbolic() -> None:
    check_equal(Of(lambda h: torch.tile(torch.concat([h, h], -1), (1, 2)).fliplr()), (), inputs(4, 8), again=((), inputs(7, 8)))


def test_composites_take_the_way_that_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pdist` and the weight norm do something else where no gradient is wanted."""
    model = Of(lambda h: h)
    model.first = weight_norm(model.first)
    check_equal(model, (), inputs(4, 8))
    check_equal(Of(lambda h: torch.linalg.svdvals(h)), (), inputs(4, 8), gradient_tolerance=1e-4)
    original = canonical_import.parts
    seen: list[list[bool]] = []

    def spied(node, is_trainable, mode):
        seen.append([is_trainable(source) for source in node.all_input_nodes])
        return original(node, is_trainable, mode)

    monkeypatch.setattr(canonical_import, "parts", spied)
    trace(Of(lambda h: torch.multiply(h, h.detach())), (), inputs(4, 8))
    assert seen == [[True, False]]


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.RReLU()], ids=lambda layer: type(layer).__name__)
def test_random_composites_stay_for_evaluation_to_switch_off(layer: nn.Module) -> None:
    traced = trace(Of(layer), (), inputs(4, 8))
    assert [node for node in traced.graph_module.graph.nodes if node.meta.get("random")]


def test_composites_that_read_values_or_cannot_be_traced_stay_whole() -> None:
    traced = trace(Of(lambda h: torch.stft(h, 4, return_complex=True, window=torch.ones(4)).abs()), (), inputs(4, 8))
    assert "stft" in ops(traced)


# ---- what they make possible ------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """Recurrent cells in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.gru, self.out = nn.LSTMCell(8, 16), nn.GRUCell(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = c = g = x.new_zeros(x.shape[0], 16)
        for step in range(2):
            h, c = self.lstm(x[:, step], (h, c))
            g = self.gru(h, g)
        return F.mse_loss(self.out(g), y[:, 0])


class Slices(nn.Module):
    """q, k and v of different sizes, gate and up, cut out by slices; every second entry of another product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(8, 32 + 16 + 16), nn.Linear(32, 8)
        self.gate_up, self.down = nn.Linear(8, 48), nn.Linear(24, 8)
        self.mixed, self.down2 = nn.Linear(8, 48), nn.Linear(24, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        fused = self.qkv(x)
        q, k, v = (part.unflatten(2, (-1, 8)).transpose(1, 2) for part in (fused[..., :32], fused[..., 32:48], fused[..., -16:]))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        both = self.gate_up(x)
        x = x + self.down(F.silu(both[..., :24]) * both[..., 24:])
        mixed = self.mixed(x)
        return F.mse_loss(x + self.down2(F.silu(mixed[..., ::2]) * mixed[..., 1::2]), y)


class Convolutions(nn.Module):
    """Biases, depthwise and grouped convolutions, transposed ones, norms over groups and instances."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.groups = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)
        self.wide, self.instance = nn.Conv2d(8, 16, 3, padding="same"), nn.InstanceNorm2d(16, affine=True)
        self.up, self.up_groups = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(8, 8, 1, groups=4)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.gelu(self.depth(F.silu(self.groups(self.stem(x)))))
        h = torch.tanh(self.point(h))
        h = self.up(self.instance(self.wide(h)))
        return F.mse_loss(self.out(F.gelu(self.up_groups(h))), y)


SPLIT: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], dict[str, str]]] = {
    "cells": (Cells, {"x": (4, 2, 8), "y": (4, 2, 8)}, {"lstm.weight_ih": "(4 16/tp) 8", "lstm.weight_hh": "64 16/tp"}),
    "slices": (
        Slices,
        {"x": (4, 5, 8), "y": (4, 5, 8)},
        {
            "qkv.weight": "(32/tp + 16/tp + 16/tp) 8", "o.weight": "8 32/tp", "gate_up.weight": "(2 24/tp) 8",
            "down.weight": "8 24/tp", "mixed.weight": "48/tp 8", "down2.weight": "8 24/tp",
        },
    ),
    "convolutions": (
        Convolutions,
        {"x": (4, 3, 6, 6), "y": (4, 3, 12, 12)},
        {
            "stem.weight": "16/tp 3 3 3", "groups.weight": "16/tp", "depth.weight": "16/tp 1 3 3", "depth.bias": "16/tp",
            "point.weight": "8 16/tp 1 1", "point.bias": "8", "up_groups.weight": "8/tp 2 1 1", "out.weight": "3 8/tp 3 3",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_they_split_like_any_other_product(name: str, tp: int) -> None:
    build, shapes, expected = SPLIT[name]
    batch = {key: torch.randn(*shape, generator=torch.Generator().manual_seed(len(key))) for key, shape in shapes.items()}
    report = autopar.verify(build(), batch, tp=tp)
    assert report.ok, report
    placements = {key: str(value).replace(" [", "").strip() for key, value in report.plan.placements.items()}
    if tp == 2:
        assert {key: placements[key] for key in expected} == expected
    assert not [note for note in report.plan.notes if "has no rule and stays whole" in note]


def test_a_convolution_without_a_collective_gets_its_bias_back() -> None:
    batch = {key: torch.randn(shape) for key, shape in SPLIT["convolutions"][1].items()}
    source = autopar.parallelize(Convolutions(), batch, tp=2).plan.source(0)
    assert 'p("stem.weight"), p("stem.bias")' in source
    assert 'p("point.weight"), p("point.bias")' not in source and 'p("point.weight")' in source
    check_equal(Convolutions(), (), batch, gradient_tolerance=0.0)


def test_slices_that_overlap_or_leave_something_out_stay_slices() -> None:
    def overlapping(h: Tensor) -> Tensor:
        return h[:, :16] * h[:, 8:]

    def parts(h: Tensor) -> Tensor:
        return h[:, :8] * h[:, 8:16]

    for function in (overlapping, parts):
        assert "split_with_sizes" not in ops(check_equal(Of(function), (), inputs(4, 8), gradient_tolerance=0.0))

    def tiling(h: Tensor) -> Tensor:
        h = F.relu(h)
        return h[:, :12] * h[:, 12:]

    def heads(h: Tensor) -> Tensor:
        h = h.unflatten(1, (2, 12))
        return h[..., :6] * h[..., 6:]

    assert "split_with_sizes" in ops(check_equal(Of(tiling), (), inputs(4, 8)))
    assert "split_with_sizes" not in ops(check_equal(Of(heads), (), inputs(4, 8)))

"""Mixtures of experts in their grouped and batched forms: tensor-parallel inside each expert, the router whole and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import _SMALL, Example, _language

import autopar

_MOE: dict[str, dict[str, Any]] = {
    "Mixtral": dict(num_key_value_heads=2, num_local_experts=4),
    "Qwen2Moe": dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                     shared_expert_intermediate_size=48),
    "Qwen3Moe": dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "Olmoe": dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    "DeepseekV3": dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                       moe_intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4,
                       qk_nope_head_dim=8, v_head_dim=8),
    "GptOss": dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "GraniteMoe": dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "Phimoe": dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
GROUPED, BATCHED = "grouped_mm", "batched_mm"
QUICK = [("Mixtral", GROUPED), ("DeepseekV3", BATCHED)]


def example(kind: str, experts: str) -> Example:
    torch.manual_seed(0)
    attention = "eager" if kind == "GptOss" else "sdpa"
    return _language(kind, attention, **_SMALL, **_MOE[kind], experts_implementation=experts)


def check_placements(plan: autopar.Plan) -> None:
    """The contracted dim of one product of each expert is the free dim of the other: the experts' inner dim, gate and up
    each by itself; what says which token goes where is whole."""
    placements = {name: str(placement) for name, placement in plan.placements.items()}
    experts = {
        name: text
        for name, text in placements.items()
        if "experts." in name and "shared" not in name and "bias" not in name
    }
    assert experts and all("/tp" in text and text.startswith("4 ") for text in experts.values()), experts
    fused = {text for name, text in experts.items() if "gate_up" in name}
    assert all("(2 " in text or text == "4 32 96/tp" for text in fused), fused  # alternating columns need no blocks
    routers = {name: text for name, text in placements.items() if name.endswith(("gate.weight", "router.weight"))}
    assert routers and not [name for name, text in routers.items() if "/tp" in text], routers
    assert not [note for note in plan.notes if "has no rule and stays whole" in note]


@pytest.mark.parametrize(("kind", "experts"), QUICK)
def test_experts_are_split_inside(kind: str, experts: str) -> None:
    made = example(kind, experts)
    report = autopar.verify(made.model, made.inputs, tp=2)
    assert report.ok, report
    check_placements(report.plan)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((2, 1), marks=pytest.mark.wide),
        pytest.param((4, 1), marks=pytest.mark.wide),
        pytest.param((2, 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("experts", [GROUPED, BATCHED])
@pytest.mark.parametrize("kind", _MOE)
def test_every_mixture_verifies(kind: str, experts: str, layout: tuple[int, int]) -> None:
    made = example(kind, experts)
    report = autopar.verify(made.model, made.inputs, tp=layout[0], pp=layout[1])
    assert report.ok, report
    if layout[0] == 2:
        check_placements(report.plan)


def test_low_precision_takes_the_kernel_of_torch() -> None:
    """bf16 models call `aten._grouped_mm`, whose rows must begin at multiples of 16 bytes: 24 features over 2 ranks would not."""
    made = example("Mixtral", GROUPED)
    made.model.bfloat16()
    plan = autopar.parallelize(made.model, made.inputs, tp=2).plan
    assert "aten._grouped_mm.default" in plan.source(0)
    check_placements(plan)
    small = example("Qwen2Moe", GROUPED)
    small.model.bfloat16()
    par = autopar.parallelize(small.model, small.inputs, tp=2)
    assert str(par.plan.placements["model.layers.0.mlp.experts.down_proj"]) == "4 32 24"
    assert torch.isfinite(par.step(**small.inputs))

"""The canonical graph: what form it has, and that it computes what the user's model computes."""

from __future__ import annotations

import ast
import keyword
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from canonical_interpreter import check_equal
from models import GPT, MLP, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from autopar.errors import CaptureError
from autopar.trace import Traced, trace
from passes.canonical_rewrite import op_name
from passes.ir import is_state, is_trainable
from passes.names import readable_names


class Body(nn.Module):
    """A model from a function of a linear layer's owner: self.linear is [8 -> 8]."""

    def __init__(self, function: Any, **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def ops(traced: Traced) -> list[str]:
    return [op_name(node.target) for node in traced.graph_module.graph.nodes if op_name(node.target)]


def test_order_and_types_of_a_canonical_graph() -> None:
    graph = trace(GPT(), (), gpt_batch()).graph_module.graph
    kinds = [node.op for node in graph.nodes]
    assert kinds == sorted(kinds, key=["placeholder", "get_attr", "call_function", "output"].index)
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["idx", "targets", "B", "T"]
    for node in graph.nodes:
        if node.op != "output":
            assert ("tensor" in node.meta) + ("tensors" in node.meta) + ("size" in node.meta) == 1, node.format_node()


def test_biases_are_separate_and_marked() -> None:
    traced = trace(tiny_gpt2(), (), causal_batch())
    graph = traced.graph_module.graph
    assert "addmm" not in ops(traced)
    marked = [node for node in graph.nodes if node.meta.get("fused")]
    assert marked and all(node.args[0].name == node.meta["bias_of"] for node in marked)
    assert {node.meta["fused"] for node in marked} == {"addmm"}
    assert {
        node.meta["fused"] for node in trace(GPT(), (), gpt_batch()).graph_module.graph.nodes if node.meta.get("fused")
    } == {"linear"}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_materialised_causal_mask_is_folded(build: Any) -> None:
    traced = trace(build(), (), causal_batch())
    attentions = [
        node for node in traced.graph_module.graph.nodes if op_name(node.target) == "scaled_dot_product_attention"
    ]
    assert len(attentions) == 2
    assert all(node.args[3] is None and node.args[5] is True for node in attentions)
    assert not {"cumsum", "diff", "bitwise_and", "le", "eq"} & set(ops(traced))


def test_a_padding_mask_is_kept() -> None:
    batch = causal_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 12:] = 0
    traced = check_equal(tiny_llama(), (), {**batch, "attention_mask": mask})
    attentions = [
        node for node in traced.graph_module.graph.nodes if op_name(node.target) == "scaled_dot_product_attention"
    ]
    assert all(node.args[3] is not None for node in attentions)


def masked_attention(mask: Any) -> Body:
    def forward(self: Body, ids: Tensor) -> Tensor:
        x = self.linear(ids[..., None].expand(*ids.shape, 8).float())
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask(ids.shape[1])).sum()

    return Body(forward)


def lower(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def window(width: int) -> Any:
    def mask(length: int) -> Tensor:
        places = torch.arange(length)
        distance = places[:, None] - places[None, :]
        return (distance >= 0) & (distance < width)

    return mask


@pytest.mark.parametrize(
    ("mask", "folded", "limits"),
    [
        (lower, True, {}),
        (lambda n: torch.zeros(n, n).masked_fill(~lower(n), float("-inf")), True, {}),
        (lambda n: torch.zeros(n, n).masked_fill(~lower(n), torch.finfo(torch.float32).min), True, {}),
        (lambda n: lower(n) | (torch.arange(n) == n - 1), False, {}),
        (lambda n: lower(n).T, False, {}),
        (lambda n: torch.zeros(n, n).masked_fill(~lower(n), -1.0), False, {}),
        (window(3), False, {}),
        (window(40), False, {}),
        (window(4096), True, {"T": (1, 4096)}),
    ],
)
def test_only_masks_that_are_causal_for_every_size_are_folded(mask: Any, folded: bool, limits: dict[str, Any]) -> None:
    traced = check_equal(masked_attention(mask), (torch.randint(9, (2, 12)),), output_tolerance=1e-5)
    assert (
        "attn_mask" in traced.graph_module.code
        or any(node.args[5:] == (True,) for node in traced.graph_module.graph.nodes)
    ) == folded
    assert traced.limits == limits


def test_a_static_mask_buffer_of_a_branching_length_is_folded() -> None:
    def forward(self: Body, ids: Tensor) -> Tensor:
        x = self.linear(ids[..., None].expand(*ids.shape, 8).float())[:, None]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias[: ids.shape[1], : ids.shape[1]]).sum()  # type: ignore[index]

    traced = check_equal(Body(forward, bias=lower(64)), (torch.randint(9, (2, 12)),), output_tolerance=1e-5)
    assert not any(is_state(node) and node.target == "bias" for node in traced.graph_module.graph.nodes)


def in_place_views(self: Body, x: Tensor) -> Tensor:
    h = self.linear(x)
    y = h.clone()
    first = y[:, 0]
    y[:, 1:3] *= 2
    y.transpose(0, 1)[4] = 1.0
    first.add_(3)
    y.view(-1)[0] = 0.5
    with torch.no_grad():
        noise = x.clone()
        a, b = noise.chunk(2, dim=1)
        b.mul_(a)
        noise.unbind(1)[0].zero_()
    return (y * first[:, None] + h + noise).sum()


def in_place_masks(self: Body, x: Tensor) -> Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:, 3] = True
    mask |= torch.eye(8, dtype=torch.bool)
    scores = self.linear(x)[:, None] * torch.ones(8, 1)
    scores.masked_fill_(mask, -1.0)
    scores[:, torch.arange(8), torch.arange(8)] = 0.0
    return scores.square_().sum()


def no_grad_region(self: Body, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = self.linear(x).abs().mean()
        with torch.enable_grad():
            shift = self.linear(x).mean()
    return (self.linear(x) * scale + shift + self.linear(x).detach()).sum()


def autocast_region(self: Body, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.linear(x)
        y = F.softmax(F.gelu(y) @ y.T, dim=-1)
        with torch.autocast("cpu", enabled=False):
            z = self.linear(x)
        y = self.linear(self.linear(x)) + z
    return y.float().sum() + F.layer_norm(y, (8,)).sum()


def spellings(self: Body, x: Tensor) -> Tensor:
    y = self.linear(x)
    q, k = y.view(y.shape[0], 2, -1).unbind(1)
    a, b = y.tensor_split(2, dim=-1)
    c, *_ = y.split([1, 7], dim=-1)
    z = (q * k + a * b + c).unsqueeze(0).squeeze().t().movedim(0, 1).swapaxes(0, 1)
    keep = (y > 0) & (y < 1) | (y == 2)
    return z.flatten().sum() + y.masked_fill(keep, 0).narrow(1, 1, 3).type_as(x).sum() + y.unflatten(1, (4, 2)).mT.sum()


def size_arithmetic(self: Body, x: Tensor) -> Tensor:
    rows = x.shape[0]
    y = self.linear(x).reshape(rows * 4, 2)
    y = torch.cat([y, y.new_zeros(3 * rows + 1, 2)])[: rows * 5 - 2]
    return y.sum() / rows**0.5 + torch.full((rows + 1,), rows / 7).sum() + max(rows, 3)


def clones_and_casts(self: Body, x: Tensor) -> Tensor:
    y = self.linear(x).clone().contiguous().to(torch.float32).to(x.device)
    z = y.T.contiguous() @ y
    return z.double().float().sum() + y.to(torch.bfloat16).sum().float()


@pytest.mark.parametrize(
    "function",
    [in_place_views, in_place_masks, no_grad_region, autocast_region, spellings, size_arithmetic, clones_and_casts],
)
def test_bodies_keep_their_numbers(function: Any) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(4, 8), torch.randn(6, 8)
    traced = check_equal(Body(function), (x,), again=((other,), {}) if function is not size_arithmetic else None)
    names = ops(traced)
    assert not any(name.endswith("_") and not name.endswith("__") for name in names), names
    assert not {"split", "chunk", "unbind", "tensor_split", "__and__", "__or__", "alias", "narrow", "t"} & set(names), (
        names
    )


def test_the_mlp_with_in_place_activation() -> None:
    traced = check_equal(MLP(), (torch.randn(3, 16),), loss_fn=lambda out: out.sum())
    assert "relu" in ops(traced) and "relu_" not in ops(traced)


def test_a_no_grad_region_gets_no_gradient() -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.linear(x)
        return (self.linear(x + 1) - target).square().sum()

    traced = check_equal(Body(forward), (torch.randn(4, 8),))
    assert "detach" in ops(traced)
    products = [node for node in traced.graph_module.graph.nodes if op_name(node.target) == "linear"]
    assert sorted(is_trainable(node) for node in products) == [False, True]


def test_buffer_updates_stay_and_are_pinned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("cache", torch.zeros(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            before = self.count.clone()
            self.count += 1
            h = self.norm(self.linear(x))
            self.cache[:2] = h[:2].detach()
            return (h * self.count + before + self.cache.sum()).square().sum()

    traced = check_equal(Model(), (torch.randn(4, 8),))
    pinned = {name for node in traced.graph_module.graph.nodes for name in node.meta.get("mutates", ())}
    assert pinned == {"count", "cache", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_what_cannot_be_made_functional_is_refused_with_its_line() -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        y = self.linear(x)[:1].expand(4, 8)
        y[0] = 1.0
        return y.sum()

    def update(self: Body, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(2)
        return self.linear(x).sum()

    with pytest.raises(CaptureError, match=r"test_canonicalize.py:\d+  self.linear.weight.mul_\(2\)"):
        trace(Body(update), (torch.randn(4, 8),), {})
    with pytest.raises(CaptureError, match=r"test_canonicalize.py:\d+  "):
        trace(Body(forward), (torch.randn(4, 8),), {})


def test_only_what_has_no_gradient_and_no_chance_is_merged() -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        places = torch.arange(8) * 2 + torch.arange(8) * 2
        noise = torch.rand(8) - torch.rand(8)
        return (self.linear(x) + self.linear(x) + places + noise).sum()

    traced = check_equal(Body(forward), (torch.randn(4, 8),))
    names = ops(traced)
    assert names.count("arange") == 1 and names.count("rand") == 2 and names.count("linear") == 2


def test_dropout_stays_random_and_draws_the_same_numbers() -> None:
    model = tiny_gpt2(attn_pdrop=0.0, resid_pdrop=0.1, embd_pdrop=0.1)
    traced = check_equal(model.train(), (), causal_batch())
    assert any(node.meta.get("random") for node in traced.graph_module.graph.nodes)
    assert not any(node.meta.get("random") for node in trace(model.eval(), (), causal_batch()).graph_module.graph.nodes)


def test_names_come_from_the_users_code() -> None:
    graph = trace(GPT(flash=False), (), gpt_batch()).graph_module.graph
    names = readable_names(graph)
    of_layer = [
        name
        for node, name in names.items()
        if node.op == "call_function" and node.meta["origin"].path.startswith("h.0")
    ]
    expected = "ln1 qkv qkv_out pieces q k v reshape q_1 reshape_1 k_1 reshape_2 v_1"
    assert of_layer[:13] == expected.split()
    assert {"x", "scores", "mask", "logits", "loss", "attn", "up", "h", "down", "B_times_T"} <= set(names.values())
    assert readable_names(graph) == names


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_names_are_unique_identifiers(build: Any) -> None:
    names = readable_names(trace(build(), (), causal_batch()).graph_module.graph)
    assert len(set(names.values())) == len(names)
    for name in names.values():
        assert name.isidentifier() and not keyword.iskeyword(name) and name not in dir(__builtins__)
        ast.parse(f"{name} = 1")


def _rows_and_back(self: Body, x: Tensor) -> Tensor:
    rows = F.gelu(self.linear(x.view(-1, x.size(-1))))
    return (torch.addmm(self.linear.bias, rows, self.linear.weight) * 2.0).view(*x.shape[:-1], 2, 4)


def _rows_used_as_rows_too(self: Body, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = self.linear(x.reshape(-1, 8))
    return rows.view(x.shape), rows.softmax(0)


def _rows_beside_other_rows(self: Body, x: Tensor) -> Tensor:
    noise = torch.arange(x.shape[0] * x.shape[1]).float().unsqueeze(-1)
    return (self.linear(x.view(-1, 8)) + noise).view(x.shape)


FLATTENED: dict[str, tuple[Any, int]] = {  # function, matmuls on rows that are left
    "a layer that flattens": (_rows_and_back, 0),
    "rows that something else wants too": (_rows_used_as_rows_too, 0),
    "what belongs to rows": (_rows_beside_other_rows, 1),
    "other leading dims": (lambda self, x: self.linear(x.view(-1, 8)).view(x.shape[1], x.shape[0], 8), 1),
    "no view back": (lambda self, x: self.linear(x.view(-1, 8)), 1),
    "only the features split": (lambda self, x: self.linear(x.view(-1, 8)).view(-1, 2, 4), 1),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_what_is_flattened_for_a_matmul_and_turned_back_is_not_flattened(name: str) -> None:
    """To the last bit the user's numbers, also of a slice, whose rows are not next to each other in memory."""
    function, left = FLATTENED[name]
    traced = check_equal(Body(function), (torch.randn(4, 12, 8),), again=((torch.randn(3, 12, 8),), {}))
    matmuls = [n for n in traced.graph_module.graph.nodes if op_name(n.target) in ("mm", "linear", "matmul")]
    assert sum(len(n.meta["tensor"].shape) == 2 for n in matmuls) == left
    check_equal(Body(lambda self, x: function(self, x[..., :8])), (torch.randn(4, 12, 16),))

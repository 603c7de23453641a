"""The front end's promises: what a call's arguments are named, what stays symbolic, what is refused, and that nothing
is changed.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from canonical_interpreter import check_equal
from models import GPT, MLP, causal_batch, gpt_batch, tiny_gpt2, tiny_llama
from torch import Tensor, fx, nn

from autopar.errors import BadArgument, CaptureError
from autopar.trace import trace
from passes.ir import TensorType, is_state, size_symbol

B, T = size_symbol("B"), size_symbol("T")


def line_of(source: str) -> int:
    """The number of the line of this file that ends with a marker comment."""
    return next(
        i
        for i, line in enumerate(inspect.getsource(inspect.getmodule(line_of)).splitlines(), 1)
        if line.endswith(f"# {source}")
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"flash": False}])
@pytest.mark.parametrize("again", [gpt_batch(4, 16), gpt_batch(3, 9), gpt_batch(1, 1)])
def test_gpt_is_equal_to_the_bit_also_for_other_batches_and_lengths(
    options: dict[str, bool], again: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    traced = check_equal(GPT(**options), (), gpt_batch(), again=((), again))
    assert traced.sizes == {"B": 4, "T": 16}
    assert traced.limits == {}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_hugging_face_models_are_equal_to_the_bit(build: Any) -> None:
    torch.manual_seed(0)
    model, batch = build(), causal_batch()
    traced = check_equal(model, (), batch)
    check_equal(model, (), batch, again=((), causal_batch(3, 11)), output_tolerance=1e-6)
    assert list(traced.inputs) == ["input_ids", "labels"]
    assert traced.baked == {("use_cache",): False}
    assert model.config.use_cache is True


@pytest.mark.parametrize("build", [GPT, tiny_llama, pytest.param(tiny_gpt2, marks=pytest.mark.slow)])
def test_a_model_on_the_meta_device_gives_the_same_graph(build: Any) -> None:
    batch = gpt_batch() if build is GPT else causal_batch()
    real = trace(build(), (), batch)
    with torch.device("meta"):
        model = build()
    for tensors in (batch, {name: tensor.to("meta") for name, tensor in batch.items()}):
        ghost = trace(model, (), tensors)
        assert [str(node.target) for node in ghost.graph_module.graph.nodes] == [
            str(node.target) for node in real.graph_module.graph.nodes
        ]
        assert ghost.sizes == real.sizes
        assert all(tensor.device.type == "meta" for tensor in ghost.state.values())


def test_inputs_that_are_one_object_stay_two_inputs() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.left(a) - self.right(b)).square().mean()

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    traced = check_equal(Distance(), (x, x), again=((x, y), {}))
    assert list(traced.inputs) == ["a", "b"]


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class CustomFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Double.apply(x)  # custom function


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branch
            return x
        return -x


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale = x.max().item()  # item
        return x * scale


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x > 0]  # nonzero
        return chosen.sum()


class WrongShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(3, 3)  # wrong shape


@pytest.mark.parametrize(
    ("model", "marker", "reason"),
    [
        (CustomFunction(), "custom function", "torch.library.custom_op"),
        (DataDependent(), "branch", "values of a tensor"),
        (Item(), "item", "values of a tensor"),
        (Nonzero(), "nonzero", "values of a tensor"),
        (WrongShape(), "wrong shape", "RuntimeError"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_users_line(model: nn.Module, marker: str, reason: str) -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(CaptureError, match=reason) as caught:
        trace(model, (torch.randn(4, 8),), {})
    assert f"test_trace.py:{line_of(marker)}  " in str(caught.value)
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert _Double.apply(torch.ones(1)).item() == 2


def test_the_users_model_is_left_as_it_was() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.norm = nn.BatchNorm1d(8)
            self.drop = nn.Dropout(0.5).eval()
            self.head = nn.Linear(8, 8)
            self.head.bias.requires_grad_(False)
            self.cache: list[Tensor] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.lstm(x)
            self.last = out
            self.cache.append(out)
            return self.head(self.drop(self.norm(out[:, -1]))).sum()

    model = Stateful()
    model.head.register_forward_hook(lambda module, args, output: output)
    before = {
        name: (id(tensor), tensor.clone(), tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modes = [module.training for module in model.modules()]
    flat = list(model.lstm._flat_weights)
    hooks = dict(model.head._forward_hooks)
    trace(model, (torch.randn(4, 5, 8),), {})
    with pytest.raises(CaptureError):
        trace(model, (torch.randn(4, 5, 9),), {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert before[name][0] == id(tensor)
        assert torch.equal(before[name][1], tensor)
        assert before[name][2] == tensor.requires_grad
    assert modes == [module.training for module in model.modules()]
    assert all(one is other for one, other in zip(flat, model.lstm._flat_weights, strict=True))
    assert hooks == dict(model.head._forward_hooks)
    assert model.cache == [] and model.last is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_weights_are_one_node_under_the_first_name() -> None:
    model = GPT()
    traced = trace(model, (), gpt_batch())
    nodes = [node for node in traced.graph_module.graph.nodes if is_state(node)]
    tied = [node for node in nodes if node.target == "wte.weight"]
    assert len(tied) == 1 and tied[0].meta["aliases"] == ("head.weight",)
    assert not any(node.target == "head.weight" for node in nodes)
    assert traced.aliases == {"wte.weight": ("head.weight",)}
    assert traced.state["wte.weight"] is model.wte.weight
    assert traced.graph_module.get_parameter("wte.weight") is model.wte.weight
    assert list(traced.state) == [name for name, _ in model.named_parameters()]


class Nested(nn.Module):
    """Nested inputs, a keyword-only tensor, values that are no tensors, and a dict with a loss and a constant for
    output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(
        self, batch: dict[str, Any], *pair: Tensor, scale: float = 1.0, weight: Tensor, mode: str = "a"
    ) -> dict[str, Any]:
        a, b = self.left(batch["x"]), self.right(batch["more"]["y"])
        score = (a * b * weight + pair[0] - pair[1]).sum(-1) * scale
        return {"score": score, "pair": (a, b), "mode": mode, "loss": score.square().mean()}


def nested_call(rows: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch = {"x": torch.randn(rows, 4), "more": {"y": torch.randn(rows, 6)}}
    return (batch, torch.randn(rows, 8), torch.randn(8)), {"weight": torch.randn(8), "scale": 2.0}


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    args, kwargs = nested_call()
    traced = check_equal(Nested(), args, kwargs, again=nested_call(3), output_tolerance=1e-6)
    assert list(traced.inputs) == ["batch_x", "batch_more_y", "pair_0", "pair_1", "weight"]
    assert traced.inputs["batch_more_y"].path == ("batch", "more", "y")
    assert traced.inputs["batch_x"].type == TensorType(torch.float32, (B, 4))
    assert traced.inputs["weight"].type == TensorType(torch.float32, (8,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args, kwargs: (args, {**kwargs, "scale": 3.0}), "scale"),
        (lambda args, kwargs: (args, {**kwargs, "other": 3.0}), "other"),
        (lambda args, kwargs: (args[:2], kwargs), r"pair\[1\]"),
        (lambda args, kwargs: (({**args[0], "z": args[1]}, *args[1:]), kwargs), r"batch\['z'\]"),
        (lambda args, kwargs: (args, {"weight": None}), "weight"),
    ],
)
def test_a_call_of_another_form_is_refused(change: Any, message: str) -> None:
    traced = trace(Nested(), *nested_call())
    args, kwargs = change(*nested_call())
    with pytest.raises(BadArgument, match=message):
        traced.flatten(args, kwargs)


def test_a_call_of_another_shape_is_refused() -> None:
    traced = trace(Nested(), *nested_call())
    tensors = traced.flatten(*nested_call(7))
    assert traced.size_values(tensors) == {"B": 7}
    with pytest.raises(BadArgument, match="dim 1 of batch_x is 5"):
        traced.size_values({**tensors, "batch_x": torch.randn(7, 5)})
    with pytest.raises(BadArgument, match="dim 0 of batch_more_y is 6; 7"):
        traced.size_values({**tensors, "batch_more_y": torch.randn(6, 6)})
    with pytest.raises(BadArgument, match="float64"):
        traced.size_values({**tensors, "batch_x": torch.randn(7, 4, dtype=torch.float64)})


def test_positional_and_keyword_calls_are_the_same_call() -> None:
    batch = gpt_batch()
    traced = trace(GPT(), (), batch)
    assert list(traced.flatten((batch["idx"], batch["targets"]), {})) == ["idx", "targets"]


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_loss_function_joins_the_graph(by_keyword: bool) -> None:
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    batch = gpt_batch()
    args = () if by_keyword else tuple(batch.values())
    kwargs = {"idx": batch["idx"], "labels": batch["targets"]} if by_keyword else {}

    class Scores(GPT):
        def forward(self, idx: Tensor) -> Any:  # type: ignore[override]
            return super().forward(idx)

    traced = check_equal(Scores(), args, kwargs, loss_fn=loss_fn)
    assert list(traced.inputs) == ["idx", "labels"]
    assert traced.output_spec.is_leaf()
    assert any(node.target == "h.0.up.weight" for node in traced.graph_module.graph.nodes)


@pytest.mark.parametrize(
    ("make", "has_loss"),
    [
        (lambda x: x.sum(), True),
        (lambda x: (x.sum(), x), True),
        (lambda x: (x, x.sum()), False),
        (lambda x: {"loss": x.sum(), "x": x}, True),
        (lambda x: {"x": x}, False),
        (lambda x: x, False),
        (lambda x: x.argmax(), False),
    ],
)
def test_which_output_is_the_loss(make: Any, has_loss: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return make(self.linear(x))

    traced = trace(Model(), (torch.randn(2, 4),), {})
    assert (traced.loss is not None) == has_loss
    if traced.loss is not None:
        assert traced.loss.target is torch.ops.aten.sum.default


def test_one_row_does_not_fix_the_batch() -> None:
    traced = check_equal(GPT(), (), gpt_batch(1), again=((), gpt_batch(5)))
    assert traced.sizes == {"B": 1, "T": 16}


def test_two_sequence_lengths_get_two_sizes() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)

        def forward(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            scores = self.embed(target) @ self.embed(source).transpose(1, 2)
            return scores.masked_fill(~mask[:, None], 0).sum()

    def call(rows: int, source: int, target: int) -> tuple[Tensor, ...]:
        return (
            torch.randint(16, (rows, source)),
            torch.randint(16, (rows, target)),
            torch.ones(rows, source, dtype=torch.bool),
        )

    traced = check_equal(Translator(), call(2, 6, 5), again=(call(3, 4, 7), {}))
    assert traced.sizes == {"B": 2, "T": 6, "S1": 5}
    assert traced.inputs["mask"].type.shape == (B, T)


def test_a_model_that_fixes_its_sizes_is_traced_for_these_sizes() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(16, 8), nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.mix(self.embed(ids).transpose(1, 2)).sum()

    traced = check_equal(Fixed(), (torch.randint(16, (2, 6)),), again=((torch.randint(16, (3, 6)),), {}))
    assert traced.sizes == {"B": 2}
    assert traced.inputs["ids"].type.shape == (B, 6)


def test_a_branch_on_a_size_becomes_a_limit() -> None:
    class Branch(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids.float().sum() if ids.shape[1] <= 20 else ids.float().mean()

    traced = trace(Branch(), (torch.randint(16, (2, 6)),), {})
    assert traced.limits == {"T": (1, 20)}
    with pytest.raises(BadArgument, match="T = 21"):
        traced.size_values({"ids": torch.randint(16, (2, 21))})


def test_buffers_and_constants_are_told_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("dropped", torch.ones(4), persistent=False)
            self.plain = torch.arange(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * self.kept + self.dropped * self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()

    model = Model()
    traced = check_equal(model, (torch.randn(2, 4),))
    states = {node.target: node for node in traced.graph_module.graph.nodes if is_state(node)}
    kinds = {name: (node.meta["kind"], node.meta["persistent"]) for name, node in states.items()}
    assert kinds["linear.weight"] == ("parameter", True)
    assert kinds["kept"] == ("buffer", True) and kinds["dropped"] == ("buffer", False)
    assert kinds["constant_0"][0] == kinds["constant_1"][0] == "constant"
    assert set(traced.constants) == {"constant_0", "constant_1"}
    assert any(tensor is model.plain for tensor in traced.constants.values())


def test_an_fx_graph_module_is_just_a_module() -> None:
    model = MLP()
    symbolic = fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(3, 16)
    check_equal(symbolic, (x,), loss_fn=lambda out: out.square().sum())


def test_origins_name_the_users_line() -> None:
    traced = trace(GPT(), (), gpt_batch())
    node = next(node for node in traced.graph_module.graph.nodes if node.name == "linear")
    assert str(node.meta["origin"]).startswith("h.0.attn.qkv  tests/models.py:")
    assert node.meta["origin"].source == "q, k, v = self.qkv(x).split(C, dim=2)"

"""Any legal plan computes what the whole graph computes: random graphs over the op table, random axis sizes, random placements.

Each example is a graph of 3 to 10 calls on parameters, inputs and masks with a scalar loss at its end. The plan is not the solver's: every
parameter gets any placement that some user can take, every call any of its strategies that its arguments can be brought to by a row of
RESHARDS. The localize pass makes the graph of a rank, which runs on threads with real gloo groups, in float64; the loss of every rank
and every parameter's gradient, put together by the meaning of its placement, must be the whole graph's within 1e-9.

Seeds: examples are derived from the test itself (`derandomize=True`, no database), so every run and every machine tries the same 400; a
failure prints the smallest number of calls with which it fails, and its plan. For other examples run with `derandomize=False`.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rank_threads import rank_threads
from torch import Tensor, fx, nn

from passes import contraction_patterns, reshard
from passes import placement as placements_module
from passes.block_cuts import BlockCuts
from passes.ir import TensorType, is_state, is_trainable, tensor_inputs
from passes.localize import localize
from passes.op_rule import OpRule, Strategy
from passes.patterns import call_of, elementwise
from passes.placement import COPIED, PARTIAL, REPLICATE, Placement, Shard, local_shard, whole_tensor
from passes.reshard import RESHARDS, find_reshard
from passes.rules import RULES
from passes.shard import ShardPlan, _binding
from passes.strategies import strategies, zero_padded
from passes.values import depends_on_parameters, is_call, value_of

aten = torch.ops.aten
EXAMPLES, TOLERANCE = 400, 1e-9
SIZES = (2, 4, 6, 12, 24)


class Net:
    """A random graph, with the values of every node."""

    def __init__(self, choose: random.Random, calls: int) -> None:
        self.choose, self.graph = choose, fx.Graph()
        self.generator = torch.Generator().manual_seed(choose.randrange(2**16))
        self.values: dict[fx.Node, Any] = {}
        self.state: list[fx.Node] = []
        shape = tuple(self.size() for _ in range(choose.choice((2, 2, 3, 3, 4))))
        pool = [self.holder(shape)]
        if choose.random() < 0.3:
            pool = [self.call(aten.embedding.default, self.parameter((24, 12)), self.indices(24, (4, 6)))]
        if choose.random() < 0.7:
            pool.append(self.call(aten.mul.Tensor, pool[0], self.parameter(self.shape(pool[0]))))
        for _ in range(40):
            if sum(node.op == "call_function" for node in self.graph.nodes) >= calls:
                break
            found = choose.choice(STEPS)(self, choose.choice(pool[-3:]))
            if found is not None and self.values[found].numel() <= 6000:
                pool.append(found)
        self.loss = self.end([node for node in pool if is_trainable(node)] or [self.parameter((6, 12))])
        self.loss.meta["loss"] = True
        self.graph.output((self.loss,))
        for node in sorted(
            self.graph.nodes, key=lambda n: {"placeholder": 0, "get_attr": 1}.get(n.op, 2), reverse=True
        ):
            if node.op in ("placeholder", "get_attr"):
                self.graph._root.append(node)
        self.graph.lint()
        root = nn.Module()
        for node in self.state:
            root.register_parameter(str(node.target), self.values[node])
        self.module = fx.GraphModule(root, self.graph)

    # ---- what steps are made of

    def size(self) -> int:
        return self.choose.choice(SIZES)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape)

    def dim(self, node: fx.Node) -> int:
        return self.choose.randrange(len(self.shape(node)))

    def _leaf(self, node: fx.Node, value: Tensor, trainable: bool) -> fx.Node:
        self.values[node] = value
        node.meta = {"tensor": TensorType(value.dtype, tuple(value.shape)), "trainable": trainable}
        return node

    def holder(self, shape: tuple[int, ...]) -> fx.Node:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._leaf(self.graph.placeholder(f"x{len(self.values)}"), value, False)

    def flags(self, shape: tuple[int, ...]) -> fx.Node:
        return self._leaf(
            self.graph.placeholder(f"m{len(self.values)}"), torch.rand(shape, generator=self.generator) < 0.3, False
        )

    def indices(self, high: int, shape: tuple[int, ...]) -> fx.Node:
        return self._leaf(
            self.graph.placeholder(f"i{len(self.values)}"),
            torch.randint(0, high, shape, generator=self.generator),
            False,
        )

    def parameter(self, shape: tuple[int, ...]) -> fx.Node:
        value = nn.Parameter(
            torch.randn(shape, generator=self.generator, dtype=torch.float64) * max(shape[-1:] or (1,)) ** -0.5
        )
        node = self._leaf(self.graph.create_node("get_attr", f"w{len(self.values)}"), value, True)
        node.meta["kind"] = "parameter"
        self.state.append(node)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        value = op(*fx.map_arg(args, self.values.__getitem__), **fx.map_arg(kwargs, self.values.__getitem__))
        self.values[node] = value
        if isinstance(value, Tensor):
            node.meta = {"tensor": TensorType(value.dtype, tuple(value.shape)), "trainable": value.requires_grad}
        else:
            node.meta = {
                "tensors": tuple(TensorType(v.dtype, tuple(v.shape)) for v in value), "trainable": any(v.requires_grad for v in value),
            }  # fmt: skip
        return node

    def end(self, pool: list[fx.Node]) -> fx.Node:
        """A scalar that depends on the last values of the pool."""
        x = pool[-1]
        kind = self.choose.choice(("sum", "mean", "mse", "labels", "two"))
        if kind == "labels" and len(self.shape(x)) == 2:
            labels = self.indices(self.shape(x)[1], self.shape(x)[:1])
            return self.call(aten.cross_entropy_loss.default, x, labels)
        if kind == "mse":
            return self.call(aten.mse_loss.default, x, self.holder(self.shape(x)))
        weighed = self.call(aten.mul.Tensor, x, self.holder(self.shape(x)))  # so that every element counts otherwise
        total = self.call(
            aten.sum.default if kind == "sum" else aten.mean.default, self.call(aten.mul.Tensor, weighed, x)
        )
        if kind == "two" and len(pool) > 1:
            total = self.call(aten.add.Tensor, total, self.call(aten.mean.default, self.choose.choice(pool[:-1])))
        return total


Step = Callable[[Net, fx.Node], "fx.Node | None"]
UNARY = tuple(
    getattr(aten, name).default for name in ("gelu", "tanh", "relu", "silu", "sigmoid", "neg", "clone", "cos")
)


def unary(net: Net, x: fx.Node) -> fx.Node:
    return net.call(net.choose.choice(UNARY), x)


def number(net: Net, x: fx.Node) -> fx.Node:
    """With a number: a sum only shows a number added on every rank if it is a partial one."""
    if net.choose.random() < 0.4:
        x = net.call(aten.linear.default, x, net.parameter((12, net.shape(x)[-1])))
    op = net.choose.choice((aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.rsub.Scalar))
    return net.call(op, x, 1.5)


def binary(net: Net, x: fx.Node) -> fx.Node:
    """With a parameter, an input, an earlier value or itself; broadcast from the right or along a dim."""
    shape, op = (
        net.shape(x),
        net.choose.choice((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default)),
    )
    if net.choose.random() < 0.4:
        others = [
            n for n, v in net.values.items() if isinstance(v, Tensor) and v.is_floating_point() and v.shape == shape
        ]
        return net.call(op, x, net.choose.choice(others))
    other = net.choose.choice((shape, shape[1:], shape[-1:], (*shape[:-1], 1), (1,) * (len(shape) > 1) + shape[1:], ()))
    other_node = net.parameter(other) if net.choose.random() < 0.8 else net.holder(other)
    return net.call(op, *((x, other_node) if net.choose.random() < 0.7 else (other_node, x)))


def masked(net: Net, x: fx.Node) -> fx.Node:
    flags = net.flags(net.choose.choice((net.shape(x), net.shape(x)[-1:])))
    if net.choose.random() < 0.5:
        return net.call(aten.masked_fill.Scalar, x, flags, 0.5)
    return net.call(aten.where.self, flags, x, net.parameter(net.shape(x)[-1:]))


def linear(net: Net, x: fx.Node) -> fx.Node:
    size = net.choose.choice((6, 12, 24))
    weight = net.parameter((size, net.shape(x)[-1]))
    return net.call(aten.linear.default, x, weight, *([net.parameter((size,))] if net.choose.random() < 0.3 else []))


def mlp(net: Net, x: fx.Node) -> fx.Node:
    hidden = net.call(aten.gelu.default, net.call(aten.linear.default, x, net.parameter((24, net.shape(x)[-1]))))
    return net.call(aten.linear.default, hidden, net.parameter((net.shape(x)[-1], 24)))


def matmul(net: Net, x: fx.Node) -> fx.Node | None:
    shape = net.shape(x)
    if len(shape) == 2 and net.choose.random() < 0.5:
        if net.choose.random() < 0.3:
            return net.call(aten.addmm.default, net.parameter((12,)), x, net.parameter((shape[1], 12)))
        return net.call(aten.mm.default, x, net.parameter((shape[1], 12)))
    if len(shape) < 3:
        return net.call(aten.matmul.default, x, net.parameter((shape[-1], 6)))
    if len(shape) == 3 and net.choose.random() < 0.4:
        return net.call(aten.einsum.default, "abc,dc->adb", [x, net.parameter((12, shape[2]))])
    turned = net.call(aten.transpose.int, x, -1, -2)
    return net.call(aten.matmul.default, *((x, turned) if net.choose.random() < 0.5 else (turned, x)))


def attention(net: Net, x: fx.Node) -> fx.Node | None:
    shape = net.shape(x)
    if len(shape) != 4:
        return None
    groups = net.choose.choice([g for g in (1, 2, 4, 6, 12, 24) if shape[1] % g == 0])
    k, v = (net.parameter((shape[0], groups, shape[2], shape[3])) for _ in "kv")
    return net.call(
        aten.scaled_dot_product_attention.default,
        x,
        k,
        v,
        None,
        0.0,
        net.choose.random() < 0.5,
        enable_gqa=groups != shape[1],
    )


def view(net: Net, x: fx.Node) -> fx.Node | None:
    shape, dim = net.shape(x), net.dim(x)
    if net.choose.random() < 0.5 and len(shape) > 1 and dim + 1 < len(shape):
        return net.call(aten.reshape.default, x, [*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]])
    parts = [k for k in (2, 3, 4, 6, 12) if shape[dim] % k == 0 and shape[dim] > k]
    if not parts or len(shape) > 3:
        return None
    k = net.choose.choice(parts)
    return net.call(aten.reshape.default, x, [*shape[:dim], k, shape[dim] // k, *shape[dim + 1 :]])


def turn(net: Net, x: fx.Node) -> fx.Node:
    if net.choose.random() < 0.5:
        return net.call(aten.transpose.int, x, net.dim(x), net.dim(x))
    dims = list(range(len(net.shape(x))))
    net.choose.shuffle(dims)
    return net.call(aten.permute.default, x, dims)


def ones(net: Net, x: fx.Node) -> fx.Node:
    """A dim of size 1 comes, is expanded, and perhaps stays."""
    shape, dim = net.shape(x), net.dim(x)
    wider = net.call(aten.unsqueeze.default, x, dim)
    if net.choose.random() < 0.5:
        return net.call(aten.squeeze.dim, wider, dim)
    return net.call(aten.expand.default, wider, [*shape[:dim], 2, *shape[dim:]])


def pieces(net: Net, x: fx.Node) -> fx.Node | None:
    """The parts of a fused dim, equal ones or not, put together in some way."""
    dim = net.dim(x)
    size = net.shape(x)[dim]
    if size < 6:
        return None
    sizes = net.choose.choice(([size // 2, size // 2], [size // 3] * 3, [size - size // 3, size // 3]))
    split = net.call(aten.split_with_sizes.default, x, sizes, dim)
    parts = [net.call(operator.getitem, split, k) for k in range(len(sizes))]
    if net.choose.random() < 0.5:
        net.choose.shuffle(parts)
        return net.call(aten.cat.default, parts, dim)
    return (
        net.call(aten.mul.Tensor, parts[0], parts[1])
        if sizes[0] == sizes[1]
        else parts[net.choose.randrange(len(parts))]
    )


def joined(net: Net, x: fx.Node) -> fx.Node:
    other = net.parameter(net.shape(x))
    return net.call(net.choose.choice((aten.cat.default, aten.stack.default)), [x, other], net.dim(x))


def cutout(net: Net, x: fx.Node) -> fx.Node | None:
    dim = net.dim(x)
    size, kind = net.shape(x)[dim], net.choose.randrange(6)
    if kind == 0:
        return net.call(aten.slice.Tensor, x, dim, 0, max(1, size // 2))
    if kind == 1 and len(net.shape(x)) > 1:
        return net.call(aten.select.int, x, dim, size - 1)
    if kind == 2:
        return net.call(aten.index_select.default, x, dim, net.indices(size, (6,)))
    if kind == 3:
        return net.call(aten.flip.default, x, [dim])
    if kind == 4:
        return net.call(aten.roll.default, x, [1], [dim])
    return net.call(aten.pad.default, x, [1, 2])


def along(net: Net, x: fx.Node) -> fx.Node:
    op = net.choose.choice((aten.softmax.int, aten.log_softmax.int, aten.cumsum.default))
    return net.call(op, x, net.dim(x))


def norm(net: Net, x: fx.Node) -> fx.Node:
    size = net.shape(x)[-1]
    if net.choose.random() < 0.5:
        return net.call(aten.layer_norm.default, x, [size], net.parameter((size,)), net.parameter((size,)))
    return net.call(aten.rms_norm.default, x, [size], net.parameter((size,)), 1e-5)


def reduction(net: Net, x: fx.Node) -> fx.Node | None:
    if len(net.shape(x)) < 2:
        return None
    op = net.choose.choice((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.logsumexp.default))
    return net.call(op, x, [net.dim(x)], net.choose.random() < 0.5)


def convolution(net: Net, x: fx.Node) -> fx.Node | None:
    shape = net.shape(x)
    if len(shape) != 3 or shape[1] > 12:
        return None
    bias = [net.parameter((12,))] if net.choose.random() < 0.5 else [None]
    return net.call(aten.conv1d.default, x, net.parameter((12, shape[1], 3)), *bias, [1], [1])


STEPS: tuple[Step, ...] = (
    unary, unary, number, number, binary, binary, binary, masked, linear, linear, mlp, matmul, matmul, attention, view, view, view, turn,
    ones, pieces, pieces, joined, cutout, cutout, along, along, norm, reduction, convolution,
)  # fmt: skip


# ---- any legal plan ---------------------------------------------------------------------------------------------------


def reachable(have: Placement, want: Placement, trainable: bool) -> bool:
    whole = (REPLICATE, COPIED)
    return have == want or (not trainable and have in whole and want in whole) or find_reshard(have, want) is not None


def random_plan(net: Net, axis_size: int, choose: random.Random) -> ShardPlan:
    """Any placement for each parameter, any strategy for each call, as long as one leads to the other."""
    nodes = {node: call_of(node) for node in net.graph.nodes if is_call(node)}
    parametric = depends_on_parameters(net.graph)
    bindings = {
        node: bound for node, call in nodes.items() if node in parametric and (bound := _binding(call)) is not None
    }
    cuts, zeros = BlockCuts(bindings, axis_size), zero_padded(net.graph)
    options: dict[fx.Node, list[Strategy]] = {}
    wanted: dict[fx.Node, set[Placement]] = {}
    for node, call in nodes.items():
        options[node] = [Strategy((REPLICATE,) * len(call.inputs), (REPLICATE,) * len(call.outputs))]
        if node in parametric:
            options[node] = strategies(
                RULES[node.target] if node in bindings else None, call, axis_size=axis_size,
                differentiable=tuple(is_trainable(arg) for arg in tensor_inputs(node)), result_differentiable=is_trainable(node),
                cuts=cuts.for_call(node), splittable=lambda size: True,
                zeros=tuple(arg in zeros for arg in tensor_inputs(node)),
            )  # fmt: skip
        for strategy in options[node]:
            for arg, placement in zip(tensor_inputs(node), strategy.inputs, strict=True):
                wanted.setdefault(arg, set()).add(placement)
    placements: dict[Any, Placement] = {}
    for node in net.state:
        shards = [placement for placement in sorted(wanted.get(node, ()), key=repr) if isinstance(placement, Shard)]
        placements[node, 0] = choose.choice([REPLICATE, COPIED, *shards, *shards])
    chosen: dict[fx.Node, Strategy] = {}
    for node in nodes:
        have = [(placements.get(value_of(arg), REPLICATE), is_trainable(arg)) for arg in tensor_inputs(node)]
        legal = [s for s in options[node] if all(reachable(h, w, t) for (h, t), w in zip(have, s.inputs, strict=True))]
        # sums passed on and split work are rare among all
        passing = [s for s in legal if PARTIAL in s.inputs]
        split = [s for s in legal if s.is_split]
        chance = choose.random()
        chosen[node] = choose.choice(
            passing if passing and chance < 0.5 else split if split and chance < 0.85 else legal
        )
        placements |= {(node, k): placement for k, placement in enumerate(chosen[node].outputs)}
    return ShardPlan("tp", axis_size, chosen, placements, 0.0)


# ---- run and compare --------------------------------------------------------------------------------------------------


def run_rank(net: Net, plan: ShardPlan, graph: fx.Graph, axis: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One rank: its loss, and the gradient of its piece of each parameter."""
    whole = {node.name: net.values[node].detach() for node in net.graph.nodes if node.op == "placeholder"}
    local: dict[str, Tensor] = {}
    for node in net.state:
        piece = local_shard(net.values[node].detach(), plan.placement(node), axis_size=axis.size, coord=axis.coord)
        local[str(node.target)] = piece.clone().requires_grad_()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = whole[node.name]
        elif node.op == "get_attr":
            values[node] = local[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*(axis if arg == "tp" else arg for arg in args), **kwargs)
        else:
            loss = values[node.args[0][0]]
    loss.backward()
    return loss.detach(), {
        name: tensor.grad if tensor.grad is not None else torch.zeros_like(tensor) for name, tensor in local.items()
    }


def check(choose: random.Random, calls: int, axis_size: int, seen: Counter[str]) -> None:
    """One example. AssertionError if the ranks do not compute what the whole graph does."""
    net = Net(choose, calls)
    plan = random_plan(net, axis_size, choose)
    local = localize(net.module, plan).graph
    for parameter in net.state:
        net.values[parameter].grad = None
    expected = net.values[net.loss]
    expected.backward()
    try:
        ranks = rank_threads(axis_size).run(lambda axis: run_rank(net, plan, local, axis))
    except (RuntimeError, IndexError, ValueError) as error:
        raise AssertionError(f"fails on a rank: {error}\n{describe(net, plan)}") from error
    for loss, _ in ranks:
        assert abs(loss - expected) <= TOLERANCE * max(1.0, abs(expected)), (
            f"loss {loss}, not {expected}\n{describe(net, plan)}"
        )
    for parameter in net.state:
        name, gradient, placement = str(parameter.target), net.values[parameter].grad, plan.placement(parameter)
        gradient = torch.zeros_like(net.values[parameter]) if gradient is None else gradient
        found = [gradients[name] for _, gradients in ranks]
        together = (
            found if placement == REPLICATE else [whole_tensor(found, PARTIAL if placement == COPIED else placement)]
        )
        for one in together:
            difference = (one - gradient).abs().max().item()
            scale = max(1.0, gradient.abs().max().item())
            assert difference <= TOLERANCE * scale, f"gradient of {name} is off by {difference}\n{describe(net, plan)}"
    seen["examples"] += 1
    seen["split"] += any(strategy.is_split for strategy in plan.strategies.values())
    seen[f"ranks {axis_size}"] += 1
    for node in local.nodes:
        if node.op == "call_function":
            seen[node.meta["reshard"].function.__name__ if node.meta.get("reshard") else str(node.target)] += 1
            seen["padded"] += bool(node.meta.get("padded"))
            if node.meta.get("reshard"):
                row = node.meta["reshard"]
                seen[f"{row.have.__name__} -> {row.want.__name__}"] += 1


def describe(net: Net, plan: ShardPlan) -> str:
    lines = [f"{plan.axis_size} ranks"]
    for node in net.graph.nodes:
        if node in plan.strategies:
            strategy = plan.strategies[node]
            call = f"{node.name} = {node.target}{node.args} {node.kwargs or ''}"
            lines.append(f"{call}: {strategy.inputs} -> {strategy.outputs}")
        elif is_state(node):
            lines.append(f"{node.name} {net.shape(node)}: {plan.placement(node)}")
    return "\n".join(lines)


def property_holds(examples: int, *, shrink: bool = True) -> Counter[str]:
    """Try the property; how often each op, reshard and axis size came up."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32), st.integers(2, 8), st.integers(2, 4))
    def sharded_equals_whole(seed: int, calls: int, axis_size: int) -> None:
        check(random.Random(seed), calls, axis_size, seen)

    sharded_equals_whole()
    return seen


def test_any_legal_plan_equals_the_whole_graph() -> None:
    seen = property_holds(EXAMPLES)
    assert seen["examples"] >= 300, seen
    assert seen["split"] >= 0.9 * seen["examples"]
    assert min(seen[f"ranks {size}"] for size in (2, 3, 4)) >= 50
    rows = [f"{row.have.__name__} -> {row.want.__name__}" for row in RESHARDS]
    assert [row for row in rows if not seen[row]] == []
    assert sum(name.startswith("aten.") for name in seen) >= 45
    assert seen["padded"] >= 50, "parameters that the axis does not divide"


def _forgotten(ctx: Any, *grads: Tensor) -> Any:
    return grads[0], None


BROKEN: dict[str, tuple[OpRule, Step]] = {
    "softmax along a split dim": (OpRule(aten.softmax.int, elementwise), along),
    "layer norm of a part of a row": (OpRule(aten.layer_norm.default, "... n, n, n -> ... n"), norm),
    "gelu of partial sums": (OpRule(aten.gelu.default, elementwise, linear="sum"), mlp),
    "a bias added on every rank": (OpRule(aten.linear.default, contraction_patterns.linear, linear="each"), linear),
    "a number added on every rank": (OpRule(aten.add.Tensor, elementwise, linear="sum"), number),
    "a product of two partial sums": (OpRule(aten.mul.Tensor, elementwise, linear="sum"), binary),
    "a flip along a split dim": (OpRule(aten.flip.default, elementwise, linear="sum"), cutout),
    "local sizes forgotten": (replace(RULES[aten.expand.default], sizes=None), ones),
}


@pytest.mark.parametrize(
    "name",  # a graph with the product is found late
    [pytest.param(name, marks=pytest.mark.slow if name == "a product of two partial sums" else ()) for name in BROKEN],
)
def test_a_broken_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs that are mostly of the step with the broken op, and without the break not."""
    rule, step = BROKEN[name]
    monkeypatch.setitem(globals(), "STEPS", (step, step, step, linear, binary))
    property_holds(30)
    monkeypatch.setitem(RULES, rule.op, rule)
    with pytest.raises(AssertionError):
        property_holds(EXAMPLES, shrink=False)


def test_padding_that_is_not_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(part: Tensor, count: int, dim: int) -> Tensor:
        return torch.nn.functional.pad(part, [0, 0] * (part.ndim - 1 - dim) + [0, count], value=1.0)

    monkeypatch.setattr(placements_module, "_with_zeros", ones)
    with pytest.raises(AssertionError):
        property_holds(EXAMPLES, shrink=False)


@pytest.mark.parametrize("function", ["_CopyTo", "_OwnGradient"])
def test_a_gradient_that_is_not_summed_right_is_found(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getattr(reshard, function), "backward", staticmethod(_forgotten))
    with pytest.raises(AssertionError):
        property_holds(EXAMPLES, shrink=False)

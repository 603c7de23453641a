"""The loss pass: makes the losses of microbatches add up to the loss of the whole batch, whatever the microbatches hold.

A mean over the batch is not the mean of the microbatches' means when they hold different numbers of rows or of ignored labels. The
pass walks from the loss back through what is linear (sums, scalings, casts, views) to its terms and finds for each how it averages:

- a mean over labels that are not ignored weighs by their number (by the sum of their class weights, if there are any),
- a mean over elements weighs by the rows of the microbatch,
- a sum divided by something that depends on the inputs alone, such as a mask's sum, weighs by that divisor,
- a sum already adds up.

Each averaging term is multiplied by its `loss_share`, the microbatch's weight over the batch's, an input that the runtime fills in from
the program's `loss_weights` function before the first forward. With one microbatch the share is 1 and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from passes.ir import TensorType, origin, size_expr, tensor_type
from passes.rows import where_rows_meet
from passes.shard import computed_once

aten = torch.ops.aten

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
_PASS_THROUGH = _CASTS | {
    aten.neg.default, aten.view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default,
    aten.clone.default, aten.alias.default, aten.contiguous.default,
}  # fmt: skip
_ADDITIONS = {aten.add.Tensor, aten.sub.Tensor}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_LABELLED = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default}
_REDUCED = {
    aten.mse_loss.default: 2, aten.l1_loss.default: 2, aten.smooth_l1_loss.default: 2, aten.huber_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3, aten.binary_cross_entropy_with_logits.default: 4, aten.kl_div.default: 2,
}  # fmt: skip

MakeWeight = Callable[
    [fx.Graph, Mapping[fx.Node, fx.Node]], fx.Node
]  # in the graph of weights, given its copies of the model's nodes


@dataclass(frozen=True)
class WeightedLoss:
    """The graph whose loss terms are multiplied by their shares, and the graph that computes their weights (None: all terms are sums)."""

    module: fx.GraphModule
    weights: fx.GraphModule | None
    num_shares: int
    notes: tuple[str, ...] = field(default=())
    meeting: tuple[str, ...] = field(
        default=()
    )  # where rows of the batch meet before the loss adds them up: more than one microbatch is inexact


@dataclass
class _Term:
    node: fx.Node
    weight: MakeWeight


def weigh_loss(module: fx.GraphModule, loss: fx.Node | None) -> WeightedLoss:
    """Multiply each averaging term of `loss` by a new input `loss_share_k`; meta["loss"] marks the loss.

    The given module is not touched.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(module.graph, copies)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    graph.output(returned)
    copied = fx.GraphModule(module, graph)
    if loss is None:
        return WeightedLoss(copied, None, 0)
    walk = _Walk(graph)
    walk.visit(copies[loss])
    copies[loss].meta["loss"] = True
    meeting = dict.fromkeys(str(origin(node)) or str(node.target) for node in where_rows_meet(walk.ends, walk.weighed))
    shares = [_insert_share(graph, term.node, index) for index, term in enumerate(walk.terms)]
    _retype(graph, set(shares))
    if any(term.node is copies[loss] for term in walk.terms):
        copies[loss].meta.pop("loss")
        shares[[term.node for term in walk.terms].index(copies[loss])].meta["loss"] = True
    weights = _weights_module(copied, walk.terms) if walk.terms else None
    graph.lint()
    copied.recompile()
    return WeightedLoss(copied, weights, len(shares), tuple(walk.notes), tuple(meeting))


def every_term_weighed(loss: fx.Node) -> bool:
    """True if each term of a loss that `weigh_loss` gave is multiplied by a share: none is a sum over the batch."""
    if any(isinstance(arg, fx.Node) and "loss_share" in arg.meta for arg in loss.args):
        return True
    inner = [arg for arg in loss.args if isinstance(arg, fx.Node) and arg.meta.get("trainable")]
    linear = loss.target in _PASS_THROUGH | _ADDITIONS | _SCALINGS
    return linear and bool(inner) and all(map(every_term_weighed, inner))


def _insert_share(graph: fx.Graph, term: fx.Node, index: int) -> fx.Node:
    kind = tensor_type(term)
    assert kind is not None
    first = next(node for node in graph.nodes if node.op != "placeholder" or size_expr(node) is not None)
    with graph.inserting_before(first):
        share = graph.placeholder(f"loss_share_{index}")
    share.meta = {"tensor": TensorType(torch.float32, ()), "trainable": False, "loss_share": index}
    with graph.inserting_after(term):
        scaled = graph.call_function(aten.mul.Tensor, (term, share))
    scaled.meta = {"tensor": kind, "trainable": term.meta.get("trainable", False), "origin": origin(term)}
    term.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    return scaled


def _retype(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """The dtypes of weighed terms and of what adds them up: a share is f32, so bf16 scalars become f32 until a cast."""
    for node in graph.nodes:
        if node not in changed and (node.target in _CASTS or changed.isdisjoint(node.all_input_nodes)):
            continue
        kind = tensor_type(node)
        kinds = [arg for arg in map(tensor_type, node.all_input_nodes) if arg is not None]
        if kind is None or not kind.is_floating or any(arg.shape for arg in kinds):
            continue  # scalars do not change the dtype of what has dims
        dtype = reduce(torch.promote_types, (arg.dtype for arg in kinds))
        if dtype != kind.dtype:
            node.meta["tensor"] = TensorType(dtype, kind.shape)
            changed.add(node)


class _Walk:
    """From the loss to its terms."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parametric = computed_once(graph)
        self.terms: list[_Term] = []
        self.notes: list[str] = []
        self.weighed: set[fx.Node] = set()  # from the loss to what its terms add up or average
        self.ends: list[fx.Node] = []  # what the terms are computed from, without what they are divided by
        self.data: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" or any(n in self.data for n in node.all_input_nodes):
                self.data.add(node)

    def visit(self, node: fx.Node) -> None:
        self.weighed.add(node)
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.target in _PASS_THROUGH and not self._reshapes_rows(node):
            return self.visit(tensors[0])
        scalars = [kind for kind in map(tensor_type, tensors) if kind is not None and kind.shape == ()]
        if node.target in _ADDITIONS and len(tensors) == len(scalars) == 2:
            for tensor in tensors:
                self.visit(tensor)
            return None
        if node.target in _SCALINGS:
            parametric = [t for t in tensors if t in self.parametric]
            rest = [t for t in tensors if t not in self.parametric]
            if len(parametric) == 1 and not any(t in self.data for t in rest):
                return self.visit(parametric[0])
            divides = (
                node.target in (aten.div.Tensor, aten.div.Scalar) and parametric == [node.args[0]] and len(rest) == 1
            )
            if divides and self._adds_up(parametric[0]):
                self.terms.append(_Term(node, lambda graph, copies, divisor=rest[0]: copies[divisor]))  # type: ignore[misc]
                return None
        if self._adds_up(node):
            return None
        self.ends.append(node)
        self.terms.append(_Term(node, self._weight(node)))
        return None

    @staticmethod
    def _reshapes_rows(node: fx.Node) -> bool:
        kind = tensor_type(node)
        return kind is None or any(size != 1 for size in kind.shape)

    def _adds_up(self, node: fx.Node) -> bool:
        """True if the term's sum over microbatches is the batch's term."""
        found = self._is_sum(node)
        if found:
            self.weighed.add(node)
            self.ends.append(node)
        return found

    def _is_sum(self, node: fx.Node) -> bool:
        if node.target in _PASS_THROUGH and isinstance(node.args[0], fx.Node) and not self._reshapes_rows(node):
            return self._adds_up(node.args[0])
        if node.target in _SCALINGS:
            tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
            inside = [t for t in tensors if t in self.parametric]
            return (
                len(inside) == 1
                and not any(t in self.data for t in tensors if t is not inside[0])
                and self._adds_up(inside[0])
            )
        if node.target in _SUMS:
            return node in self.data
        if node.target in _LABELLED:
            return _argument(node, 3, "reduction", 1) == 2
        if node.target in _REDUCED:
            return _argument(node, _REDUCED[node.target], "reduction", 1) == 2
        return False

    def _weight(self, node: fx.Node) -> MakeWeight:
        if node.target in _LABELLED:
            target = node.args[1]
            assert isinstance(target, fx.Node)
            kind = tensor_type(target)
            if target not in self.parametric and kind is not None and not kind.is_floating:
                return lambda graph, copies: _count_labels(graph, copies[node], copies[target])
            if target in self.parametric:
                self.notes.append(
                    f"{origin(node)}: the labels depend on parameters or random numbers; the term is averaged by rows"
                )
        elif node.target not in _REDUCED and node.target not in (aten.mean.default, aten.mean.dim):
            self.weighed.discard(node)
            self.notes.append(
                f"{origin(node) or node.target}: not known to be a sum or a mean over the batch; microbatches are averaged by rows"
            )
        return lambda graph, copies: _rows(graph)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kind: TensorType, like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {"tensor": kind, "trainable": False, "origin": origin(like)}
    return node


def _count_labels(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """The number of labels that are not ignored, or the sum of their class weights."""
    kind = tensor_type(target)
    assert kind is not None
    ignore_index = _argument(node, 4, "ignore_index", -100)
    counted = _call(graph, aten.ne.Scalar, (target, ignore_index), TensorType(torch.bool, kind.shape), node)
    weight = _argument(node, 2, "weight", None)
    if isinstance(weight, fx.Node):
        weight_kind = tensor_type(weight)
        assert weight_kind is not None
        known = _call(graph, aten.mul.Tensor, (target, counted), kind, node)
        looked_up = _call(graph, aten.index.Tensor, (weight, [known]), TensorType(weight_kind.dtype, kind.shape), node)
        counted = _call(graph, aten.mul.Tensor, (looked_up, counted), TensorType(weight_kind.dtype, kind.shape), node)
    dtype = tensor_type(counted).dtype  # type: ignore[union-attr]
    return _call(
        graph, aten.sum.default, (counted,), TensorType(torch.int64 if dtype == torch.bool else dtype, ()), node
    )


def _rows(graph: fx.Graph) -> fx.Node:
    """The number of rows of a microbatch; 1 if the batch is not symbolic (all microbatches have the same rows)."""
    for node in graph.nodes:
        if node.op == "placeholder" and size_expr(node) is not None and node.name == "B":
            return node
    one = graph.call_function(int, (1,))
    one.meta = {"size": sympy.Integer(1)}
    return one


def _weights_module(module: fx.GraphModule, terms: list[_Term]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    graph.output(tuple(term.weight(graph, copies) for term in terms))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))  # updates of buffers go
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(module, graph)

"""The loss pass: makes the losses of microbatches add up to the loss of the whole batch, whatever the microbatches hold.

A mean over the batch is not the mean of the microbatches' means when they hold different numbers of rows or of ignored labels. The
pass walks from the loss back through what is linear (additions, scalings by what no input changes, casts; of values without rows also
views, stacks, sums and means) to its terms and finds for each how it averages:

- a mean over labels that are not ignored weighs by their number (by the sum of their class weights, if there are any),
- a mean over elements weighs by the rows of the microbatch,
- a sum divided by (or times) a function of a sum over the inputs alone, such as a mask's sum (at least 1, say), is divided by that
  function of the whole batch's sum, and then adds up,
- a sum already adds up.

Each averaging term is multiplied by its `loss_share`, the microbatch's weight over the batch's, an input that the runtime fills in from
the program's `loss_weights` function before the first forward; a divisor's sum is replaced by its `loss_total`, the sum of the weights.
With one microbatch the share is 1, the total the sum itself, and neither changes a bit. A microbatch in which every label is ignored
has the mean 0 / 0: it is replaced by 0 where its share is 0. (A batch of such microbatches alone has shares of 0 / 0, and its loss is
nan, as it is on one device.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from passes.ir import Size, TensorType, origin, size_expr, tensor_type
from passes.rows import ROWS, where_rows_meet
from passes.values import computed_once

aten = torch.ops.aten

# inputs of stages: a term's part of the batch's loss, the batch's sum for a divisor
SHARE, TOTAL = "loss_share", "loss_total"

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
_PASS_THROUGH = _CASTS | {
    aten.neg.default, aten.view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default,
    aten.clone.default, aten.alias.default, aten.contiguous.default,
}  # fmt: skip
_ADDITIONS = {aten.add.Tensor, aten.sub.Tensor}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_MEANS = {aten.mean.default, aten.mean.dim}
_JOINS = {aten.stack.default, aten.cat.default}
_CONTRACTIONS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default, aten.dot.default}
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
    can_be_empty: bool = False  # its weight can be 0, and its value is then 0 / 0
    total: fx.Node | None = None  # of a factor: what the whole batch's sum takes the place of; there is no share then
    factor: fx.Node | None = None  # the divisor or factor of `node` that is a function of `total`


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
    if loss is None:
        return WeightedLoss(fx.GraphModule(module, graph), None, 0)
    walk = _Walk(graph)
    walk.visit(copies[loss])
    copies[loss].meta["loss"] = True
    meeting = dict.fromkeys(str(origin(node)) or str(node.target) for node in where_rows_meet(walk.ends, walk.weighed))
    # before a total takes the place of what it weighs
    weights = _weights_module(module, graph, walk.terms) if walk.terms else None
    shares: dict[fx.Node, fx.Node] = {}
    for index, term in enumerate(walk.terms):
        if term.total is not None:
            _insert_total(graph, term, index)
        else:
            shares[term.node] = _insert_share(graph, term, index, walk.linear)
    _retype(graph, set(shares.values()))
    if copies[loss] in shares:
        copies[loss].meta.pop("loss")
        shares[copies[loss]].meta["loss"] = True
    graph.lint()
    return WeightedLoss(fx.GraphModule(module, graph), weights, len(walk.terms), tuple(walk.notes), tuple(meeting))


def every_term_weighed(loss: fx.Node) -> bool:
    """True if each term of a loss that `weigh_loss` gave is multiplied by a share: none is a sum over the batch."""
    if any(isinstance(arg, fx.Node) and "loss_share" in arg.meta for arg in loss.args):
        return True
    inner = [arg for arg in loss.all_input_nodes if arg.meta.get("trainable")]
    linear = loss.target in _PASS_THROUGH | _ADDITIONS | _SCALINGS | _SUMS | _MEANS | _JOINS
    return linear and bool(inner) and all(map(every_term_weighed, inner))


def _insert_input(graph: fx.Graph, name: str, index: int, dtype: torch.dtype) -> fx.Node:
    first = next(node for node in graph.nodes if node.op != "placeholder" or size_expr(node) is not None)
    with graph.inserting_before(first):
        node = graph.placeholder(f"{name}_{index}")
    node.meta = {"tensor": TensorType(dtype, ()), "trainable": False, "loss_share": index}
    return node


def _insert_share(graph: fx.Graph, weighed: _Term, index: int, linear: set[fx.Node]) -> fx.Node:
    """Multiply a term by its share where it is added up: for its users in `linear`, or where it is the loss that is returned."""
    term = weighed.node
    kind = tensor_type(term)
    assert kind is not None
    share = _insert_input(graph, SHARE, index, torch.float64 if kind.dtype == torch.float64 else torch.float32)
    trainable = term.meta.get("trainable", False)
    value = term
    users = [user for user in term.users if user in linear or (user.op == "output" and term.meta.get("loss"))]
    with graph.inserting_before(term.next):
        if weighed.can_be_empty:
            empty = _call(graph, aten.eq.Scalar, (share, 0), TensorType(torch.bool, ()), term)
            value = _call(graph, aten.masked_fill.Scalar, (term, empty, 0), kind, term)
            value.meta["trainable"] = trainable
        scaled = _call(graph, aten.mul.Tensor, (value, share), kind, term)
    scaled.meta["trainable"] = trainable
    for user in users:
        user.replace_input_with(term, scaled)
    return scaled


def _insert_total(graph: fx.Graph, term: _Term, index: int) -> None:
    """Divide `term` by the function of the whole batch's sum that it divides the microbatch's by; or multiply, as it does."""
    summed, factor = term.total, term.factor
    assert summed is not None and factor is not None
    kind = tensor_type(summed)
    assert kind is not None
    chain = [factor]
    while chain[-1] is not summed:
        chain.append(next(arg for arg in chain[-1].all_input_nodes if tensor_type(arg) is not None))
    copies = {summed: _insert_input(graph, TOTAL, index, kind.dtype)}
    with graph.inserting_before(term.node):
        for node in reversed(chain[:-1]):
            copies[node] = graph.node_copy(node, lambda arg: copies.get(arg, arg))
            copies[node].meta = dict(node.meta)
    term.node.replace_input_with(factor, copies[factor])
    for node in chain:
        if not node.users:
            graph.erase_node(node)


def _retype(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """The dtypes of weighed terms and of what adds them up: a share is f32 (f64 of an f64 term), so bf16 scalars are f32 until a cast."""
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
        self.linear: set[fx.Node] = set()  # what was visited
        self.weighed: set[fx.Node] = set()  # from the loss to what its terms add up or average
        self.ends: list[fx.Node] = []  # what the terms are computed from, without what they are divided by
        self.data: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" or any(n in self.data for n in node.all_input_nodes):
                self.data.add(node)
        self.rows_known = any(_has_rows(node) for node in graph.nodes if node.op == "placeholder")

    def visit(self, node: fx.Node, shared: bool = False) -> None:
        """Find the terms of `node`, which has no rows. `shared`: it is part of one that all averages by rows."""
        self.linear.add(node)
        self.weighed.add(node)
        if node not in self.data:  # the same in every microbatch: the shares of rows add up to 1
            if not shared:
                self.terms.append(_Term(node, lambda graph, copies: _rows(graph)))
            return None
        linear = self._linear_in(node)
        if linear:
            together = not shared and len(linear) > 1 and self._averages_by_rows(node)
            if together:
                self.terms.append(_Term(node, lambda graph, copies: _rows(graph)))
            for each in linear:
                if each not in self.linear:
                    self.visit(each, shared or together)
            return None
        if node.target in _SCALINGS and self._scaled_by_a_total(node):
            return None
        if self._adds_up(node):
            return None
        self.ends.append(node)
        counted = node.target in _LABELLED and _argument(node, 1, "target", None) not in self.parametric
        weight = self._weight(node)
        if not shared:
            self.terms.append(_Term(node, weight, can_be_empty=counted))
        return None

    def _averages_by_rows(self, node: fx.Node) -> bool:
        """True if all terms of `node` weigh by rows and are of nothing else, so that one share will do."""
        if node not in self.data:
            return True
        linear = self._linear_in(node)
        if linear:
            return all(len(each.users) == 1 and self._averages_by_rows(each) for each in linear)
        return node.target not in _SCALINGS | _LABELLED and not self._sums(node)

    def _linear_in(self, node: fx.Node) -> list[fx.Node]:
        """The values without rows whose terms are those of `node`, each times what no input changes; [] if there are none such."""
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.target in _PASS_THROUGH or (node.target in _SUMS | _MEANS and self.rows_known):
            found = tensors[:1]
        elif node.target in _ADDITIONS:
            found = tensors if len(tensors) == 2 else []
        elif node.target in _JOINS:
            found = [each for each in node.all_input_nodes if tensor_type(each) is not None]
        elif node.target in _SCALINGS:
            found = [each for each in tensors if each in self.data]
            if len(found) != 1 or (node.target in _DIVISIONS and found != [node.args[0]]):
                return []
        else:
            return []
        return found if all(map(self._without_rows, found)) else []

    def _scaled_by_a_total(self, node: fx.Node) -> bool:
        """True if it is a term: a sum divided by, or times, a function of the inputs alone that is of the whole batch."""
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        parametric = [each for each in tensors if each in self.parametric]
        rest = [each for each in tensors if each not in self.parametric]
        divides = node.target in _DIVISIONS
        if len(parametric) != 1 or len(rest) != 1 or (divides and parametric != [node.args[0]]):
            return False
        total = self._sum_inside(rest[0])
        if (not divides and total is None) or not self._adds_up(parametric[0]):
            return False
        weight = total if total is not None else rest[0]
        if total is None and tensor_type(rest[0]) is not None:
            self.notes.append(f"{origin(node)}: not known how its divisor adds up over the batch; taken to be a sum")
        self.terms.append(_Term(node, lambda graph, copies: copies[weight], total=total, factor=rest[0]))
        return True

    def _without_rows(self, node: fx.Node) -> bool:
        """True for a value that is one for the whole microbatch."""
        kind = tensor_type(node)
        if kind is None:
            return False
        return not _has_rows(node) if self.rows_known else all(size == 1 for size in kind.shape)

    def _sum_inside(self, divisor: fx.Node) -> fx.Node | None:
        """The sum over the batch that a scalar divisor is a function of: through casts, bounds, and whatever else has one tensor."""
        node = divisor
        while (kind := tensor_type(node)) is not None and kind.shape == ():
            if node.target in _SUMS:
                return node if node in self.data else None
            tensors = [arg for arg in node.all_input_nodes if tensor_type(arg) is not None]
            if (
                node.op != "call_function"
                or len(tensors) != 1
                or any(arg in self.data for arg in node.all_input_nodes if arg is not tensors[0])
            ):
                return None
            node = tensors[0]
        return None

    def _adds_up(self, node: fx.Node) -> bool:
        """True if the term's sum over microbatches is the batch's term."""
        sums = self._sums(node)
        self.weighed.update(sums)
        self.ends.extend(sums)
        return bool(sums)

    def _sums(self, node: fx.Node) -> list[fx.Node]:
        """The sums over rows that `node` is a linear function of; [] if it is none."""
        linear = self._linear_in(node)
        if linear:
            inside = [self._sums(each) for each in linear]
            return [each for sums in inside for each in sums] if all(inside) else []
        if node.target in _SUMS:
            found = node in self.data
        elif node.target in _CONTRACTIONS:
            kind = tensor_type(node.all_input_nodes[0])
            found = kind is not None and bool(kind.shape) and _rows_in(kind.shape[-1])
        elif node.target in _LABELLED:
            found = _argument(node, 3, "reduction", 1) == 2
        else:
            found = node.target in _REDUCED and _argument(node, _REDUCED[node.target], "reduction", 1) == 2
        return [node] if found else []

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
        elif node.target not in _REDUCED and node.target not in _MEANS:
            self.weighed.discard(node)
            self.notes.append(
                f"{origin(node) or node.target}: not known to be a sum or a mean over the batch; microbatches are averaged by rows"
            )
        return lambda graph, copies: _rows(graph)


def _rows_in(size: Size) -> bool:
    return not isinstance(size, int) and ROWS in size.free_symbols


def _has_rows(node: fx.Node) -> bool:
    kind = tensor_type(node)
    return kind is not None and any(map(_rows_in, kind.shape))


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


def _weights_module(module: fx.GraphModule, weighed: fx.Graph, terms: list[_Term]) -> fx.GraphModule:
    """What `terms` of the graph `weighed` weigh; `module` has its parameters and buffers."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in weighed.nodes:
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

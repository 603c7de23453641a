"""The proof of a row of RULES: run one call in every legal way, shard by shard, and compare with the whole op,
forward and gradient.

Every strategy goes through the localize pass as in a real plan. Arguments are cut from whole random tensors as their
placements say, results and gradients are put together by the meaning of theirs (the table in passes/placement.py), all
in float64 but for ops that have no kernel for it.

Dims that the axis does not divide are padded: what the arguments have there is zero, or numbers that mean nothing. Results
must not depend on them, be finite there, and zero where the row says so; the gradients that come back there must be zero,
but for an argument that stands for a parameter, whose padding is zero and gets whatever comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rank_threads import rank_threads
from torch import Tensor, fx

from passes.annotation import Binding, Cut
from passes.ir import TensorType, tensor_inputs
from passes.localize import localize
from passes.op_rule import OpRule, Strategy
from passes.patterns import call_of
from passes.placement import (
    COPIED,
    PARTIAL,
    REPLICATE,
    Placement,
    Shard,
    in_units,
    is_padded,
    local_shard,
    whole_tensor,
)  # fmt: skip
from passes.rules import RULES
from passes.shard import ShardPlan
from passes.strategies import strategies

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Spec:
    """A random tensor argument. kind: "normal", "unit" (in 0.1..0.9), "above" (1), "buffer" (no gradient), "below"
    (ints below `high`), "offsets" (where each of several groups of `high` rows ends), "permutations" (of the last dim),
    "steps" (ascending), "positive" (definite matrices), "imaginary" (complex numbers), "flags"."""

    shape: tuple[int, ...]
    kind: str = "normal"
    high: int | tuple[int, ...] = 0  # or the ints themselves

    def make(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        if isinstance(self.high, tuple):
            return torch.tensor(self.high)
        if self.kind == "below":
            return torch.randint(0, self.high, self.shape, generator=generator)
        if self.kind == "flags":
            return torch.rand(self.shape, generator=generator) < 0.5
        if self.kind in ("unit", "above"):
            return torch.rand(self.shape, generator=generator, dtype=dtype) * 0.8 + (
                0.1 if self.kind == "unit" else 1.1
            )
        if self.kind == "permutations":
            return torch.rand(self.shape, generator=generator).argsort(-1)
        if self.kind == "fractions":
            return torch.rand(self.shape, generator=generator, dtype=dtype)
        if self.kind == "steps":
            return torch.rand(self.shape, generator=generator, dtype=dtype).sort(-1).values
        if self.kind == "positive":
            root = torch.randn(self.shape, generator=generator, dtype=dtype)
            return root @ root.mT + torch.eye(self.shape[-1], dtype=dtype)
        if self.kind == "imaginary":
            return torch.randn(self.shape, generator=generator, dtype=dtype.to_complex())
        if self.kind == "offsets":
            size, count = self.high, self.shape[0]
            return torch.tensor([size * k // count for k in range(1, count)] + [size], dtype=torch.int32)
        values = torch.randn(self.shape, generator=generator, dtype=dtype)
        return values.abs() if self.kind == "buffer" else values


def f(*shape: int) -> Spec:
    return Spec(shape)


def unit(*shape: int) -> Spec:
    return Spec(shape, "unit")


def above(*shape: int) -> Spec:
    return Spec(shape, "above")


def buffer(*shape: int) -> Spec:
    return Spec(shape, "buffer")


def below(high: int, *shape: int) -> Spec:
    return Spec(shape, "below", high)


def offsets(rows: int, groups: int) -> Spec:
    return Spec((groups,), "offsets", rows)


def permutations(*shape: int) -> Spec:
    return Spec(shape, "permutations")


def imaginary(*shape: int) -> Spec:
    return Spec(shape, "imaginary")


def flags(*shape: int) -> Spec:
    return Spec(shape, "flags")


@dataclass(frozen=True)
class Example:
    """An example call; Specs stand for tensors. `values=False`: the result is not defined, only its shape is. `floats`:
    what the tensors are made of."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: bool = True
    floats: torch.dtype = torch.float64

    @staticmethod
    def steps(*shape: int) -> Spec:
        """Ascending along the last dim."""
        return Spec(shape, "steps")

    @staticmethod
    def positive(*shape: int) -> Spec:
        """Symmetric positive definite."""
        return Spec(shape, "positive")

    @staticmethod
    def fractions(*shape: int) -> Spec:
        """Between 0 and 1, without a gradient."""
        return Spec(shape, "fractions")

    @staticmethod
    def counts(*numbers: int) -> Spec:
        """These ints."""
        return Spec((len(numbers),), "below", numbers)


def call(*args: Any, values: bool = True, floats: torch.dtype = torch.float64, **kwargs: Any) -> Example:
    return Example(args, kwargs, values, floats)


class Case:
    """An example run whole: its graph of one node, its results and their gradients."""

    def __init__(self, op: Any, example: Example) -> None:
        self.example = example
        self.generator = torch.Generator().manual_seed(0)
        graph = fx.Graph()
        self.specs: list[Spec] = []
        self.tensors: list[Tensor] = []
        self.holders: list[fx.Node] = []

        def holder(arg: Any) -> Any:
            if isinstance(arg, Spec):
                tensor = arg.make(self.generator, example.floats)
                node = graph.placeholder(f"x{len(self.holders)}")
                trains = arg.kind in ("normal", "unit", "above", "positive", "imaginary")
                node.meta = {"tensor": TensorType(tensor.dtype, tuple(tensor.shape)), "trainable": trains}
                self.holders.append(node)
                self.specs.append(arg)
                self.tensors.append(tensor)
                return node
            if isinstance(arg, list):
                return [holder(item) for item in arg]
            return arg

        args = tuple(holder(arg) for arg in example.args)
        self.node = graph.call_function(op, args, {key: holder(value) for key, value in example.kwargs.items()})
        assert tensor_inputs(self.node) == self.holders
        graph.output(self.node)
        self.differentiable = tuple(node.meta["trainable"] for node in self.holders)
        self.after, self.results, grads = self._run(dict(zip(self.holders, self.tensors, strict=True)), graph, None)
        self.trainable = any(result.requires_grad for result in self.results)
        types = tuple(TensorType(result.dtype, tuple(result.shape)) for result in self.results)
        single = isinstance(grads, Tensor)
        self.node.meta = {"tensor": types[0]} if single else {"tensors": types}
        self.node.meta["trainable"] = self.trainable
        self.call = call_of(self.node)
        self.module = fx.GraphModule(torch.nn.Module(), graph)
        self.gradients = [
            torch.randn(result.shape, generator=self.generator, dtype=result.dtype) if result.requires_grad else None
            for result in self.results
        ]
        self.input_gradients = self._gradients(self.after, self.results, self.gradients)

    def _run(self, values: dict[fx.Node, Any], graph: fx.Graph, axis: Any) -> tuple[list[Tensor], list[Tensor], Any]:
        """Arguments after the call (updated in place, perhaps), results, and the results as they came."""
        arguments = []
        for node, differentiable in zip(
            [n for n in graph.nodes if n.op == "placeholder"], self.differentiable, strict=True
        ):
            values[node] = values[node].detach().clone().requires_grad_(differentiable)
            arguments.append(values[node])
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*(axis if arg == "tp" else arg for arg in args), **kwargs)
            elif node.op == "output":
                result = values[node.args[0]]
        results = [result] if isinstance(result, Tensor) else list(result)
        return arguments, results, result

    def _gradients(
        self, arguments: Sequence[Tensor], results: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradient of each argument; zeros where none flows, None where none could."""
        flowing = [
            (result, gradient)
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and result.requires_grad
        ]
        wanted = [tensor for tensor in arguments if tensor.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if flowing and wanted:
            outputs, weights = zip(*flowing, strict=True)
            found = list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
        grads = iter(zip(found, wanted, strict=True))
        return [
            (torch.zeros_like(tensor) if gradient is None else gradient) if argument.requires_grad else None
            for argument, (gradient, tensor) in ((a, next(grads) if a.requires_grad else (None, a)) for a in arguments)
        ]

    def strategies(self, rule: OpRule, axis_size: int, zeros: Sequence[bool] = ()) -> list[Strategy]:
        return strategies(
            rule, self.call, axis_size=axis_size, differentiable=self.differentiable,
            result_differentiable=self.trainable,
            cuts=lambda binding, group: _cuts(binding, group, axis_size), splittable=lambda size: True, zeros=zeros,
        )  # fmt: skip

    def _summands(self, tensor: Tensor, count: int) -> list[Tensor]:
        assert tensor.is_floating_point() or tensor.is_complex(), "partial sums of integers"
        parts = [torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype) for _ in range(count - 1)]
        return [*parts, tensor - sum(parts)]  # type: ignore[list-item]

    def _held(self, tensor: Tensor, placement: Placement, axis_size: int) -> list[Tensor]:
        """What each rank holds of a parameter: no padding."""
        return [local_shard(tensor, placement, axis_size=axis_size, coord=k).contiguous() for k in range(axis_size)]

    def _spread(self, tensor: Tensor, placement: Placement, axis_size: int, filled: bool = False) -> list[Tensor]:
        """What each rank holds of a value; `filled`: with numbers in its padding, in place of zeros."""
        if placement == PARTIAL:
            return self._summands(tensor, axis_size)
        pieces = [
            local_shard(tensor, placement, axis_size=axis_size, coord=coord, padded=True).contiguous()
            for coord in range(axis_size)
        ]
        if not filled or not isinstance(placement, Shard) or not (is_floating(tensor) or tensor.dtype == torch.bool):
            return pieces
        like = pieces[0]
        numbers = torch.ones_like(like) if like.dtype == torch.bool else torch.randn(like.shape, generator=self.generator, dtype=like.dtype)
        return [torch.where(padding(tensor, placement, axis_size, k), numbers, piece) for k, piece in enumerate(pieces)]

    def check(
        self, strategy: Strategy, axis_size: int, zeros: Sequence[bool] = (), filled: bool = True, keeps_zeros: bool = False
    ) -> None:
        """AssertionError unless the strategy computes what the whole op does.

        zeros: the arguments that stand for parameters; filled: numbers are in the others' padding, else zeros; keeps_zeros: if there
        are zeros in the padding of all, so there are in the results'.
        """
        zeros = zeros or (False,) * len(self.tensors)
        plan = ShardPlan(
            "tp", axis_size, {self.node: strategy},
            {(node, 0): p for node, p in zip(self.holders, strategy.inputs, strict=True)}
            | {(self.node, k): p for k, p in enumerate(strategy.outputs)},
            0.0,
        )  # fmt: skip
        graph = localize(self.module, plan).graph
        pieces = [
            self._held(tensor.detach(), p, axis_size)
            if zero and strategy.local
            else self._spread(tensor.detach(), p, axis_size, filled and not zero)
            for tensor, p, zero in zip(self.tensors, strategy.inputs, zeros, strict=True)
        ]
        gradients = [
            self._spread(g, DUAL[type(p)] if not isinstance(p, Shard) else p, axis_size)
            if g is not None
            else [None] * axis_size
            for g, p in zip(self.gradients, strategy.outputs, strict=True)
        ]
        holders = [node for node in graph.nodes if node.op == "placeholder"]

        def run(axis: Any, coord: int | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
            coord = axis.coord if coord is None else coord
            arguments, results, _ = self._run(
                {node: piece[coord] for node, piece in zip(holders, pieces, strict=True)}, graph, axis
            )
            mine = [gradient[coord] for gradient in gradients]
            for result, gradient in zip(results, mine, strict=True):
                assert gradient is None or result.shape == gradient.shape, (
                    f"a result of shape {tuple(result.shape)} on a rank, not {tuple(gradient.shape)}"
                )
            return arguments, results, self._gradients(arguments, results, mine)  # type: ignore[arg-type]

        try:
            ranks = (
                rank_threads(axis_size).run(run) if strategy.local else [run(None, coord) for coord in range(axis_size)]
            )
        except (RuntimeError, IndexError, ValueError) as error:
            raise AssertionError(f"fails on a rank: {error}") from error
        for k, (whole, placement) in enumerate(zip(self.results, strategy.outputs, strict=True)):
            self._compare(
                f"result {k}",
                [results[k].detach() for _, results, _ in ranks],
                placement,
                whole.detach(),
                self.example.values,
            )
            if isinstance(placement, Shard) and is_floating(whole) and self.example.values:
                only_zeros = keeps_zeros and (all(zeros) or not filled)
                self._compare_padding(f"result {k}", [r[k].detach() for _, r, _ in ranks], placement, whole, only_zeros)
        for k, (whole, placement) in enumerate(zip(self.after, strategy.inputs, strict=True)):
            if placement != PARTIAL:
                self._compare(
                    f"argument {k} afterwards",
                    [arguments[k].detach() for arguments, _, _ in ranks],
                    placement,
                    whole.detach(),
                    held=zeros[k],
                )
        for k, (gradient, placement) in enumerate(zip(self.input_gradients, strategy.inputs, strict=True)):
            if gradient is not None:
                self._compare(
                    f"gradient of argument {k}",
                    [grads[k] for _, _, grads in ranks],
                    DUAL.get(type(placement), placement),
                    gradient,
                    held=zeros[k],
                )
                if isinstance(placement, Shard) and not zeros[k]:
                    self._compare_padding(f"gradient of argument {k}", [g[k] for _, _, g in ranks], placement, gradient, True)

    @staticmethod
    def _compare_padding(what: str, pieces: list[Any], placement: Shard, whole: Tensor, is_zero: bool) -> None:
        """What stands in padding is zero; or finite, where all true entries beside it are."""
        finite = whole.isfinite().all(placement.dim, keepdim=True)
        for coord, piece in enumerate(pieces):
            wrong = piece != 0 if is_zero else ~piece.isfinite() & finite
            wrong &= padding(whole, placement, len(pieces), coord)
            assert not wrong.any(), f"{what}: {piece[wrong][0]} in padding"

    def _compare(
        self, what: str, pieces: list[Tensor], placement: Placement, whole: Tensor, values: bool = True, held: bool = False
    ) -> None:
        if placement in (REPLICATE, COPIED):
            together = pieces
        else:
            shapes = {tuple(piece.shape) for piece in pieces}
            assert len(shapes) == 1 or held, f"{what}: shapes {shapes}"
            try:
                size = whole.shape[placement.dim] if isinstance(placement, Shard) else None
                together = [whole_tensor(pieces, placement, size)]
            except RuntimeError as error:
                raise AssertionError(f"{what}: {error}") from error
        for one in together:
            assert one.shape == whole.shape and one.dtype == whole.dtype, (
                f"{what}: {one.dtype} {tuple(one.shape)}, whole {whole.dtype} {tuple(whole.shape)}"
            )
            if values and whole.numel():
                exact = torch.complex128 if whole.is_complex() else torch.float64
                finite = whole[whole.isfinite()]
                is_number = whole.is_floating_point() or whole.is_complex()
                scale = max(1.0, finite.abs().max().item()) if is_number and finite.numel() else 1.0
                difference = (
                    (one.to(exact) - whole.to(exact)).masked_fill(one == whole, 0.0).abs().max().item()
                )  # inf equals inf
                assert difference <= TOLERANCE[self.example.floats] * scale, f"{what} differs by {difference:.1e}"


def is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def padding(whole: Tensor, placement: Shard, axis_size: int, coord: int) -> Tensor:
    """True in the padding of a rank's piece."""
    ones = torch.ones(whole.shape, dtype=torch.bool)
    return ~local_shard(ones, placement, axis_size=axis_size, coord=coord, padded=True)


# what a gradient's pieces mean, by the placement of its value
DUAL: dict[type, Placement] = {type(REPLICATE): REPLICATE, type(COPIED): PARTIAL, type(PARTIAL): REPLICATE}


def _cuts(binding: Binding, group: tuple[str, ...], axis_size: int) -> list[Cut]:
    """Whole, in equal blocks, and in blocks of different sizes."""
    size = binding.sizes[group[0]]
    assert isinstance(size, int)
    cuts = [Cut()]
    if len(group) == 1:
        blocks = next((k for k in range(2, size) if size % k == 0 and size // k % axis_size == 0), None)
        cuts += [Cut(blocks)] if blocks else []
        first = size - axis_size
        cuts += [Cut((first, axis_size))] if first > axis_size and first % axis_size == 0 else []
        pairs = in_units(0, size, 1, 2, axis_size=axis_size)
        cuts += [Cut(1, 2, pairs.piece)] if pairs.piece else []
    return cuts


def is_padded_strategy(case: Case, strategy: Strategy, axis_size: int) -> bool:
    """True if the axis does not divide what a strategy splits."""
    kinds = [*case.call.inputs, *case.call.outputs]
    placements = [*strategy.inputs, *strategy.outputs]
    return any(
        isinstance(p, Shard) and is_padded(kind.shape[p.dim], p, axis_size) for kind, p in zip(kinds, placements, strict=True)
    )


def _with_zeros(case: Case, rule: OpRule, axis_size: int) -> list[tuple[Strategy, tuple[bool, ...], bool]]:
    """Every strategy; padded ones with numbers and with zeros in the padding, each argument in turn, none and all as parameters."""
    count = len(case.tensors)
    none = (False,) * count
    found = [(strategy, none, True) for strategy in case.strategies(rule, axis_size)]
    for zeros in dict.fromkeys([none, *(tuple(k == at for k in range(count)) for at in range(count)), (True,) * count]):
        padded = [s for s in case.strategies(rule, axis_size, zeros) if is_padded_strategy(case, s, axis_size)]
        found += [(s, zeros, filled) for s in padded for filled in (True, False) if zeros != none or not filled]
    return found


def check(rule: OpRule, example: Example, axis_size: int) -> set[tuple[str, ...]]:
    """Every strategy of the row for one example; the names that were split. AssertionError names the first strategy
    that is wrong.

    Also if a name whose size is a multiple of `axis_size` was not split at all.
    """
    case = Case(rule.op, example)
    known = RULES.get(rule.op)
    split: set[tuple[str, ...]] = set()
    keeps_zeros = rule.padding_of(case.call) == "zeros"
    for strategy, zeros, filled in _with_zeros(case, rule, axis_size):
        try:
            RULES[rule.op] = rule  # localize looks its row up: where arguments spell sizes
            case.check(strategy, axis_size, zeros, filled, keeps_zeros)
        except AssertionError as error:
            raise AssertionError(
                f"{rule.op}{example.args} {example.kwargs}, {axis_size} ranks, {strategy}: {error}"
            ) from error
        finally:
            if known is None:
                del RULES[rule.op]
            else:
                RULES[rule.op] = known
        split |= {strategy.split} if strategy.split else set()
    binding = rule.binding(case.call)
    for group in binding.choices:
        sizes = [binding.sizes[name] for name in group]
        assert group in split or any(size % axis_size or size == 0 for size in sizes), (
            f"{rule.op}: {group} of {sizes} was never split"
        )
    return split

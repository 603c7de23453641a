"""What a row of `costmodel.ops` is: formulas of one op's FLOPs, bytes and products, forward and backward, and what it saves.

Sizes are ints or sympy expressions; the same formulas serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from costmodel.cost import Amount, Cost, Product

Size: TypeAlias = int | sympy.Expr
STAT_BYTES = 4  # norms and attention keep their statistics in f32 whatever the dtype


def product(sizes: Sequence[Size]) -> Any:
    """The product of sizes; ints multiply as ints, sympy sees what is left."""
    number = 1
    symbolic: list[sympy.Expr] = []
    for size in sizes:
        if isinstance(size, int):
            number *= size
        else:
            symbolic.append(size)
    return sympy.Mul(number, *symbolic) if symbolic else number


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Shape and element size of a value; `floating` if it can carry gradients, `parameter` if it is a weight (never
    counted as saved).
    """

    shape: tuple[Size, ...]
    bytes_per_element: int
    floating: bool = True
    parameter: bool = False

    @property
    def numel(self) -> Any:
        return product(self.shape)

    @property
    def num_bytes(self) -> Any:
        return self.numel * self.bytes_per_element


@dataclass(frozen=True, slots=True)
class Call:
    """One use of an op: its tensor inputs in order, its tensor outputs, which inputs need gradients, and whether
    attention is causal.
    """

    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]
    trainable: tuple[bool, ...]
    causal: bool = False

    @property
    def num_trainable(self) -> int:
        return sum(self.trainable)

    @property
    def input_bytes(self) -> Any:
        return sum(tensor.num_bytes for tensor in self.inputs)

    @property
    def output_bytes(self) -> Any:
        return sum(tensor.num_bytes for tensor in self.outputs)

    @property
    def gradient_bytes(self) -> Any:
        """Bytes of the gradients that the backward writes: one per trainable input."""
        return sum(tensor.num_bytes for tensor, wanted in zip(self.inputs, self.trainable, strict=True) if wanted)

    @property
    def largest(self) -> Any:
        """Elements of the work: of the output, or of the first input where a reduction made the output smaller."""
        out = self.outputs[0].numel if self.outputs else 0
        first = self.inputs[0].numel if self.inputs else 0
        if isinstance(out, int) and isinstance(first, int):
            return max(out, first)
        # Where the sizes cannot be compared, the difference in rank tells a reduction from a broadcast.
        larger = sympy.sympify(first - out).is_positive
        reduced = len(self.inputs[0].shape) > len(self.outputs[0].shape) if larger is None and self.inputs else larger
        return first if reduced else out


@dataclass(frozen=True, slots=True)
class Saved:
    """What autograd keeps for an op's backward: inputs and outputs by index, and bytes of what is neither (statistics,
    masks).
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    extra_bytes: Amount = 0


Formula = Callable[[Call], Any]
SaveRule = Callable[[Call], Saved]


# What is saved


def keeps_nothing(call: Call) -> Saved:
    return Saved()


def keeps_inputs(call: Call) -> Saved:
    return Saved(inputs=tuple(range(len(call.inputs))))


def keeps_first(call: Call) -> Saved:
    return Saved(inputs=(0,) if call.inputs else ())


def keeps_output(call: Call) -> Saved:
    return Saved(outputs=(0,))


def keeps_indices(call: Call) -> Saved:
    """The integer or boolean inputs: what was gathered, masked or chosen."""
    return Saved(inputs=tuple(index for index, tensor in enumerate(call.inputs) if not tensor.floating))


def keeps_partners(call: Call) -> Saved:
    """A product's gradient to one factor needs the others."""
    factors = range(len(call.inputs))
    return Saved(
        inputs=tuple(kept for kept in factors if any(call.trainable[other] for other in factors if other != kept))
    )


def keeps_quotient(call: Call) -> Saved:
    """a / b: the gradient to a needs b, the gradient to b needs both."""
    if len(call.inputs) < 2:
        return Saved()
    return Saved(inputs=(0, 1) if call.trainable[1] else (1,))


def keeps_mask(call: Call) -> Saved:
    """Dropout's mask: one byte an element, as the fused kernel keeps it."""
    return Saved(extra_bytes=call.outputs[0].numel)


def keeps_statistics(num_statistics: int, rows: Formula) -> SaveRule:
    """A norm's input and so many f32 statistics per normalised row."""
    return lambda call: Saved(inputs=(0,), extra_bytes=num_statistics * STAT_BYTES * rows(call))


# Rows


def grads_and_saved(call: Call, saved: Saved) -> Any:
    """Bytes that a backward reads: the gradient of each output, and what was saved (parameters too: they are read, if
    not kept).
    """
    kept = sum(call.inputs[index].num_bytes for index in saved.inputs)
    kept += sum(call.outputs[index].num_bytes for index in saved.outputs)
    return call.output_bytes + kept + saved.extra_bytes


@dataclass(frozen=True)
class OpRow:
    """The formulas of one op. Backward formulas are asked only where an input needs a gradient."""

    flops: Formula
    backward_flops: Formula
    saves: SaveRule = keeps_nothing
    read: Formula = lambda call: call.input_bytes
    written: Formula = lambda call: call.output_bytes
    backward_read: Formula | None = None  # None: the outputs' gradients and what was saved
    backward_written: Formula = lambda call: call.gradient_bytes
    kernels: int = 1
    backward_kernels: Formula = lambda call: 1
    products: Callable[[Call], tuple[Product, ...]] = lambda call: ()
    backward_products: Callable[[Call], tuple[Product, ...]] = lambda call: ()

    def __call__(
        self,
        inputs: Sequence[TensorShape],
        outputs: Sequence[TensorShape],
        trainable: Sequence[bool],
        causal: bool = False,
    ) -> Cost:
        call = Call(tuple(inputs), tuple(outputs), tuple(trainable), causal)
        flops, read, written = self.flops(call), self.read(call), self.written(call)
        products = self.products(call)
        if not any(call.trainable):
            return Cost(
                forward_flops=flops,
                read_bytes=read,
                written_bytes=written,
                forward_kernels=self.kernels,
                forward_products=products,
            )
        saved = self.saves(call)
        backward_read = self.backward_read(call) if self.backward_read else grads_and_saved(call, saved)
        kernels = self.backward_kernels(call)
        return Cost(
            forward_flops=flops,
            backward_flops=self.backward_flops(call),
            read_bytes=read,
            written_bytes=written,
            backward_read_bytes=backward_read if kernels else 0,
            backward_written_bytes=self.backward_written(call) if kernels else 0,
            saved_bytes=saved_bytes(call, saved),
            forward_kernels=self.kernels,
            backward_kernels=kernels,
            forward_products=products,
            backward_products=self.backward_products(call),
        )


def saved_bytes(call: Call, saved: Saved) -> Any:
    """Bytes of what is saved, parameters excluded."""
    kept = sum(call.inputs[index].num_bytes for index in saved.inputs if not call.inputs[index].parameter)
    return kept + sum(call.outputs[index].num_bytes for index in saved.outputs) + saved.extra_bytes

"""How an op's cost follows from the shapes of its inputs and outputs: formulas shared by the rows of `costmodel.ops`.

They count what eager torch does with one kernel an op. FLOPs: a multiplication and an addition are two; matrix products
are exact, element-wise ops carry a rough count per element, because memory traffic decides their time. Bytes: every
input is read and every output written once (fused attention never writes its scores). Backward: what autograd's formula
for the op (derivatives.yaml in torch) reads, computes and writes for the inputs that need gradients. Saved: what the
same formulas keep from forward to backward; parameters are not counted, they are in memory anyway. Sizes are ints or
sympy expressions; the same formulas serve both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from costmodel.cost import Product
from costmodel.op_row import (
    STAT_BYTES,
    Call,
    Formula,
    OpRow,
    Saved,
    SaveRule,
    TensorShape,
    keeps_first,
    keeps_indices,
    keeps_output,
    keeps_partners,
    keeps_statistics,
    product,
)


def pointwise(flops_per_element: int, saves: SaveRule = keeps_first, *, backward: int | None = None) -> OpRow:
    """Element-wise ops and reductions: `flops_per_element` over the larger of input and output, as much per gradient
    unless told.
    """
    each = flops_per_element if backward is None else backward
    return OpRow(
        flops=lambda call: flops_per_element * call.largest,
        backward_flops=lambda call: each * call.num_trainable * call.largest,
        saves=saves,
        backward_kernels=lambda call: call.num_trainable,
    )


def sums() -> OpRow:
    """add and sub: the gradient passes through as it is; only an operand that was broadcast needs its gradient summed,
    in one kernel.
    """

    def broadcast(call: Call) -> list[TensorShape]:
        pairs = zip(call.inputs, call.trainable, strict=True)
        return [tensor for tensor, wanted in pairs if wanted and tensor.shape != call.outputs[0].shape]

    return OpRow(
        flops=lambda call: call.outputs[0].numel,
        backward_flops=lambda call: call.outputs[0].numel * len(broadcast(call)),
        backward_read=lambda call: call.output_bytes * len(broadcast(call)),
        backward_written=lambda call: sum(tensor.num_bytes for tensor in broadcast(call)),
        backward_kernels=lambda call: len(broadcast(call)),
    )


def copies() -> OpRow:
    """Ops that only move bytes, and whose gradient moves back: dtype conversion, repeat, roll, ..."""
    return OpRow(flops=lambda call: 0, backward_flops=lambda call: 0)


def hands_gradient_on(flops_per_element: int = 0) -> OpRow:
    """Ops whose backward is a view of the gradient: clone hands it on, cat slices it, sum expands it."""
    return OpRow(
        flops=lambda call: flops_per_element * call.largest,
        backward_flops=lambda call: 0,
        backward_kernels=lambda call: 0,
    )


def contraction(
    flops: Formula,
    left: int,
    right: int,
    *,
    right_is_weight: bool = False,
    shape: Callable[[Call], Product] | None = None,
) -> OpRow:
    """A matrix product of inputs `left` and `right`. Its gradient to either is a product as large as the forward's,
    with the other operand. `shape`: the sizes of the product, where the op is one.

    Inputs besides the two are biases: their gradient is the sum of the output's. Source of 2 m n k: Golub and Van Loan,
    section 1.1.
    """

    def operands_wanted(call: Call) -> int:
        return int(call.trainable[left]) + int(call.trainable[right])

    def biases(call: Call) -> list[TensorShape]:
        wanted = (index for index, flag in enumerate(call.trainable) if flag and index not in (left, right))
        return [call.inputs[index] for index in wanted]

    def saves(call: Call) -> Saved:
        kept = [left] if call.trainable[right] else []
        if call.trainable[left] and not right_is_weight:
            kept.append(right)
        return Saved(inputs=tuple(kept))

    def backward_read(call: Call) -> Any:
        partners = ((left, right), (right, left))
        other = sum(call.inputs[read].num_bytes for wanted, read in partners if call.trainable[wanted])
        return other + call.output_bytes * (operands_wanted(call) + len(biases(call)))

    def backward_products(call: Call) -> tuple[Product, ...]:
        if shape is None:
            return ()
        one = shape(call)
        to_left = Product(one.m, one.k, one.n, one.batch, one.rows)
        to_right = Product(one.k, one.n, one.m, one.batch, one.rows)
        return ((to_left,) if call.trainable[left] else ()) + ((to_right,) if call.trainable[right] else ())

    return OpRow(
        flops=flops,
        backward_flops=lambda call: flops(call) * operands_wanted(call) + call.outputs[0].numel * len(biases(call)),
        saves=saves,
        backward_read=backward_read,
        backward_kernels=lambda call: call.num_trainable,
        products=lambda call: (shape(call),) if shape else (),
        backward_products=backward_products,
    )


def matmul(left: int, right: int, *, right_is_weight: bool = False) -> OpRow:
    """A contraction of the last dim of input `left`: with a matrix, all rows in one product; with a batch of matrices, one each."""

    def shape(call: Call) -> Product:
        one, other, out = call.inputs[left].shape, call.inputs[right].shape, call.outputs[0].shape
        if len(other) < 2:
            return Product(product(out), 1, one[-1], rows=(one[-1],))
        if len(other) < 3 or len(out) < 3:
            return Product(product(out[:-1]), out[-1], one[-1], rows=(one[-1], out[-1]))
        return Product(out[-2], out[-1], one[-1], product(out[:-2]), rows=(one[-1], out[-1]))

    return contraction(matmul_flops(left), left, right, right_is_weight=right_is_weight, shape=shape)


def convolution() -> OpRow:
    """A convolution, as the matrix product that it is computed as: [batch and positions, in_channels and kernel] x [.., out_channels]."""

    def shape(call: Call) -> Product:
        out, weight = call.outputs[0].shape, call.inputs[1].shape
        return Product(product((out[0], *out[2:])), weight[0], product(weight[1:]))

    return contraction(convolution_flops, 0, 1, right_is_weight=True, shape=shape)


def matmul_flops(left: int) -> Formula:
    """2 m n k: k is the last dim of the left operand, m n (and every batch dim) is in the output."""
    return lambda call: 2 * call.outputs[0].numel * call.inputs[left].shape[-1]


def convolution_flops(call: Call) -> Any:
    """2 · outputs · (in_channels / groups) · kernel positions: the weight is [out_channels, in_channels / groups,
    *kernel].
    """
    return 2 * call.outputs[0].numel * product(call.inputs[1].shape[1:])


def transposed_convolution_flops(call: Call) -> Any:
    """2 · inputs · (out_channels / groups) · kernel positions: the weight is [in_channels, out_channels / groups,
    *kernel].
    """
    return 2 * call.inputs[0].numel * product(call.inputs[1].shape[1:])


def einsum_flops(call: Call) -> Any:
    """An estimate without the equation: exact for a plain product (sqrt(mk · kn · mn) = mnk), too high with batch
    dims. One operand is only read and summed.
    """
    if len(call.inputs) == 1:
        return call.inputs[0].numel
    if len(call.inputs) != 2:
        return 2 * sum(tensor.numel for tensor in call.inputs)
    volume = call.inputs[0].numel * call.inputs[1].numel * call.outputs[0].numel
    return 2 * (math.isqrt(volume) if isinstance(volume, int) else sympy.sqrt(volume))


def batched_sum_flops(call: Call) -> Any:
    """addbmm, 2 b m n k: inputs bias, [b, m, k], [b, k, n]; the batch is summed over, so it is not in the output."""
    return 2 * call.inputs[1].numel * call.inputs[2].shape[-1]


def matrix_vector_flops(call: Call) -> Any:
    """addmv: a multiplication and an addition for each entry of the matrix."""
    return 2 * call.inputs[1].numel


def bilinear_flops(call: Call) -> Any:
    """x W y for every row and output: W is [outputs, i, j], so 2 outputs i j a row, and j of them again for y."""
    return 2 * call.outputs[0].numel * product(call.inputs[2].shape[1:])


def distance_flops(call: Call) -> Any:
    """cdist: a difference, a power and a sum for each entry of each pair."""
    return 3 * call.outputs[0].numel * call.inputs[0].shape[-1]


def fourier_flops(call: Call) -> Any:
    """5 n log2 n a transform; all dims are taken for transformed, since their list is not known here.

    Source: Van Loan, Computational Frameworks for the Fast Fourier Transform, section 1.4.
    """
    largest = call.largest
    return (
        5
        * largest
        * (math.ceil(math.log2(max(largest, 2))) if isinstance(largest, int) else sympy.ceiling(sympy.log(largest, 2)))
    )


def recurrent_flops(call: Call) -> Any:
    """All layers and steps of a recurrent op: each weight matrix (two dims) meets every row of the input once."""
    rows = product(call.inputs[0].shape[:-1])
    return 2 * rows * sum(tensor.numel for tensor in call.inputs[1:] if len(tensor.shape) == 2)


RECURRENT = OpRow(
    flops=recurrent_flops,
    backward_flops=lambda call: 2 * recurrent_flops(call),
    # the input and, for each step, what the gates came from and what they gave
    saves=lambda call: Saved(
        inputs=(0,),
        extra_bytes=product(call.inputs[0].shape[:-1])
        * call.inputs[0].bytes_per_element
        * sum(tensor.shape[0] for tensor in call.inputs[1:] if len(tensor.shape) == 2),
    ),
)
FOURIER = OpRow(flops=fourier_flops, backward_flops=fourier_flops)


EINSUM = OpRow(
    # The gradient to each operand is a product of the others and the output's gradient, as large as the forward's.
    flops=einsum_flops,
    backward_flops=lambda call: einsum_flops(call) * call.num_trainable,
    saves=keeps_partners,
    backward_read=lambda call: sum(
        call.output_bytes + call.input_bytes - tensor.num_bytes
        for tensor, wanted in zip(call.inputs, call.trainable, strict=True)
        if wanted
    ),
    backward_kernels=lambda call: call.num_trainable,
)


# Attention: query [..., L, E], key [..., S, E], value [..., S, Ev], perhaps a mask; the output is [..., L, Ev]


def _attention_rows(call: Call) -> Any:
    return product(call.inputs[0].shape[:-1])


def _attention_flops(call: Call) -> Any:
    """2 L S (E + Ev) per batch and head; half of it if causal, as fused kernels skip what is masked (Dao 2023, section
    3).
    """
    width = call.inputs[0].shape[-1] + call.inputs[2].shape[-1]
    return (1 if call.causal else 2) * _attention_rows(call) * call.inputs[1].shape[-2] * width


def _attention_backward_flops(call: Call) -> Any:
    """Five products for the forward's two: the scores again, then the gradients to value, probabilities, query and key
    (Dao 2023).
    """
    query_width, value_width = call.inputs[0].shape[-1], call.inputs[2].shape[-1]
    width = 3 * query_width + 2 * value_width
    return (1 if call.causal else 2) * _attention_rows(call) * call.inputs[1].shape[-2] * width


def _attention_saves(call: Call) -> Saved:
    """Query, key, value, mask, output, each row's log-sum-exp. A mask that learns rules out the fused kernel: scores
    are kept.
    """
    extra = STAT_BYTES * _attention_rows(call)
    if any(call.trainable[3:]):
        extra += _attention_rows(call) * call.inputs[1].shape[-2] * call.inputs[0].bytes_per_element
    return Saved(inputs=tuple(range(len(call.inputs))), outputs=(0,), extra_bytes=extra)


def _attention_products(call: Call) -> tuple[Product, ...]:
    query, key = call.inputs[0].shape, call.inputs[1].shape
    return (Product(query[-2], key[-2], query[-1], product(query[:-2]), rows=(query[-1],), fused=True),)


ATTENTION = OpRow(
    flops=_attention_flops,
    backward_flops=_attention_backward_flops,
    saves=_attention_saves,
    products=_attention_products,
    backward_products=_attention_products,
)


# Norms, lookups and losses


def rows_of_last_dims(call: Call) -> Any:
    """Rows that a layer or RMS norm normalises: all dims but those of its weight (the last one if it has none)."""
    num_dims = len(call.inputs[1].shape) if len(call.inputs) > 1 else 1
    return product(call.inputs[0].shape[: len(call.inputs[0].shape) - num_dims])


def norm(flops_per_element: int, num_statistics: int, rows: Formula) -> OpRow:
    """Forward in one pass; backward in one for the input's gradient and, if it has a weight that learns, one for weight
    and bias.
    """
    return OpRow(
        flops=lambda call: flops_per_element * call.inputs[0].numel,
        backward_flops=lambda call: 2 * flops_per_element * call.inputs[0].numel,
        saves=keeps_statistics(num_statistics, rows),
        written=lambda call: call.outputs[0].num_bytes + num_statistics * STAT_BYTES * rows(call),
        backward_read=lambda call: 2 * call.inputs[0].num_bytes * (1 + any(call.trainable[1:])),
        backward_kernels=lambda call: 1 + any(call.trainable[1:]),
    )


def softmax() -> OpRow:
    """Maximum, difference, exponential, sum, quotient; backward: y (g - sum(y g)), from the output alone."""
    return pointwise(5, keeps_output, backward=4)


def lookup(saves: SaveRule = keeps_indices) -> OpRow:
    """Rows of input 0 by integer inputs: only those rows are read, but the gradient is as large as the whole table."""
    return OpRow(
        flops=lambda call: 0,
        backward_flops=lambda call: call.outputs[0].numel,
        saves=saves,
        read=lambda call: call.output_bytes + sum(tensor.num_bytes for tensor in call.inputs if not tensor.floating),
    )


CROSS_ENTROPY = OpRow(
    # log_softmax over the logits, then one element a row is picked; autograd keeps the log-probabilities, not the
    # logits.
    flops=lambda call: 5 * call.inputs[0].numel,
    backward_flops=lambda call: 3 * call.inputs[0].numel,
    saves=lambda call: Saved(inputs=(1,), extra_bytes=call.inputs[0].num_bytes),
    written=lambda call: call.inputs[0].num_bytes + call.output_bytes,
    # The picked elements' gradient is scattered into zeros as large as the logits, which the softmax's backward reads.
    backward_read=lambda call: 2 * call.inputs[0].num_bytes + call.inputs[1].num_bytes,
    backward_written=lambda call: 2 * call.inputs[0].num_bytes,
    kernels=2,
    backward_kernels=lambda call: 2,
)
NLL = OpRow(
    flops=lambda call: call.inputs[1].numel,
    backward_flops=lambda call: call.inputs[1].numel,
    saves=lambda call: Saved(inputs=(1,)),
    read=lambda call: call.inputs[1].num_bytes + call.inputs[1].numel * call.inputs[0].bytes_per_element,
)
CREATION = OpRow(flops=lambda call: 0, backward_flops=lambda call: 0, read=lambda call: 0)

"""What each ATen op costs: one row of OP_COSTS an op, made of the formulas in `costmodel.formulas`.

To add an op, add a row; an op without one is priced as element-wise. Ops are named as torch prints them
("aten.linear"); an overload ("aten.linear.default") and an in-place form ("aten.add_") find the same row.

An activation that two ops save exists once: `op_saves` says which tensors are meant, so that a caller who knows the
graph can count each once; the `saved_bytes` of a `Cost` is the sum for the op alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from costmodel.cost import ZERO, Cost
from costmodel.errors import BadArgument
from costmodel.formulas import (
    ATTENTION,
    CREATION,
    CROSS_ENTROPY,
    EINSUM,
    FOURIER,
    NLL,
    RECURRENT,
    batched_sum_flops,
    bilinear_flops,
    contraction,
    convolution,
    copies,
    distance_flops,
    hands_gradient_on,
    lookup,
    matmul,
    matmul_flops,
    matrix_vector_flops,
    norm,
    pointwise,
    rows_of_last_dims,
    softmax,
    sums,
    transposed_convolution_flops,
)
from costmodel.op_row import (
    Call,
    OpRow,
    Saved,
    TensorShape,
    keeps_first,
    keeps_indices,
    keeps_inputs,
    keeps_mask,
    keeps_nothing,
    keeps_output,
    keeps_partners,
    keeps_quotient,
    product,
)

VIEWS = frozenset(
    """
    view reshape transpose permute expand expand_as split split_with_sizes slice unsqueeze squeeze getitem alias detach
    t unflatten flatten select chunk view_as unbind narrow diagonal numpy_T swapaxes movedim mT unfold lift_fresh_copy
    _unsafe_view view_as_real view_as_complex unsafe_split unsafe_chunk tensor_split real imag broadcast_to as_strided
    _conj resolve_conj resolve_neg
    """.split()  # noqa: SIM905 - thirty short names, not thirty lines
)

OP_COSTS: dict[str, OpRow] = {
    # matrix products
    "aten.linear": matmul(0, 1, right_is_weight=True),
    "aten.mm": matmul(0, 1),
    "aten.bmm": matmul(0, 1),
    "aten.matmul": matmul(0, 1),
    "aten.mv": contraction(matmul_flops(0), 0, 1),
    "aten.dot": contraction(matmul_flops(0), 0, 1),
    "aten.addmm": matmul(1, 2),
    "aten.baddbmm": matmul(1, 2),
    "aten._grouped_mm": contraction(matmul_flops(0), 0, 1, right_is_weight=True),
    "transformers.grouped_mm_fallback": contraction(matmul_flops(0), 0, 1, right_is_weight=True),
    "aten.einsum": EINSUM,
    "aten.convolution": convolution(),
    "aten.conv1d": convolution(),
    "aten.conv2d": convolution(),
    "aten.conv3d": convolution(),
    "aten.conv_transpose1d": contraction(transposed_convolution_flops, 0, 1, right_is_weight=True),
    "aten.conv_transpose2d": contraction(transposed_convolution_flops, 0, 1, right_is_weight=True),
    "aten.conv_transpose3d": contraction(transposed_convolution_flops, 0, 1, right_is_weight=True),
    "aten.addbmm": contraction(batched_sum_flops, 1, 2),
    "aten.addmv": contraction(matrix_vector_flops, 1, 2),
    "aten.vdot": contraction(matmul_flops(0), 0, 1),
    "aten.outer": contraction(lambda call: call.outputs[0].numel, 0, 1),
    "aten.bilinear": contraction(bilinear_flops, 0, 2),
    "aten._cdist_forward": contraction(distance_flops, 0, 1),
    "aten._euclidean_dist": contraction(distance_flops, 0, 1),
    # recurrent layers and Fourier transforms
    "aten.lstm": RECURRENT,
    "aten.gru": RECURRENT,
    "aten.rnn_tanh": RECURRENT,
    "aten.rnn_relu": RECURRENT,
    "aten._fft_r2c": FOURIER,
    "aten._fft_c2c": FOURIER,
    "aten._fft_c2r": FOURIER,
    # attention
    "aten.scaled_dot_product_attention": ATTENTION,
    "aten._scaled_dot_product_flash_attention": ATTENTION,
    "aten._scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "aten._scaled_dot_product_efficient_attention": ATTENTION,
    "aten._scaled_dot_product_cudnn_attention": ATTENTION,
    # lookups
    "aten.embedding": lookup(),
    "aten.index_select": lookup(),
    "aten.index": lookup(),
    "aten.gather": lookup(keeps_inputs),
    # losses
    "aten.cross_entropy_loss": CROSS_ENTROPY,
    "aten.nll_loss": NLL,
    "aten.nll_loss_nd": NLL,
    "aten.nll_loss_forward": NLL,
    "aten.mse_loss": pointwise(3, keeps_inputs),
    "aten.binary_cross_entropy_with_logits": pointwise(6, keeps_inputs),
    # softmax and norms
    "aten.softmax": softmax(),
    "aten._softmax": softmax(),
    "aten.log_softmax": softmax(),
    "aten._log_softmax": softmax(),
    "aten.layer_norm": norm(8, 2, rows_of_last_dims),
    "aten.native_layer_norm": norm(8, 2, rows_of_last_dims),
    # RMS norm as the fused CUDA kernel does it; on the CPU torch composes it and keeps the normalised value besides
    "aten.rms_norm": norm(5, 1, rows_of_last_dims),
    "aten._fused_rms_norm": norm(5, 1, rows_of_last_dims),
    "aten.group_norm": norm(8, 2, lambda call: product(call.inputs[0].shape[:2])),
    "aten.instance_norm": norm(8, 2, lambda call: product(call.inputs[0].shape[:2])),
    "aten.batch_norm": norm(8, 2, lambda call: product(call.inputs[0].shape[1:2])),
    # functions of one value: exponentials and the like cost about 4 (Muller, Handbook of Floating-Point Arithmetic,
    # chapter 10)
    "aten.gelu": pointwise(8, keeps_first, backward=12),
    "aten.silu": pointwise(5, keeps_first, backward=8),
    "aten.softplus": pointwise(6),
    "aten.log": pointwise(4),
    "aten.sin": pointwise(4),
    "aten.cos": pointwise(4),
    "aten.pow": pointwise(4),
    "aten.relu": pointwise(1, keeps_output),
    "aten.tanh": pointwise(6, keeps_output, backward=3),
    "aten.sigmoid": pointwise(5, keeps_output, backward=3),
    "aten.exp": pointwise(4, keeps_output, backward=1),
    "aten.sqrt": pointwise(2, keeps_output),
    "aten.rsqrt": pointwise(2, keeps_output),
    "aten.reciprocal": pointwise(2, keeps_output),
    "aten.logsumexp": pointwise(6, lambda call: Saved(inputs=(0,), outputs=(0,))),
    # arithmetic
    "aten.add": sums(),
    "aten.sub": sums(),
    "aten.rsub": sums(),
    "aten.neg": pointwise(1, keeps_nothing),
    "aten.mul": pointwise(1, keeps_partners),
    "aten.div": pointwise(1, keeps_quotient),
    # choices and masks
    "aten.where": pointwise(1, keeps_indices),
    "aten.masked_fill": pointwise(1, keeps_indices),
    "aten.clamp": pointwise(2, keeps_first),
    "aten.dropout": pointwise(2, keeps_mask, backward=1),
    "aten.native_dropout": pointwise(2, lambda call: Saved(outputs=(1,)), backward=1),
    "aten.tril": pointwise(1, keeps_nothing),
    "aten.triu": pointwise(1, keeps_nothing),
    # reductions
    "aten.sum": hands_gradient_on(1),
    "aten.mean": pointwise(1, keeps_nothing),
    "aten.cumsum": pointwise(1, keeps_nothing),
    "aten.amax": pointwise(1, lambda call: Saved(inputs=(0,), outputs=(0,))),
    "aten.amin": pointwise(1, lambda call: Saved(inputs=(0,), outputs=(0,))),
    "aten.max": pointwise(1, lambda call: Saved(outputs=tuple(range(1, len(call.outputs))))),
    "aten.topk": pointwise(4, lambda call: Saved(outputs=(1,))),
    "aten.sort": pointwise(16, lambda call: Saved(outputs=(1,))),
    "aten.max_pool2d": pointwise(4, lambda call: Saved(inputs=(0,), extra_bytes=8 * call.outputs[0].numel)),
    "aten.avg_pool2d": pointwise(4),
    # copies
    "aten.clone": hands_gradient_on(),
    "aten.contiguous": hands_gradient_on(),
    "aten.to": copies(),
    "aten._to_copy": copies(),
    "aten.type_as": copies(),
    "aten.copy": copies(),
    "aten.cat": hands_gradient_on(),
    "aten.stack": hands_gradient_on(),
    "aten.repeat": copies(),
    "aten.repeat_interleave": copies(),
    "aten.roll": copies(),
    "aten.flip": copies(),
    "aten.pad": copies(),
    "aten.constant_pad_nd": copies(),
    # creation: written, never read
    "aten.arange": CREATION,
    "aten.zeros": CREATION,
    "aten.ones": CREATION,
    "aten.full": CREATION,
    "aten.empty": CREATION,
    "aten.zeros_like": CREATION,
    "aten.ones_like": CREATION,
    "aten.full_like": CREATION,
    "aten.empty_like": CREATION,
    "aten.new_zeros": CREATION,
    "aten.new_ones": CREATION,
    "aten.new_full": CREATION,
    "aten.scalar_tensor": CREATION,
}
# Ops that compute each element of the result from the same one of the inputs (broadcast), and ops that normalise rows: what can share a
# kernel. Named one by one: a row of `pointwise` costs may as well be a reduction's.
ON_ELEMENTS = frozenset(
    """
    gelu silu softplus log sin cos pow relu tanh sigmoid exp sqrt rsqrt reciprocal add sub rsub neg mul div where masked_fill clamp dropout
    native_dropout tril triu to _to_copy type_as
    """.split()  # noqa: SIM905 - thirty short names, not thirty lines
)
NORMALISING = frozenset("softmax _softmax log_softmax _log_softmax layer_norm native_layer_norm rms_norm _fused_rms_norm".split())  # noqa: SIM905
ELEMENTWISE = pointwise(1, keeps_inputs)  # an op without a row


@lru_cache(maxsize=4096)
def base_name(name: str) -> str:
    """The op's name without overload and in-place underscore: "aten.add_.Tensor" -> "aten.add", "<built-in function
    getitem>" -> "getitem".
    """
    name = name.removeprefix("torch.ops.").removeprefix("<built-in function ").removesuffix(">")
    parts = name.split(".")
    if parts[0] in ("operator", "_operator"):
        return parts[-1]
    base = ".".join(parts[:2])
    return base[:-1] if base.endswith("_") and not base.endswith("__") else base


@lru_cache(maxsize=4096)
def is_view(name: str) -> bool:
    """True for ops that only rename memory: they cost nothing and save nothing."""
    return base_name(name).removeprefix("aten.") in VIEWS


def is_on_elements(name: str) -> bool:
    """True for ops whose kernel can also do what comes before and after it."""
    return base_name(name).removeprefix("aten.") in ON_ELEMENTS


def normalises(name: str) -> bool:
    """True for ops whose kernel can also do what comes before it."""
    return base_name(name).removeprefix("aten.") in NORMALISING


def op_cost(
    name: str,
    inputs: Sequence[TensorShape],
    outputs: Sequence[TensorShape],
    trainable: Sequence[bool],
    causal: bool = False,
) -> Cost:
    """The cost of one op from its tensor inputs and outputs; `trainable` says of each input whether a gradient flows to
    it.

    Cached: equal calls give the same object. ZERO for views. BadArgument if `trainable` and `inputs` differ in length,
    or the op has fewer tensors than its row reads.
    """
    return _op_cost(name, tuple(inputs), tuple(outputs), tuple(trainable), causal)


def op_saves(
    name: str,
    inputs: Sequence[TensorShape],
    outputs: Sequence[TensorShape],
    trainable: Sequence[bool],
    causal: bool = False,
) -> Saved:
    """Which inputs and outputs autograd keeps for this op's backward, parameters excluded, and the bytes of what is
    neither.

    For callers who count an activation once however many ops save it. Nothing for views and where no input needs a
    gradient.
    """
    call = _checked_call(name, tuple(inputs), tuple(outputs), tuple(trainable), causal)
    if is_view(name) or not any(call.trainable):
        return Saved()
    saved = _row(name).saves(call)
    kept = tuple(index for index in saved.inputs if not call.inputs[index].parameter)
    return Saved(kept, saved.outputs, saved.extra_bytes)


def _row(name: str) -> OpRow:
    return OP_COSTS.get(base_name(name), ELEMENTWISE)


def _checked_call(
    name: str,
    inputs: tuple[TensorShape, ...],
    outputs: tuple[TensorShape, ...],
    trainable: tuple[bool, ...],
    causal: bool,
) -> Call:
    if len(inputs) != len(trainable):
        raise BadArgument(f"{name}: {len(inputs)} inputs but {len(trainable)} trainable flags", use="one flag an input")
    # Integers and booleans carry no gradients, whatever the caller says of them.
    possible = any(tensor.floating for tensor in outputs)
    flags = tuple(possible and wanted and tensor.floating for tensor, wanted in zip(inputs, trainable, strict=True))
    return Call(inputs, outputs, flags, causal)


@lru_cache(maxsize=65536)
def _op_cost(
    name: str,
    inputs: tuple[TensorShape, ...],
    outputs: tuple[TensorShape, ...],
    trainable: tuple[bool, ...],
    causal: bool,
) -> Cost:
    if is_view(name):
        return ZERO
    call = _checked_call(name, inputs, outputs, trainable, causal)
    try:
        return _row(name)(call.inputs, call.outputs, call.trainable, causal)
    except IndexError:
        shapes = ", ".join(str(tensor.shape) for tensor in inputs)
        raise BadArgument(
            f"cannot price {name} of ({shapes}) -> {len(outputs)} outputs",
            why="its row in costmodel.ops.OP_COSTS reads more tensors or dims than it has",
        ) from None

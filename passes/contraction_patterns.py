"""The annotations of matmuls, attention, convolutions and losses (see `passes.patterns`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from passes.ir import Size
from passes.patterns import Call, Pattern, Text, all_whole, dim_names, elementwise

NONE, MEAN, SUM = 0, 1, 2  # ATen's loss reductions

# ---- contractions
# -----------------------------------------------------------------------------------------------------------


def _ones(names: str, shape: Sequence[Size]) -> str:
    """The last names, as many as the shape has dims, with `1` wherever it has size 1 (broadcast)."""
    tokens = re.findall(r"\([^()]*\)|\S+", names)
    return " ".join(
        "1" if size == 1 else token for token, size in zip(tokens[len(tokens) - len(shape) :], shape, strict=True)
    )


def linear(call: Call) -> str:
    """x @ W.T, and a bias that must be added once."""
    return "... k, n k -> ... n" if len(call.inputs) == 2 else "... [k], n [k], n -> ... n"


def matmul(call: Call) -> str:
    """Any ranks."""
    left, right = call.rank(0), call.rank(1)
    batch = "..." if max(left, right) > 2 else ""
    first, second = "... m k" if left > 1 else "k", "... k n" if right > 1 else "k"
    return f"{first}, {second} -> {batch} {'m' if left > 1 else ''} {'n' if right > 1 else ''}"


def addmm(call: Call) -> str:
    """bias + a @ b, the bias broadcast and added once."""
    return f"{_ones('m n', call.inputs[0].shape)}, m [k], [k] n -> m n"


def baddbmm(call: Call) -> str:
    """bias + a @ b in batches."""
    return f"{_ones('b m n', call.inputs[0].shape)}, b m [k], b [k] n -> b m n"


def addbmm(call: Call) -> str:
    """bias + the sum of a @ b over the batch."""
    return f"{_ones('m n', call.inputs[0].shape)}, [b] m [k], [b] [k] n -> m n"


def addmv(call: Call) -> str:
    """bias + a @ v."""
    return f"{_ones('m', call.inputs[0].shape)}, m [k], [k] -> m"


def addr(call: Call) -> str:
    """bias + the outer product."""
    return f"{_ones('m n', call.inputs[0].shape)}, m, n -> m n"


def bilinear(call: Call) -> str:
    """x W y, and a bias that must be added once."""
    if len(call.inputs) > 3:
        return "... [i], ... [j], o [i] [j], o -> ... o"
    return "... i, ... j, o i j -> ... o"


def linear_without_bias(call: Call) -> str:
    """Of `bilinear`: any one argument may be a partial sum."""
    return "each" if len(call.inputs) == 3 else ""


def cross(call: Call) -> str:
    """The dim of three stays whole."""
    dim = call.argument(2, "dim", -1) % len(call.outputs[0].shape)
    if any(len(value.shape) != len(call.outputs[0].shape) for value in call.inputs):
        return all_whole(call)
    names = " ".join(f"[{name}]" if k == dim else name for k, name in enumerate(dim_names(len(call.outputs[0].shape))))
    return f"{names}, {names} -> {names}"


def matrices(call: Call) -> str:
    """Linear algebra on the last two dims; batches of matrices are free where no operand is broadcast."""
    batch = call.inputs[0].shape[:-2]
    if any(value.shape[: len(batch)] != batch for value in (*call.inputs, *call.outputs)):
        return all_whole(call)
    texts = [
        " ".join([*dim_names(len(batch)), *(f"[{'xy'[side]}{k}_{d}]" for d in range(len(value.shape) - len(batch)))])
        for side, values in enumerate((call.inputs, call.outputs))
        for k, value in enumerate(values)
    ]
    return f"{', '.join(texts[: len(call.inputs)])} -> {', '.join(texts[len(call.inputs) :])}"


def weight_norm(call: Call) -> str:
    """Each row (dim 0), or each entry of the last dim, is scaled to a norm of its own: those are free."""
    rank, dim = call.rank(), call.argument(2, "dim", 0)
    names = [name if k == dim else f"[{name}]" for k, name in enumerate(dim_names(rank))]
    norms = [f"d{dim}" if k == dim else "1" for k in range(rank)]
    scale = norms if call.rank(1) == rank else [f"d{dim}"]
    result = scale if len(call.outputs[1].shape) != rank else norms
    return f"{' '.join(names)}, {' '.join(scale)} -> {' '.join(names)}, {' '.join(result)}"


def einsum(call: Call) -> str:
    """The equation itself; a letter that an operand repeats (a diagonal) keeps everything whole."""
    left, arrow, right = call.args[0].replace(" ", "").partition("->")
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(
            letter for letter in sorted(set(letters)) if letters.count(letter) == 1
        )
    operands = left.split(",")
    letters = [operand.replace("...", "") for operand in operands]
    if any(len(set(text)) != len(text) for text in letters) or ("..." in left and "..." not in right):
        return all_whole(call)

    def spaced(text: str) -> str:
        return " ".join(re.findall(r"\.\.\.|\w", text))

    return f"{', '.join(map(spaced, operands))} -> {spaced(right)}"


def attention(call: Call) -> str:
    """Batch and heads; with fewer key heads than query heads, groups of query heads stay with theirs."""
    query, key = call.inputs[0].shape, call.inputs[1].shape
    if len(query) != 4:
        return (
            ", ".join(["... [t] [d]", "... [s] [d]", "... [s] [e]", "... [t] [s]"][: len(call.inputs)])
            + " -> ... [t] [e]"
        )
    heads = "(h g)" if query[1] != key[1] else "h"
    patterns = [f"b {heads} [t] [d]", "b h [s] [d]", "b h [s] [e]"]
    if len(call.inputs) > 3:
        patterns.append(_ones(f"b {heads} [t] [s]", call.inputs[3].shape))
    return ", ".join(patterns) + f" -> b {heads} [t] [e]"


def convolution(call: Call) -> Text:
    """Output channels, or input channels to a partial sum (no bias then); grouped, both inside each group, or groups."""
    return _convolution(call, call.argument(6, "groups", 1), "o", "i")


def transposed_convolution(call: Call) -> Text:
    """The same with a weight whose first dim is the input channels."""
    return _convolution(call, call.argument(6, "groups", 1), "i", "o")


def _convolution(call: Call, groups: int, first: str, second: str) -> Text:
    space, kernel, out = (" ".join(f"[{side}{k}]" for k in range(call.rank(1) - 2)) for side in "xky")
    rows = "n" if call.rank() == call.rank(1) else ""
    if len(call.inputs) > 2:  # a bias is added once: input channels stay whole
        first, second = (f"[{name}]" if name == "i" else name for name in (first, second))
    inside, outside = (second, first) if "i" in second else (first, second)

    def grouped(name: str) -> str:
        return name if groups == 1 else f"(g {name})"

    bias = f", {grouped(outside)}" if len(call.inputs) > 2 else ""
    text = f"{rows} {grouped(inside)} {space}, {grouped(first)} {second} {kernel}{bias} -> {rows} {grouped(outside)} {out}"
    return (text, (("g", groups),)) if groups != 1 else text


GROUPED_ALIGNMENT_BYTES = 16  # grouped kernels want rows that begin at multiples of it


def grouped_matmul(call: Call) -> Text:
    """Matmuls of groups: rows t of a 2d left operand, columns of a 2d right one, or the contracted dim of two 2d
    operands belong to groups as `offs` says, so they stay whole, as do the groups. The others may be split, in pieces
    that keep rows aligned."""
    left, right = call.inputs[:2]
    sizes: dict[str, Size] = {"u": GROUPED_ALIGNMENT_BYTES // left.dtype.itemsize}

    def free(name: str, size: Size) -> str:
        return f"({name} [u])" if isinstance(size, int) and size % sizes["u"] == 0 else f"[{name}]"

    two = len(left.shape), len(right.shape)
    grouped = {(2, 3): "m", (3, 2): "n", (2, 2): "k", (3, 3): ""}[two]
    names = {"m": left.shape[-2], "k": left.shape[-1], "n": right.shape[-1]}
    m, k, n = (f"[{name}]" if name == grouped else free(name, size) for name, size in names.items())
    if len(call.inputs) > 3:
        return all_whole(call)  # a bias a group, which no kernel takes yet
    operands = [f"{'[e] ' if two[0] == 3 else ''}{m} {k}", f"{'[e] ' if two[1] == 3 else ''}{k} {n}"]
    offsets = ["[e]"] * (len(call.inputs) - 2)
    batch = "[e] " if len(call.outputs[0].shape) == 3 else ""
    return f"{', '.join([*operands, *offsets])} -> {batch}{m} {n}", tuple(sizes.items())


# ---- losses
# -----------------------------------------------------------------------------------------------------------------


def loss(at: int = 2) -> Pattern:
    """An elementwise loss: free without reduction, partial sums for a sum; a mean stays whole."""

    def pattern(call: Call) -> str:
        reduction = call.argument(at, "reduction", MEAN)
        if reduction == NONE:
            return elementwise(call)
        if reduction == MEAN or any(value.shape != call.inputs[0].shape for value in call.inputs):
            return all_whole(call)
        return ", ".join([" ".join(dim_names(call.rank()))] * len(call.inputs)) + " -> "

    return pattern


def _class_loss(call: Call, classes: str, reduction: int) -> str:
    """Logits or log probabilities [n, c, ...] and targets [n, ...]; a mean counts the targets of all rows."""
    if len(call.inputs) > 2 or call.inputs[1].dtype.is_floating_point:  # weights or probabilities of classes
        return all_whole(call)
    free = reduction != MEAN
    rows = [f"n{k}" if free else f"[n{k}]" for k in range(max(call.rank() - 1, 0))]
    logits = " ".join([*rows[:1], classes, *rows[1:]])
    return f"{logits}, {' '.join(rows)} -> {' '.join(rows) if reduction == NONE else ''}"


def cross_entropy(call: Call) -> str:
    """The classes may be split (`local`)."""
    return _class_loss(call, "c", call.argument(3, "reduction", MEAN))


def nll_loss(call: Call) -> str:
    """The classes stay whole."""
    return _class_loss(call, "[c]", call.argument(3, "reduction", MEAN))

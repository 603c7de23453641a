"""The annotations of matmuls, attention, convolutions and losses (see `passes.patterns`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from passes.ir import Size
from passes.patterns import Call, Pattern, all_whole, dim_names, elementwise

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


def convolution(call: Call) -> str:
    """Output channels, or input channels to a partial sum (no bias then); grouped, both inside each group."""
    space, kernel = (" ".join(f"[{side}{k}]" for k in range(call.rank(1) - 2)) for side in ("x", "k"))
    out = " ".join(f"[y{k}]" for k in range(call.rank(1) - 2))
    rows = "n" if call.rank() == call.rank(1) else ""
    groups, inner = call.argument(6, "groups", 1), "i" if len(call.inputs) == 2 else "[i]"
    before, after = ("([g] i)", "([g] o)") if groups != 1 else (inner, "o")
    bias = f", {after}" if len(call.inputs) > 2 else ""
    return f"{rows} {before} {space}, {after} {inner} {kernel}{bias} -> {rows} {after} {out}"


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

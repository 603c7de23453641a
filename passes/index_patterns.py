"""The annotations of ops that read and write by index, along diagonals, or look values up (see `passes.patterns`)."""

from __future__ import annotations

import torch

from passes.ir import TensorType
from passes.patterns import Call, Text, all_whole, dim_names, index


def along_dim(call: Call) -> str:
    """index_add, index_copy, index_fill: one dim is written at a list of places; it stays whole, the others are free."""
    names, dim = dim_names(call.rank()), call.args[1] % max(call.rank(), 1)

    def whole(inside: str) -> str:
        return " ".join(f"[{inside}]" if k == dim else name for k, name in enumerate(names))

    source = [whole("s") if value.shape else "" for value in call.inputs[2:]]
    places = "[s]" if call.rank(1) else ""
    return f"{', '.join([whole('d'), places, *source])} -> {whole('d')}"


def put(call: Call) -> str:
    """x[i, :, j] = values: the indexed dims and what is written stay whole there, the other dims of x are free. A mask of
    the shape of x with one value for all is elementwise."""
    indices = call.args[1]
    given = [item for item in indices if isinstance(item, TensorType)]
    values = call.inputs[-1]
    if len(given) == 1 and given[0].dtype in (torch.bool, torch.uint8):
        if indices[0] is None or values.shape not in ((), (1,)):
            return all_whole(call)
        names = dim_names(call.rank())
        one = " ".join("1" for _ in values.shape)
        return f"{' '.join(names)}, {' '.join(names[: len(given[0].shape)])}, {one} -> {' '.join(names)}"
    if any(item.dtype in (torch.bool, torch.uint8) for item in given):
        return all_whole(call)
    read = Call(call.op, call.args, {}, call.inputs[:-1], (values,))  # what `index` with the same indices would read
    left, _, right = index(read).partition(" -> ")
    chosen = [f"[{name}]" if name.startswith("i") else name for name in right.split()]
    if len(chosen) < len(values.shape):
        return all_whole(call)
    offset = len(chosen) - len(values.shape)
    written = " ".join("1" if size == 1 else name for name, size in zip(chosen[offset:], values.shape, strict=True))
    x, *places = left.split(", ")
    whole = [" ".join(name if name == "1" else f"[{name}]" for name in place.split()) for place in places]
    return f"{', '.join([x, *whole, written])} -> {x}"


def taken(call: Call) -> str:
    """take: any entry of the flattened first argument, by indices that are free."""
    names = " ".join(dim_names(call.rank(1), "i"))
    return f"{' '.join(f'[{name}]' for name in dim_names(call.rank()))}, {names} -> {names}"


def sorted_places(call: Call) -> str:
    """searchsorted: rows of a sorted table, or one for all; the values looked up are free."""
    if len(call.inputs) > 2 or call.op is not torch.ops.aten.searchsorted.Tensor:
        return all_whole(call)
    names = dim_names(call.rank(1))
    table = "[s]" if call.rank() == 1 else " ".join([*names[:-1], "[s]"])
    return f"{table}, {' '.join(names)} -> {' '.join(names)}"


def diagonal(call: Call) -> str:
    """Two dims become a new last one, their diagonal."""
    rank = call.rank()
    pair = {call.argument(2, "dim1", 0) % rank, call.argument(3, "dim2", 1) % rank}
    names = dim_names(rank)
    free = [name for k, name in enumerate(names) if k not in pair]
    return f"{' '.join(f'[{n}]' if k in pair else n for k, n in enumerate(names))} -> {' '.join(free)} [diagonal]"


def embedded_diagonal(call: Call) -> str:
    """The inverse: the last dim becomes the diagonal of two new ones."""
    rank = call.rank() + 1
    pair = {call.argument(2, "dim1", -2) % rank, call.argument(3, "dim2", -1) % rank}
    free = iter(dim_names(rank - 2))
    right = [f"[y{k}]" if k in pair else next(free) for k in range(rank)]
    return f"{' '.join([*dim_names(rank - 2), '[diagonal]'])} -> {' '.join(right)}"


def bags(call: Call) -> Text:
    """embedding_bag: features of a table whose rows are summed, averaged or compared; bags and rows stay whole."""
    if call.argument(3, "scale_grad_by_freq", False) or call.argument(5, "sparse", False):
        return all_whole(call)
    rest = [" ".join(f"[x{k}_{d}]" for d in range(len(v.shape))) for k, v in enumerate(call.inputs[1:])]
    first = call.outputs[0].shape
    ends = [
        "[bags] c" if value.shape == first else " ".join(f"[y{k}_{d}]" for d in range(len(value.shape)))
        for k, value in enumerate(call.outputs)
    ]
    return f"{', '.join(['[rows] c', *rest])} -> {', '.join(ends)}"

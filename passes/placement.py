"""Placements: where the pieces of a tensor live on one mesh axis, and the one notation in which they are printed and parsed.

A placement says what a rank holds of a value *and* of its gradient, because a plan for training needs both:

=============  ==============================  =====================================
placement      the value on each rank          its gradient on each rank
=============  ==============================  =====================================
Replicate      whole, the same                 whole, the same
Copied         whole, the same                 a partial sum: still owes an all_reduce
Shard(dim)     its part of `dim`               its part of `dim`
Partial        a partial sum                   whole, the same
=============  ==============================  =====================================

`Copied` and `Partial` are duals. Backward is linear in the incoming gradient, so any op may run wholly in `Copied`; the all_reduce
that is owed is paid where `Replicate` turns into `Copied` (per microbatch), or once a step if the value is a parameter.

Fused dims. A dim made of several blocks (q, k and v in one projection) must be split inside each block. `Shard.segments` says how:
an int (or a size expression) is a number of equal blocks, a tuple gives the blocks' own sizes. Each block is cut in `axis_size`
equal pieces and a rank holds its piece of every block. `Shard.unit` is the finest block that stays together (a head); it is only
there to be printed: `(3 12/tp 64) 768` is dim 0 of 2304 rows = 3 blocks of 12 heads of 64, the heads split over tp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch.utils._sympy import functions as size_functions

from costmodel.errors import BadPlan, UnevenShard
from passes.ir import DTYPE_NAMES, DTYPES, Size, TensorType, size_symbol


@dataclass(frozen=True)
class Replicate:
    """Whole on every rank; the gradient too."""


@dataclass(frozen=True)
class Copied:
    """Whole on every rank; each rank's gradient is a partial sum."""


@dataclass(frozen=True)
class Partial:
    """Each rank holds a summand; the gradient is whole on every rank."""


@dataclass(frozen=True)
class Shard:
    """Split along `dim`: each of the `segments` blocks in equal pieces, one a rank."""

    dim: int
    segments: Size | tuple[int, ...] = 1
    unit: int = field(default=1, compare=False)


Placement = Replicate | Copied | Partial | Shard
REPLICATE, COPIED, PARTIAL = Replicate(), Copied(), Partial()
Sharding = Mapping[str, Placement]  # mesh axis -> placement; an axis that is not named is Replicate


def is_whole(placement: Placement) -> bool:
    """True if every rank holds the whole value."""
    return isinstance(placement, (Replicate, Copied))


def segment_sizes(size: Size, segments: Size | tuple[int, ...]) -> tuple[Size, ...] | None:
    """The block sizes of a dim of `size`; None for a symbolic number of blocks."""
    if isinstance(segments, tuple):
        return segments
    if isinstance(segments, int):
        return (size // segments,) * segments
    return None


def divides(size: Size, segments: Size | tuple[int, ...], axis_size: int) -> bool:
    """True if each block of a dim of `size` splits evenly over `axis_size` ranks; symbolic blocks are taken to, and checked at run time."""
    if isinstance(segments, tuple):
        return sum(segments) == size and all(block % axis_size == 0 for block in segments)
    if isinstance(size, int) and isinstance(segments, int):
        return size % segments == 0 and size // segments % axis_size == 0
    block = sympy.sympify(size) / segments
    return int(block) % axis_size == 0 if block.is_Integer else bool(block.is_integer)


def local_size(size: Size, placement: Placement, dim: int, axis_size: int) -> Size:
    """Size of `dim` on one rank."""
    if isinstance(placement, Shard) and placement.dim == dim:
        return size // axis_size if isinstance(size, int) else sympy.sympify(size) / axis_size
    return size


def local_type(value: TensorType, sharding: Sharding, axis_sizes: Mapping[str, int]) -> TensorType:
    """The type of one rank's piece."""
    shape = list(value.shape)
    for axis, placement in sharding.items():
        if isinstance(placement, Shard):
            shape[placement.dim] = local_size(shape[placement.dim], placement, placement.dim, axis_sizes[axis])
    return TensorType(value.dtype, tuple(shape))


# ---- real tensors -------------------------------------------------------------------------------------------------


def local_shard(tensor: torch.Tensor, placement: Placement, *, axis_size: int, coord: int) -> torch.Tensor:
    """The piece of `tensor` that rank `coord` of `axis_size` holds; the tensor itself where it is whole. Views where possible.

    UnevenShard if a block of the dim is not divisible by `axis_size`.
    """
    if not isinstance(placement, Shard) or axis_size == 1:
        return tensor
    size = tensor.shape[placement.dim]
    blocks = segment_sizes(size, placement.segments)
    if blocks is None or not divides(size, placement.segments, axis_size):
        raise UnevenShard(
            f"cannot split dim {placement.dim} of {tuple(tensor.shape)} in blocks {placement.segments} over {axis_size} ranks"
        )
    pieces = [block.chunk(axis_size, placement.dim)[coord] for block in tensor.split(list(blocks), placement.dim)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, placement.dim)


def whole_tensor(pieces: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
    """The inverse of `local_shard`: the whole value from every rank's piece, in order of coords."""
    if isinstance(placement, Partial):
        return torch.stack(list(pieces)).sum(0)
    if not isinstance(placement, Shard) or len(pieces) == 1:
        return pieces[0]
    dim, axis_size = placement.dim, len(pieces)
    blocks = segment_sizes(pieces[0].shape[dim] * axis_size, placement.segments)
    assert blocks is not None
    parts = [piece.split([int(block) // axis_size for block in blocks], dim) for piece in pieces]
    return torch.cat([parts[coord][block] for block in range(len(blocks)) for coord in range(axis_size)], dim)


# ---- notation -----------------------------------------------------------------------------------------------------


def _dim_text(size: Size, axis: str | None, shard: Shard | None) -> str:
    if shard is None or axis is None:
        return _size_text(size)
    if isinstance(shard.segments, tuple):
        return "(" + " + ".join(f"{block}/{axis}" for block in shard.segments) + ")"
    if shard.segments == 1:
        return f"{_size_text(size)}/{axis}"
    block = sympy.sympify(size) / shard.segments
    unit = f" {shard.unit}" if shard.unit > 1 and block != shard.unit else ""
    return f"({_size_text(shard.segments)} {_size_text(block / shard.unit if unit else block)}/{axis}{unit})"


def _size_text(size: Size) -> str:
    return str(size) if not isinstance(size, sympy.Expr) or size.is_Atom else str(size).replace(" ", "")


def dims_text(shape: Sequence[Size], sharding: Sharding) -> tuple[list[str], str]:
    """Each dim in the notation, and the suffix that names axes with sums still owed (`partial(tp)`)."""
    by_dim = {p.dim: (axis, p) for axis, p in sharding.items() if isinstance(p, Shard)}
    dims = [_dim_text(size, *by_dim.get(dim, (None, None))) for dim, size in enumerate(shape)]
    owed = [axis for axis, p in sharding.items() if isinstance(p, Partial)]
    return dims, "".join(f" partial({axis})" for axis in owed)


def notation(shape: Sequence[Size], sharding: Sharding) -> str:
    """A parameter's placement as it is printed: `3072/tp 768`, `(3 12/tp 64) 768`, `768` (whole)."""
    dims, suffix = dims_text(shape, sharding)
    return (" ".join(dims) or "scalar") + suffix


def type_text(value: TensorType, sharding: Sharding) -> str:
    """A value's type as it is printed after a statement: `f32[B, T, 4096/tp]`, `f32[B, T, 768] partial(tp)`."""
    dims, suffix = dims_text(value.shape, sharding)
    return f"{DTYPE_NAMES[value.dtype]}[{', '.join(dims)}]{suffix}"


_TOKEN = re.compile(r"\([^()]*(?:\([^()]*\)[^()]*)*\)(?:/\w+)?|[^\s()]+(?:\([^()]*\)[^\s()]*)*")
_SUFFIX = re.compile(r"\s*partial\((\w+)\)\s*$")


# The integer functions that torch puts into size expressions, by the names that they print under.
_SIZE_FUNCTIONS = {
    name: kind
    for name, kind in vars(size_functions).items()
    if isinstance(kind, type) and issubclass(kind, sympy.Basic)
}


def parse_size(text: str) -> Size:
    """The size that was printed: "128", "2*T", "Max(1, T//2)". BadPlan if it is none."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    names = {name: size_symbol(name) for name in re.findall(r"\b[A-Za-z_]\w*\b(?!\()", text)}
    try:
        expr = sympy.sympify(text, locals={**_SIZE_FUNCTIONS, **names})
    except (sympy.SympifyError, SyntaxError, TypeError) as error:
        raise BadPlan(f"cannot read the size {text!r}") from error
    return int(expr) if expr.is_Integer else expr


def _parse_dim(text: str, dim: int, axes: Sequence[str]) -> tuple[Size, tuple[str, Shard] | None]:
    """A dim's whole size and, if it is split, (axis, Shard)."""

    def split_axis(part: str) -> tuple[str, str | None]:
        for axis in axes:
            if part.endswith("/" + axis):
                return part[: -len(axis) - 1], axis
        return part, None

    if not (text.startswith("(") and text.endswith(")")) or not any(f"/{axis}" in text for axis in axes):
        size_text, axis = split_axis(text)
        size = parse_size(size_text)
        return size, ((axis, Shard(dim)) if axis else None)
    inner = text[1:-1].strip()
    if " + " in inner:
        blocks = [split_axis(part.strip()) for part in inner.split(" + ")]
        sizes = tuple(int(size) for size, _ in blocks)
        axis = blocks[0][1]
        if axis is None or any(other != axis for _, other in blocks):
            raise BadPlan(f"cannot read the dim {text!r}: every block must be split over one axis")
        return sum(sizes), (axis, Shard(dim, sizes))
    total: Size = 1
    segments: Size = 1
    unit = 1
    found: str | None = None
    for part in inner.split():
        size_text, axis = split_axis(part)
        size = parse_size(size_text)
        total = total * size
        if axis:
            found = axis
        elif found is None:
            segments = segments * size
        elif isinstance(size, int):
            unit *= size
    if found is None:
        raise BadPlan(f"cannot read the dim {text!r}")
    return total, (found, Shard(dim, segments, unit))


def parse_notation(text: str, axes: Sequence[str]) -> tuple[tuple[Size, ...], dict[str, Placement]]:
    """The whole shape and the sharding that `notation` printed. BadPlan if it cannot be read."""
    sharding: dict[str, Placement] = {}
    while match := _SUFFIX.search(text):
        sharding[match[1]] = PARTIAL
        text = text[: match.start()]
    return _parse_dims([] if text.strip() == "scalar" else _TOKEN.findall(text), sharding, axes)


def parse_type(text: str, axes: Sequence[str]) -> tuple[TensorType, dict[str, Placement]]:
    """The whole type and the sharding that `type_text` printed. BadPlan if it cannot be read."""
    match = re.fullmatch(r"\s*(\w+)\[(.*)\]((?:\s*partial\(\w+\))*)\s*", text)
    if match is None or match[1] not in DTYPES:
        raise BadPlan(f"cannot read the type {text!r}; it should look like f32[B, T, 768/tp]")
    sharding: dict[str, Placement] = {axis: PARTIAL for axis in re.findall(r"partial\((\w+)\)", match[3])}
    shape, sharding = _parse_dims(_parts(match[2]), sharding, axes)
    return TensorType(DTYPES[match[1]], shape), sharding


def _parts(text: str) -> list[str]:
    """The dims between the commas that are in no parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _parse_dims(
    dims: Sequence[str], sharding: dict[str, Placement], axes: Sequence[str]
) -> tuple[tuple[Size, ...], dict[str, Placement]]:
    shape = []
    for dim, part in enumerate(dims):
        size, shard = _parse_dim(part, dim, axes)
        shape.append(size)
        if shard is not None:
            sharding[shard[0]] = shard[1]
    return tuple(shape), sharding


def local_shape(
    text: str, sizes: Mapping[str, int], axis_sizes: Mapping[str, int]
) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of one rank's piece of a value whose type reads `text`, for concrete sizes (`{"B": 8, "T": 128}`)."""
    value, sharding = parse_type(text, tuple(axis_sizes))
    local = local_type(value, sharding, axis_sizes)
    numbers = {size_symbol(name): number for name, number in sizes.items()}
    shape = [size if isinstance(size, int) else size.subs(numbers) for size in local.shape]
    for size in shape:
        if not isinstance(size, int) and not size.is_Integer:
            given = ", ".join(f"{name} = {number}" for name, number in sizes.items())
            raise UnevenShard(
                f"cannot split {text} evenly",
                why=f"{given or 'its sizes are unknown'}, {dict(axis_sizes)}",
                use="sizes that the axis divides",
            )
    return value.dtype, tuple(int(size) for size in shape)

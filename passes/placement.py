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
equal pieces and a rank holds its piece of every block. `Shard.unit` is the finest block that stays together (a head):
`(3 12/tp 64) 768` is dim 0 of 2304 rows = 3 blocks of 12 heads of 64, the heads split over tp.

Dims that the axis does not divide. A block of n units over p ranks is cut in pieces of ceil(n / p) units: 18 rows over 4 ranks are
5, 5, 5 and 3, and 6 heads are 2, 2, 2 and 0 (`18/tp`, `(6/tp 8)`). What such a split means depends on who holds it:

- a parameter holds its true rows, so that optimizers, norms and state dicts never see padding; a rank may hold none (torch's DTensor
  cuts likewise);
- a value in a program has the full piece on every rank: behind the true entries is padding. All ranks then run the same text.

Two things are true of padding, and every op rule that runs on a padded dim keeps them: its entries are finite, and the gradient that
comes back to them is zero (`passes.rules`). `Shard.piece` is the length of a rank's piece of a block where whole units make it another
than ceil(block / p), else 0, so that two splits are equal exactly if they lay a dim out alike. Symbolic sizes have to be divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

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
    """Split along `dim`: each of the `segments` blocks in pieces of whole units, one a rank. `piece`: 0, or a padded piece's length."""

    dim: int
    segments: Size | tuple[int, ...] = 1
    unit: int | tuple[int, ...] = field(default=1, compare=False)
    piece: int | tuple[int, ...] = 0


Placement = Replicate | Copied | Partial | Shard
REPLICATE, COPIED, PARTIAL = Replicate(), Copied(), Partial()
Axes = Sequence[str] | Mapping[str, int]  # names of mesh axes, with or without their sizes
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


# ---- pieces -------------------------------------------------------------------------------------------------------


def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)


def per_block(given: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """One number a block."""
    return given if isinstance(given, tuple) else (given,) * count


def alike(numbers: Sequence[int]) -> int | tuple[int, ...]:
    """One number if all are the same."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def settled(
    blocks: Sequence[int], pieces: Sequence[int], units: Sequence[int], axis_size: int
) -> tuple[int | tuple[int, ...], int | tuple[int, ...]] | None:
    """(unit, piece) as a `Shard` holds them for pieces of these lengths; None if they are not the pieces of these units."""
    plain = [ceil_div(block, axis_size) for block in blocks]
    fits = all(
        block % unit == 0 and ceil_div(block // unit, axis_size) * unit == piece
        for block, piece, unit in zip(blocks, pieces, units, strict=True)
    )
    if not fits:
        return (1, 0) if list(pieces) == plain else None
    return alike(units), 0 if list(pieces) == plain else alike(pieces)


def in_units(
    dim: int, size: int, segments: int | tuple[int, ...] = 1, unit: int | tuple[int, ...] = 1, *, axis_size: int
) -> Shard:
    """The split of a dim of `size` in which units stay together, padded where the axis does not divide them."""
    blocks = segment_sizes(size, segments)
    assert blocks is not None
    units = per_block(unit, len(blocks))
    numbers = [int(block) for block in blocks]
    if any(block % one for block, one in zip(numbers, units, strict=True)):
        units = (1,) * len(blocks)
    pieces = [ceil_div(block // one, axis_size) * one for block, one in zip(numbers, units, strict=True)]
    found = settled(numbers, pieces, units, axis_size)
    assert found is not None
    return Shard(dim, segments, *found)


def piece_sizes(blocks: Sequence[int], placement: Shard, axis_size: int) -> tuple[int, ...]:
    """How long a rank's piece of each block is, padding included."""
    if placement.piece:
        return per_block(placement.piece, len(blocks))
    units = per_block(placement.unit, len(blocks))
    return tuple(
        ceil_div(block // unit, axis_size) * unit if block % unit == 0 else ceil_div(block, axis_size)
        for block, unit in zip(blocks, units, strict=True)
    )


def is_padded(size: Size, placement: Placement, axis_size: int) -> bool:
    """True if some rank's piece of a dim of `size` has padding in it."""
    if not isinstance(placement, Shard) or axis_size == 1 or not isinstance(size, int):
        return False
    blocks = segment_sizes(size, placement.segments)
    if blocks is None:
        return False
    numbers = [int(block) for block in blocks]
    pieces = piece_sizes(numbers, placement, axis_size)
    return any(piece * axis_size != block for block, piece in zip(numbers, pieces, strict=True))


def can_be_padded(size: Size, placement: Shard, axis_size: int) -> bool:
    """True if a dim of `size` may be split so: two ranks have a part of it, and at most half of what all hold is padding."""
    segments = placement.segments
    if not isinstance(size, int) or axis_size == 1 or isinstance(segments, sympy.Expr):
        return False
    if sum(segments) != size if isinstance(segments, tuple) else size % segments:
        return False
    blocks = segments if isinstance(segments, tuple) else (size // segments,)
    pieces = piece_sizes(blocks, placement, axis_size)
    return all(0 < piece < block and piece * axis_size <= 2 * block for block, piece in zip(blocks, pieces, strict=True))


def local_size(size: Size, placement: Placement, dim: int, axis_size: int) -> Size:
    """Size of `dim` on one rank, padding included."""
    if not isinstance(placement, Shard) or placement.dim != dim:
        return size
    if is_padded(size, placement, axis_size):
        assert isinstance(size, int)
        blocks = segment_sizes(size, placement.segments)
        assert blocks is not None
        return sum(piece_sizes([int(block) for block in blocks], placement, axis_size))
    return size // axis_size if isinstance(size, int) else sympy.sympify(size) / axis_size


def local_type(value: TensorType, sharding: Sharding, axis_sizes: Mapping[str, int]) -> TensorType:
    """The type of one rank's piece."""
    shape = list(value.shape)
    for axis, placement in sharding.items():
        if isinstance(placement, Shard):
            shape[placement.dim] = local_size(shape[placement.dim], placement, placement.dim, axis_sizes[axis])
    return TensorType(value.dtype, tuple(shape))


# ---- real tensors -------------------------------------------------------------------------------------------------


def _blocks(size: int, placement: Shard) -> list[int]:
    blocks = segment_sizes(size, placement.segments)
    if blocks is None or sum(blocks) != size:
        raise UnevenShard(f"cannot split a dim of {size} in blocks {placement.segments}")
    return [int(block) for block in blocks]


def held(blocks: Sequence[int], pieces: Sequence[int], coord: int) -> list[int]:
    """How many true entries of each block rank `coord` has."""
    return [min(max(block - coord * piece, 0), piece) for block, piece in zip(blocks, pieces, strict=True)]


def local_shard(
    tensor: torch.Tensor, placement: Placement, *, axis_size: int, coord: int, padded: bool = False
) -> torch.Tensor:
    """The piece of `tensor` that rank `coord` of `axis_size` holds; the tensor itself where it is whole. Views where possible.

    A dim that the axis does not divide: the true entries, perhaps none; with `padded` zeros behind them, up to the length that the
    piece has on every rank. UnevenShard if the dim is not made of the placement's blocks.
    """
    if not isinstance(placement, Shard) or axis_size == 1:
        return tensor
    dim = placement.dim
    blocks = _blocks(tensor.shape[dim], placement)
    pieces = piece_sizes(blocks, placement, axis_size)
    lengths = held(blocks, pieces, coord)
    parts = [
        block.narrow(dim, min(coord * piece, block.shape[dim]), length)
        for block, piece, length in zip(tensor.split(blocks, dim), pieces, lengths, strict=True)
    ]
    return together(parts, pieces if padded else lengths, dim)


def pad_piece(piece: torch.Tensor, placement: Shard, size: int, *, axis_size: int, coord: int) -> torch.Tensor:
    """The true entries that rank `coord` holds of a dim of `size`, with zeros up to the length that the piece has on every rank; itself
    where nothing is missing."""
    blocks = _blocks(size, placement)
    pieces = piece_sizes(blocks, placement, axis_size)
    lengths = held(blocks, pieces, coord)
    dim = placement.dim
    return piece if list(pieces) == lengths else together(piece.split(lengths, dim), pieces, dim)


def together(parts: Sequence[torch.Tensor], lengths: Sequence[int], dim: int) -> torch.Tensor:
    """The parts behind each other, each with zeros behind it up to its length. A single part of that length is itself."""
    padded = [
        part if part.shape[dim] == length else _with_zeros(part, length - part.shape[dim], dim)
        for part, length in zip(parts, lengths, strict=True)
    ]
    return padded[0] if len(padded) == 1 else torch.cat(padded, dim)


def _with_zeros(part: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    return torch.nn.functional.pad(part, [0, 0] * (part.ndim - 1 - dim) + [0, count])


def whole_tensor(pieces: Sequence[torch.Tensor], placement: Placement, size: int | None = None) -> torch.Tensor:
    """The inverse of `local_shard`: the whole value from every rank's piece, in order of coords.

    `size` is the dim's true size: needed where the pieces are padded, whose padding is left out.
    """
    if isinstance(placement, Partial):
        return torch.stack(list(pieces)).sum(0)
    if not isinstance(placement, Shard) or len(pieces) == 1:
        return pieces[0]
    dim, axis_size = placement.dim, len(pieces)
    blocks = _blocks(sum(piece.shape[dim] for piece in pieces) if size is None else size, placement)
    lengths = piece_sizes(blocks, placement, axis_size)
    parts = []
    for coord, piece in enumerate(pieces):
        true = held(blocks, lengths, coord)
        found = piece.split(list(lengths) if piece.shape[dim] == sum(lengths) else true, dim)
        parts.append([part.narrow(dim, 0, count) for part, count in zip(found, true, strict=True)])
    return torch.cat([parts[coord][block] for block in range(len(blocks)) for coord in range(axis_size)], dim)


# ---- notation -----------------------------------------------------------------------------------------------------


def _dim_text(size: Size, axis: str | None, shard: Shard | None) -> str:
    if shard is None or axis is None:
        return _size_text(size)
    if isinstance(shard.segments, tuple):
        units = per_block(shard.unit if shard.piece else 1, len(shard.segments))
        texts = [
            f"{block // unit}/{axis}" + (f" {unit}" if unit > 1 else "")
            for block, unit in zip(shard.segments, units, strict=True)
        ]
        return "(" + " + ".join(texts) + ")"
    assert isinstance(shard.unit, int)
    if shard.segments == 1:
        return f"({size // shard.unit}/{axis} {shard.unit})" if shard.piece else f"{_size_text(size)}/{axis}"
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


@lru_cache(maxsize=4096)
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


def _parse_dim(text: str, dim: int, axes: Axes) -> tuple[Size, tuple[str, Shard] | None]:
    """A dim's whole size and, if it is split, (axis, Shard)."""

    def shard(size: Size, axis: str, segments: Size | tuple[int, ...], unit: int | tuple[int, ...]) -> Shard:
        numbers = isinstance(size, int) and not isinstance(segments, sympy.Expr)
        if not isinstance(axes, Mapping) or not numbers or (isinstance(segments, int) and size % segments):
            return Shard(dim, segments, unit)
        return in_units(dim, size, segments, unit, axis_size=axes[axis])

    def split_axis(part: str) -> tuple[str, str | None]:
        for axis in axes:
            if part.endswith("/" + axis):
                return part[: -len(axis) - 1], axis
        return part, None

    if not (text.startswith("(") and text.endswith(")")) or not any(f"/{axis}" in text for axis in axes):
        size_text, axis = split_axis(text)
        size = parse_size(size_text)
        return size, ((axis, shard(size, axis, 1, 1)) if axis else None)
    inner = text[1:-1].strip()
    if " + " in inner:
        parts = [part.split() for part in inner.split(" + ")]
        blocks = [split_axis(part[0]) for part in parts]
        axis = blocks[0][1]
        if axis is None or any(other != axis for _, other in blocks):
            raise BadPlan(f"cannot read the dim {text!r}: every block must be split over one axis")
        if not all(number.isdigit() for (size, _), part in zip(blocks, parts, strict=True) for number in (size, *part[1:])):
            raise BadPlan(f"cannot read the dim {text!r}: its blocks are no numbers")
        units = tuple(math.prod(map(int, part[1:])) for part in parts)
        sizes = tuple(int(size) * unit for (size, _), unit in zip(blocks, units, strict=True))
        return sum(sizes), (axis, shard(sum(sizes), axis, sizes, alike(units)))
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
    return total, (found, shard(total, found, segments, unit))


def parse_notation(text: str, axes: Axes) -> tuple[tuple[Size, ...], dict[str, Placement]]:
    """The whole shape and the sharding that `notation` printed. BadPlan if it cannot be read.

    `axes`: the names of the mesh's axes; with their sizes (a mapping) the placements compare equal to those of a plan on that mesh
    also where heads or other units are padded.
    """
    sharding: dict[str, Placement] = {}
    while match := _SUFFIX.search(text):
        sharding[match[1]] = PARTIAL
        text = text[: match.start()]
    return _parse_dims([] if text.strip() == "scalar" else _TOKEN.findall(text), sharding, axes)


def parse_type(text: str, axes: Axes) -> tuple[TensorType, dict[str, Placement]]:
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
    dims: Sequence[str], sharding: dict[str, Placement], axes: Axes
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
    value, sharding = parse_type(text, axis_sizes)
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


def local_shape_of(text: str, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """One rank's shape of a tensor in the notation, padding included: the same on every rank."""
    shape, sharding = parse_notation(text, mesh)
    return tuple(int(size) for size in local_type(TensorType(torch.float32, shape), sharding, mesh).shape)

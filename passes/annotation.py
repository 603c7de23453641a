"""The einsum-like annotations of op rules: parsing, binding to shapes, and the placements that splitting one dim name
gives.

Grammar of an annotation, `"b t k, n k -> b t n"`:

- one pattern per tensor argument (in order of appearance), `->`, one per result; a pattern is a list of dims;
- `name`: a dim; the same name everywhere means the same dim. A name that the results lack is summed over;
- `[name]`: a dim that must stay whole;
- `...`: any leading dims, aligned from the right and broadcasting (a dim of size 1 does not take part in a split);
- `(a b c)`: one dim that is the product of several, outermost first; splitting `b` splits each of its `a` blocks;
  `([a] b)`: only `b`;
- `(q + k + v)`: one dim that is the concatenation of several, which are split together, each in itself;
- `1`: a dim of size 1.

`Binding.shard(pattern, shape, group, cut, axis_size)` is all that the rest needs: for each argument and result, the dim and
the blocks in which it is split. Where the axis does not divide a name, all dims that hold it are padded alike: 6 heads in
pieces of 2 are 48 features in pieces of 16, though 4 ranks divide 48 (`passes.placement`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import sympy

from passes.ir import Size
from passes.placement import (
    Shard,
    alike,
    can_be_padded,
    ceil_div,
    divides,
    is_padded,
    per_block,
    settled,
)  # fmt: skip

Padding = int | tuple[int, ...]  # a unit or a piece: one number for all blocks, or one each
_TOKEN = re.compile(r"\.\.\.|\([^()]*\)|\[\w+\]|[\w~]+")


@dataclass(frozen=True)
class Dim:
    """One dim of a pattern: its names (several: a product, or a concatenation if `joined`)."""

    names: tuple[str, ...]
    joined: bool = False


@dataclass(frozen=True)
class Cut:
    """In how many blocks (or blocks of which sizes) a named dim is split, the finest part that stays together, and the length of
    a rank's piece where it is padded to whole units (as in `Shard`; of each part, for the parts of a concatenation)."""

    segments: Size | tuple[int, ...] = 1
    unit: Padding = field(default=1, compare=False)
    piece: Padding = 0


def _settled(segments: Size | tuple[int, ...], block: Size, piece: Padding, unit: Padding, axis_size: int) -> Cut | None:
    """A cut with its unit and piece as a `Shard` holds them; None if the pieces are not made of the units. `block` is the size of equal
    blocks, `piece` 0 for ceil(block / axis_size)."""
    blocks = segments if isinstance(segments, tuple) else (block,)
    if not all(isinstance(one, int) for one in blocks):
        return None if piece else Cut(segments, unit)
    sizes = [int(one) for one in blocks]
    if not all(sizes):
        return Cut(segments)  # nothing to split
    pieces = per_block(piece, len(sizes)) if piece else [ceil_div(size, axis_size) for size in sizes]
    found = settled(sizes, pieces, per_block(unit, len(sizes)), axis_size)
    return None if found is None else Cut(segments, *found)


def _times(given: Padding, by: int) -> Padding:
    return tuple(number * by for number in given) if isinstance(given, tuple) else given * by


def _over(given: Padding, by: Size) -> Padding | None:
    """Each number divided; None if that leaves a rest."""
    numbers = given if isinstance(given, tuple) else (given,)
    if not isinstance(by, int) or not by or any(number % by for number in numbers):
        return None
    return tuple(number // by for number in numbers) if isinstance(given, tuple) else given // by


def _parse_pattern(text: str, rank: int) -> tuple[tuple[Dim, ...], frozenset[str]]:
    tokens = _TOKEN.findall(text)
    explicit = sum(token != "..." for token in tokens)
    dims: list[Dim] = []
    whole: set[str] = set()
    for token in tokens:
        if token == "...":
            dims += [Dim((f"~{k}",)) for k in range(rank - explicit - 1, -1, -1)]
        elif token.startswith("("):
            joined = "+" in token
            names = tuple(re.findall(r"\w+", token))
            dims.append(Dim(names, joined))
            whole.update(re.findall(r"\[(\w+)\]", token))
        elif token.startswith("["):
            dims.append(Dim((token[1:-1],)))
            whole.add(token[1:-1])
        elif token == "1":
            dims.append(Dim(()))
        else:
            dims.append(Dim((token,)))
    if len(dims) != rank:
        raise ValueError(f"annotation {text!r} has {len(dims)} dims where the tensor has {rank}")
    return tuple(dims), frozenset(whole)


def _product(sizes: Sequence[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


@dataclass(frozen=True)
class Binding:
    """An annotation bound to the shapes of one call."""

    inputs: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, Size]
    whole: frozenset[str]
    input_shapes: tuple[tuple[Size, ...], ...]
    output_shapes: tuple[tuple[Size, ...], ...]

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """The names that may be split, each alone but for the parts of a concatenation, which go together."""
        together: dict[str, tuple[str, ...]] = {}
        for pattern in (*self.inputs, *self.outputs):
            for dim in pattern:
                if dim.joined:
                    together |= {name: dim.names for name in dim.names}
        seen: dict[tuple[str, ...], None] = {}
        for pattern in (*self.inputs, *self.outputs):
            for dim in pattern:
                for name in dim.names:
                    group = together.get(name, (name,))
                    if not self.whole.intersection(group):
                        seen[group] = None
        return tuple(seen)

    def dim_cut(self, dim: Dim, group: tuple[str, ...], cut: Cut, axis_size: int) -> Cut | None:
        """How a dim is split when `group` is split by `cut`; None if the dim is not concerned or cannot be."""
        if dim.joined:
            sizes = tuple(self.sizes[name] for name in dim.names)
            if cut.segments != 1 or not all(isinstance(part, int) for part in sizes):
                return None
            joined = _settled(sizes, 1, cut.piece, cut.unit, axis_size)
            return None if joined is None else replace(joined, segments=len(sizes) if len(set(sizes)) == 1 else sizes)
        name = next(name for name in group if name in dim.names)
        mine = _of_part(group, name, cut)
        before, after = self._around(dim, name)
        if isinstance(mine.segments, tuple):
            if before != 1 or not isinstance(after, int):
                return None
            blocks = tuple(block * after for block in mine.segments)
            pieces = mine.piece or tuple(ceil_div(block, axis_size) for block in mine.segments)
            return _settled(blocks, 1, _times(pieces, after), _times(mine.unit, after), axis_size)
        block = _ratio(self.sizes[name], mine.segments)
        if not isinstance(after, int) or not isinstance(block, int):
            unit = _times(mine.unit, after) if isinstance(after, int) else 1
            return None if mine.piece else Cut(before * mine.segments, unit)
        pieces = mine.piece or ceil_div(block, axis_size)
        return _settled(before * mine.segments, block * after, _times(pieces, after), _times(mine.unit, after), axis_size)

    def name_cut(self, dim: Dim, group: tuple[str, ...], cut: Cut, axis_size: int) -> Cut | None:
        """The inverse: the cut of `group` that gives the dim's `cut`; None if there is none."""
        if dim.joined:
            expected = self.dim_cut(dim, group, Cut(), axis_size)
            return replace(cut, segments=1) if expected is not None and expected.segments == cut.segments else None
        name = next(name for name in group if name in dim.names)
        before, after = self._around(dim, name)
        unit, piece = _over(cut.unit, after), _over(cut.piece, after) if cut.piece else 0
        if piece is None or (piece and unit is None):
            return None
        segments: Size | tuple[int, ...] | None
        if isinstance(cut.segments, tuple):
            segments = _over(cut.segments, after) if before == 1 else None
            segments = len(segments) if isinstance(segments, tuple) and len(set(segments)) == 1 else segments
        else:
            segments = _ratio(cut.segments, before)
        block: Size | None = 1 if segments is None or isinstance(segments, tuple) else _ratio(self.sizes[name], segments)
        if segments is None or block is None:
            return None
        found = _settled(segments, block, piece, unit or 1, axis_size)
        return found if found is None or len(group) == 1 else self._of_group(group, name, found, axis_size)

    def is_padded(self, group: tuple[str, ...], cut: Cut, axis_size: int) -> bool:
        """True if the axis does not divide what `cut` splits: the last ranks' pieces of `group` have padding in them."""
        parts = [(name, _of_part(group, name, cut)) for name in group]
        return any(is_padded(self.sizes[n], Shard(0, part.segments, 1, part.piece), axis_size) for n, part in parts)

    def _around(self, dim: Dim, name: str) -> tuple[Size, Size]:
        """The products of the sizes before and after a name in a dim."""
        position = dim.names.index(name)
        before, after = dim.names[:position], dim.names[position + 1 :]
        return _product([self.sizes[n] for n in before]), _product([self.sizes[n] for n in after])

    def _of_group(self, group: tuple[str, ...], name: str, cut: Cut, axis_size: int) -> Cut | None:
        """The cut of all parts of a concatenation that goes with the cut of one: as many units of each."""
        mine, sizes = self.sizes[name], [self.sizes[part] for part in group]
        if not cut.piece:
            return cut
        if cut.segments != 1 or not isinstance(cut.unit, int) or not isinstance(mine, int):
            return None
        count = mine // cut.unit
        if any(not isinstance(size, int) or not size or size % count for size in sizes):
            return None
        units = [int(size) // count for size in sizes]
        pieces = alike([ceil_div(count, axis_size) * unit for unit in units])
        found = _settled(tuple(int(size) for size in sizes), 1, pieces, alike(units), axis_size)
        return None if found is None else replace(found, segments=1)

    def concerned(
        self, pattern: tuple[Dim, ...], shape: tuple[Size, ...], group: tuple[str, ...]
    ) -> tuple[int, Dim] | None:
        """The dim of a pattern that holds the group (a broadcast dim of size 1 does not)."""
        for index, dim in enumerate(pattern):
            if dim.names and any(name in dim.names for name in group):
                if shape[index] == 1 and _product([self.sizes[name] for name in dim.names]) != 1:
                    return None
                return index, dim
        return None

    def shard(
        self, pattern: tuple[Dim, ...], shape: tuple[Size, ...], group: tuple[str, ...], cut: Cut, axis_size: int
    ) -> Shard | bool | None:
        """The placement of one argument or result: a Shard (padded where the axis does not divide the dim), None where it is not
        concerned, False where the split is impossible."""
        found = self.concerned(pattern, shape, group)
        if found is None:
            return None
        index, dim = found
        dim_cut = self.dim_cut(dim, group, cut, axis_size)
        if dim_cut is None:
            return False
        shard = Shard(index, dim_cut.segments, dim_cut.unit, dim_cut.piece)
        even = not shard.piece and divides(shape[index], shard.segments, axis_size)
        return shard if even or can_be_padded(shape[index], shard, axis_size) else False


@lru_cache(maxsize=65536)
def bind(
    annotation: str,
    input_shapes: tuple[tuple[Size, ...], ...],
    output_shapes: tuple[tuple[Size, ...], ...],
    sizes: tuple[tuple[str, Size], ...] = (),
) -> Binding:
    """Bind an annotation to shapes. ValueError if the shapes do not fit it. `sizes` gives names that occur only
    inside products."""
    left, right = annotation.split("->")
    whole: set[str] = set()
    bound: list[tuple[Dim, ...]] = []
    known: dict[str, Size] = dict(sizes)
    sides = ((left, input_shapes), (right, output_shapes))
    counts: list[int] = []
    for text, shapes in sides:
        patterns = [part for part in text.split(",")] if text.strip() or shapes else []
        if len(patterns) < len(shapes):
            raise ValueError(f"annotation {annotation!r} describes {len(patterns)} tensors of {len(shapes)}")
        for pattern_text, shape in zip(patterns, shapes, strict=False):
            pattern, more = _parse_pattern(pattern_text, len(shape))
            whole |= more
            bound.append(pattern)
            for dim, size in zip(pattern, shape, strict=True):
                if len(dim.names) == 1 and (dim.names[0] not in known or known[dim.names[0]] == 1):
                    known[dim.names[0]] = size
        counts.append(len(shapes))
    for pattern, shape in zip(bound, (*input_shapes, *output_shapes), strict=True):
        for dim, size in zip(pattern, shape, strict=True):
            missing = [name for name in dim.names if name not in known]
            if dim.joined:
                if missing:
                    raise ValueError(f"annotation {annotation!r}: sizes of {missing} are unknown")
            elif len(missing) == 1:
                rest = _product([known[name] for name in dim.names if name in known])
                known[missing[0]] = (
                    size // rest if isinstance(size, int) and isinstance(rest, int) else sympy.sympify(size) / rest
                )
            elif missing:
                raise ValueError(f"annotation {annotation!r}: sizes of {missing} are unknown")
    for pattern, shape in zip(bound, (*input_shapes, *output_shapes), strict=True):
        for dim, size in zip(pattern, shape, strict=True):
            expected = (
                sum(known[name] for name in dim.names) if dim.joined else _product([known[name] for name in dim.names])
            )
            if size not in (1, expected) and sympy.simplify(sympy.sympify(size) - expected) != 0:
                raise ValueError(f"annotation {annotation!r}: dim {dim.names} is {size}, expected {expected}")
    return Binding(
        tuple(bound[: counts[0]]), tuple(bound[counts[0] :]), known, frozenset(whole), input_shapes, output_shapes
    )


def factor(source: Sequence[Size], target: Sequence[Size]) -> tuple[str, tuple[tuple[str, Size], ...]]:
    """The annotation of a reshape from `source` to `target` by matching factors from the left, and the size of each
    name.

    factor((B, T, 768), (B, T, 12, 64)) is "a b (c d) -> a b c d". Dims that share no factor stay whole.
    """
    left: list[list[str]] = [[] for _ in source]
    right: list[list[str]] = [[] for _ in target]
    sizes: list[tuple[str, Size]] = []
    i = j = 0
    rest_i: Size | None = None
    rest_j: Size | None = None
    stuck = False
    while i < len(source) and j < len(target):
        a = source[i] if rest_i is None else rest_i
        b = target[j] if rest_j is None else rest_j
        if a == 1:
            i, rest_i = i + 1, None
            continue
        if b == 1:
            j, rest_j = j + 1, None
            continue
        name = f"d{len(sizes)}"
        ratio_ab, ratio_ba = _ratio(a, b), _ratio(b, a)
        if ratio_ab is not None and ratio_ba is not None:
            size, rest_i, rest_j = a, None, None
        elif ratio_ba is not None:
            size, rest_i, rest_j = a, None, ratio_ba
        elif ratio_ab is not None:
            size, rest_i, rest_j = b, ratio_ab, None
        else:
            stuck = True
            break
        sizes.append((name, size))
        left[i].append(name)
        right[j].append(name)
        i += rest_i is None
        j += rest_j is None
    consumed = (i, j) if stuck else (len(source), len(target))
    sides = (left[: consumed[0]], right[: consumed[1]])
    kept = {name for names in sides[0] for name in names} & {name for names in sides[1] for name in names}
    while stuck:  # a dim keeps its names only if all of them found their place on the other side
        broken = {name for side in sides for names in side if not kept.issuperset(names) for name in names} & kept
        if not broken:
            break
        kept -= broken

    def side_text(side: list[list[str]], count: int, whole: str) -> str:
        return " ".join(
            _group(names) if k < count and kept.issuperset(names) else f"[{whole}{k}]" for k, names in enumerate(side)
        )

    text = f"{side_text(left, consumed[0], 'x')} -> {side_text(right, consumed[1], 'y')}"
    return text, tuple((name, size) for name, size in sizes if name in kept)


def _group(names: list[str]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else "(" + " ".join(names) + ")"


def _of_part(group: tuple[str, ...], name: str, cut: Cut) -> Cut:
    """The cut of one part of a concatenation."""
    if len(group) == 1:
        return cut
    unit, piece = (per_block(given, len(group))[group.index(name)] for given in (cut.unit, cut.piece))
    return Cut(cut.segments, unit, piece)


def _ratio(a: Size, b: Size) -> Size | None:
    """a / b if that is a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None  # b = 0: a tensor without elements
    ratio = sympy.sympify(a) / b
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.is_integer else None

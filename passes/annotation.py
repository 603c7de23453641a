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

`Binding.split(name, cut)` is all that the rest needs: for each argument and result, the dim and the blocks in which
it is split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import sympy

from passes.ir import Size
from passes.placement import Shard, divides

_TOKEN = re.compile(r"\.\.\.|\([^()]*\)|\[\w+\]|[\w~]+")


@dataclass(frozen=True)
class Dim:
    """One dim of a pattern: its names (several: a product, or a concatenation if `joined`)."""

    names: tuple[str, ...]
    joined: bool = False


@dataclass(frozen=True)
class Cut:
    """In how many blocks (or blocks of which sizes) a named dim is split, and the finest piece that stays together."""

    segments: Size | tuple[int, ...] = 1
    unit: int = field(default=1, compare=False)


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

    def dim_cut(self, dim: Dim, size: Size, group: tuple[str, ...], cut: Cut) -> Cut | None:
        """How a dim is split when `group` is split by `cut`; None if the dim is not concerned or cannot be."""
        if dim.joined:
            sizes = tuple(self.sizes[name] for name in dim.names)
            if cut.segments != 1 or not all(isinstance(part, int) for part in sizes):
                return None
            return Cut(len(sizes) if len(set(sizes)) == 1 else sizes, cut.unit)
        position = dim.names.index(group[0])
        before = _product([self.sizes[name] for name in dim.names[:position]])
        after = _product([self.sizes[name] for name in dim.names[position + 1 :]])
        if isinstance(cut.segments, tuple):
            if before != 1 or not isinstance(after, int):
                return None
            return Cut(tuple(block * after for block in cut.segments), cut.unit * after)
        return Cut(before * cut.segments, cut.unit * after if isinstance(after, int) else 1)

    def name_cut(self, dim: Dim, group: tuple[str, ...], cut: Cut) -> Cut | None:
        """The inverse: the cut of `group` that gives the dim's `cut`; None if there is none."""
        if dim.joined:
            expected = self.dim_cut(dim, 0, group, Cut())
            return Cut(1, cut.unit) if expected is not None and expected.segments == cut.segments else None
        position = dim.names.index(group[0])
        before = _product([self.sizes[name] for name in dim.names[:position]])
        after = _product([self.sizes[name] for name in dim.names[position + 1 :]])
        unit = cut.unit // after if isinstance(after, int) and cut.unit % after == 0 else 1
        if isinstance(cut.segments, tuple):
            if before != 1 or not isinstance(after, int) or any(block % after for block in cut.segments):
                return None
            blocks = tuple(block // after for block in cut.segments)
            return Cut(len(blocks) if len(set(blocks)) == 1 else blocks, unit)
        count = _ratio(cut.segments, before)
        return Cut(count, unit) if count is not None and _ratio(self.sizes[group[0]], count) is not None else None

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
        """The placement of one argument or result: a Shard, None where it is not concerned, False where the split is
        impossible."""
        found = self.concerned(pattern, shape, group)
        if found is None:
            return None
        index, dim = found
        names_here = [name for name in group if name in dim.names]
        dim_cut = self.dim_cut(dim, shape[index], (names_here[0],), cut)
        if dim_cut is None or not divides(shape[index], dim_cut.segments, axis_size):
            return False
        return Shard(index, dim_cut.segments, dim_cut.unit)


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


def _ratio(a: Size, b: Size) -> Size | None:
    """a / b if that is a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = sympy.sympify(a) / b
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.is_integer else None

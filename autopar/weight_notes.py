"""Notes of a plan on weights that the axis does not divide: which are padded and what that costs, and which stay whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopar.weight_rows import fold_names, name_pattern
from passes.placement import Shard, ceil_div, is_padded, parse_notation, per_block, piece_sizes, segment_sizes

LARGE_SHARE = 0.01  # of the parameters: a weight that stays whole gets a note from here on


def weight_notes(parameters: Mapping[str, str], tp: int) -> list[str]:
    """The notes for parameters by name and notation."""
    return [*_padding_notes(parameters, tp), *_whole_notes(parameters, tp)]


def _padding_notes(parameters: Mapping[str, str], tp: int) -> list[str]:
    """Which parameters are cut in pieces whose last ones are padded while they are used, and what share of the work that adds."""
    found: dict[str, list[str]] = {}
    for name, text in parameters.items():
        shape, sharding = parse_notation(text, {"tp": tp})
        shard = sharding.get("tp")
        if isinstance(shard, Shard) and is_padded(shape[shard.dim], shard, tp):
            found.setdefault(_padding_text(int(shape[shard.dim]), shard, tp), []).append(name)
    return [f"{', '.join(_folded(names))}: {cost}" for cost, names in found.items()]


def _padding_text(size: int, shard: Shard, tp: int) -> str:
    blocks = [int(block) for block in segment_sizes(size, shard.segments) or ()]
    units, pieces = per_block(shard.unit, len(blocks)), piece_sizes(blocks, shard, tp)
    each = list(dict.fromkeys(zip(blocks, units, pieces, strict=True)))
    texts = []
    for block, unit, piece in each:
        what = ("rows" if shard.dim == 0 else "columns") if unit == 1 else f"units of {unit}"
        texts.append(f"{block // unit} {what} in pieces of {ceil_div(piece, unit)}")
    count = f"{len(blocks)} blocks, each " if len(blocks) > len(each) and len(each) == 1 else ""
    extra = sum(pieces) * tp - size
    last = f"{extra} of padding" if all(unit == 1 for unit in units) else f"{extra} rows of padding"
    last = last.replace("rows", "rows" if shard.dim == 0 else "columns")
    return f"{count}{' and '.join(texts)} over tp = {tp}, {last} ({_percent(extra / size)} more work)"


def _percent(share: float) -> str:
    """At least one digit that says something: 33%, 0.8%, 0.006%."""
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%"


def _folded(names: list[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_pattern(name), []).append(name)
    return [folded for members in groups.values() for folded, _ in fold_names(members)]


def _whole_notes(parameters: Mapping[str, str], tp: int) -> list[str]:
    """Which large parameters no rank holds a part of only, and what keeps them whole."""
    shapes = {name: [int(size) for size in parse_notation(text, ("tp",))[0]] for name, text in parameters.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    found: dict[str, list[str]] = {}
    for name, text in parameters.items():
        share = math.prod(shapes[name]) / total
        if "/tp" in text or len(shapes[name]) < 2 or share < LARGE_SHARE:
            continue
        uneven = [str(size) for size in shapes[name] if size % tp]
        reason = (
            f"tp = {tp} does not divide {' and '.join(uneven)}, and no padded split of it is cheaper, or an op's rule allows none"
            if uneven
            else "no split of it is cheaper, or an op has no rule"
        )
        found.setdefault(reason, []).append(f"{name} ({share:.1%} of the parameters)")
    return [f"whole on every rank, because {reason}: {', '.join(names)}" for reason, names in found.items()]

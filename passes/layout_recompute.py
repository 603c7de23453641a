"""What backward computes again, as a choice over whole layers: rows of RECOMPUTES, each a function from a layer's calls to runs of them.

A run keeps what it is computed from and is computed again in backward; what calls outside of runs save is kept. "full" and "selective"
are what plans run (`passes.recompute`). "products" computes again the stretch from the first to the last product of two activations
(attention between its projections). Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
section 5. "alternate" computes a layer again but for every second product with a weight and the products of activations, whose
results are kept; torchtitan calls it selective op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from passes.costs import Pricing
from passes.ir import is_state, is_trainable, tensor_inputs
from passes.recompute import SELECTIVE_PASSES, Choices, Run, Saves, Unit, line_of
from passes.reshard import all_gather
from passes.rules import CONTRACTIONS

_CONTRACTIONS = {row.op for row in CONTRACTIONS}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class LineCall:
    """One call on a rank's line; the masks have a bit per storage."""

    node: fx.Node
    made: int
    saved: int
    used: int


def is_product(node: fx.Node) -> bool:
    """True for a product of two activations."""
    if node.target is not _ATTENTION and node.target not in _CONTRACTIONS:
        return False
    return sum(is_trainable(source) and not is_state(source) for source in tensor_inputs(node)) > 1


def is_weight_product(node: fx.Node) -> bool:
    """True for a product with a parameter."""
    return node.target in _CONTRACTIONS and any(is_state(source) for source in tensor_inputs(node))


def _is_gather(node: fx.Node) -> bool:
    """True for a reshard whose result is more than one rank's part."""
    return bool(node.meta.get("reshard")) and node.target is all_gather


def _nothing(calls: Sequence[LineCall]) -> list[Run]:
    return []


def _everything(calls: Sequence[LineCall]) -> list[Run]:
    return [(0, len(calls) - 1)]


def _products(calls: Sequence[LineCall]) -> list[Run]:
    found = [k for k, call in enumerate(calls) if is_product(call.node)]
    return [(found[0], found[-1])] if found else []


def cached_calls(recompute: str, calls: Sequence[LineCall]) -> frozenset[int]:
    """The calls of a layer whose results are kept though they lie in a run: they do not run again."""
    if recompute != "alternate":
        return frozenset()
    products = [k for k, call in enumerate(calls) if is_weight_product(call.node)]
    return frozenset([*products[::2], *(k for k, call in enumerate(calls) if is_product(call.node))])


RECOMPUTES: dict[str, Callable[[Sequence[LineCall]], list[Run]] | None] = {
    "none": _nothing,
    "products": _products,
    "alternate": _everything,
    "full": _everything,
    "selective": None,  # found from prices: `selective_runs`
}


def selective_runs(
    graph: fx.Graph, saves: Saves, pricing: Pricing, axis_sizes: Mapping[str, int], layers: Sequence[tuple[int, int]]
) -> list[list[Run]]:
    """Per layer (first call, end) of a localized graph's line: the runs that a plan with recompute="selective" would take."""
    line = line_of(graph, saves, pricing, axis_sizes)
    found = [Unit(str(k), start, end, True) for k, (start, end) in enumerate(layers)]
    choices = Choices(line, found, saves, pricing, {})
    return [list(choices.at(unit, SELECTIVE_PASSES, work=True).runs) for unit in found]


@dataclass(frozen=True)
class Kept:
    """What a layer's runs keep: storages, storages that exist again while it runs backward, and the calls that run again."""

    kept: int
    again: int
    replayed: tuple[int, ...]


def kept_by(
    calls: Sequence[LineCall], runs: Sequence[Run], *, replay_all: bool, cached: frozenset[int] = frozenset(), gather_again: bool = False
) -> Kept:
    """What is kept of a layer. Without `replay_all` a run stops at the last call that saves something, before it if that call's result is
    not what it saves. With `gather_again` what a rank was gathered from is kept in the place of what was gathered. Source of
    that: Korthikanti et al. 2022, section 4.2.2.
    """
    kept = again = 0
    replayed: list[int] = []
    inside: set[int] = set()
    for first, last in runs:
        inside.update(range(first, last + 1))
        saving = [k for k in range(first, last + 1) if calls[k].saved]
        if not saving:
            continue
        end = last if replay_all else saving[-1] if calls[saving[-1]].saved & calls[saving[-1]].made else saving[-1] - 1
        replayed += [k for k in range(first, end + 1) if k not in cached]
        made = inputs = 0
        for call in calls[first : last + 1]:
            inputs |= call.used & ~made
            made |= call.made
            again |= call.saved
        kept |= inputs
        for k in cached:
            kept |= calls[k].made
    for k, call in enumerate(calls):
        if k not in inside:
            kept |= call.saved
    for call in calls if gather_again else ():
        if _is_gather(call.node) and kept & call.made and call.used:
            kept, again = kept & ~call.made | call.used, again | call.made
    return Kept(kept, again & ~kept, tuple(replayed))


def bits_of(mask: int) -> list[int]:
    """The storages of a mask."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found

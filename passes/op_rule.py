"""What a row of RULES is: an annotation and what goes with it; and what comes of it, a strategy: one legal way to run a call on an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from passes.annotation import Binding, bind
from passes.patterns import Call, Op, Pattern
from passes.placement import Placement, Shard

Annotation = str | Pattern
Rewrite = Callable[[fx.Node], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Local:
    """What a rank computes when a name is split: `rewrite(node)` gives function, args and kwargs; "axis" stands for
    the axis.

    `output` is the placement of the result; `all_reduces` counts the all_reduces of one value per row that it does
    itself. `padding`: it can be given shards that are padded.
    """

    rewrite: Rewrite
    output: Placement
    all_reduces: int = 0
    padding: bool = False


@dataclass(frozen=True)
class OpRule:
    """One row. `sizes` is the position of the argument that spells the result's shape (views) or the split sizes
    ("split"). `counts` names the int arguments that say how many of a name there are (groups): a rank that has its share
    of that name passes its share of the number. `shared_results`: results that lack a split name are not sums, each rank
    has them whole."""

    op: Op
    annotation: Annotation
    linear: str | Callable[[Call], str] = ""
    sizes: int | None = None
    counts: Mapping[str, str] = field(default_factory=dict)
    shared_results: bool = False
    local: Mapping[str, Local] = field(default_factory=dict)
    padding: str | Callable[[Call], str] = ""

    def padding_of(self, call: Call) -> str:
        """What the row says of padding for a call: one of the words of the module's docstring, or nothing."""
        return self.padding if isinstance(self.padding, str) else self.padding(call)

    def binding(self, call: Call) -> Binding:
        """The annotation bound to a call's shapes. ValueError if it does not fit."""
        text = self.annotation if isinstance(self.annotation, str) else self.annotation(call)
        text, sizes = (text, ()) if isinstance(text, str) else text
        return bind(
            text, tuple(value.shape for value in call.inputs), tuple(value.shape for value in call.outputs), sizes
        )


@dataclass(frozen=True)
class Strategy:
    """One legal way to run a call on an axis: a placement for every tensor argument and result; `split` is the split
    name."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    split: tuple[str, ...] = ()
    local: Local | None = None

    @property
    def is_split(self) -> bool:
        """True if each rank does its share of the work."""
        return any(isinstance(p, Shard) for p in (*self.inputs, *self.outputs))

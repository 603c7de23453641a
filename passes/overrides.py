"""What a user decides instead of the solver: placements by parameter-name pattern, cuts by module path.

`{"placements": {"*.qkv.weight": "192/tp 64", "head.*": "whole", "*.up.weight": 0}, "cuts": ["h.2"]}`: a placement is the notation, the
number of the dim to split, or "whole". The solver completes the rest; if nothing is left it names the pin that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from costmodel.errors import BadArgument, NoLegalSharding
from passes.cut import Held
from passes.ir import TensorType, is_state, tensor_type
from passes.placement import Placement, Shard, notation, parse_notation
from passes.shard_problem import Pins


@dataclass(frozen=True)
class Overrides:
    """User decisions that the planner keeps."""

    placements: Mapping[str, str | int] = field(default_factory=dict)
    cuts: Sequence[str] | Held | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Overrides:
        """From the `overrides=` argument. BadArgument for unknown keys or wrong forms."""
        given = dict(given or {})
        unknown = set(given) - {"placements", "cuts"}
        if unknown:
            raise BadArgument(
                f"overrides has no {', '.join(sorted(map(repr, unknown)))}", use='"placements" and "cuts"'
            )
        placements, cuts = given.get("placements") or {}, given.get("cuts")
        if not isinstance(placements, Mapping):
            raise BadArgument(
                "overrides['placements'] is a dict from parameter-name pattern to placement", use='{"*.up.weight": 0}'
            )
        if cuts is not None and (isinstance(cuts, str) or not all(isinstance(path, str) for path in cuts)):
            raise BadArgument("overrides['cuts'] is a list of module paths", use='["h.2", "h.4"]')
        return cls(dict(placements), None if cuts is None else tuple(cuts))

    def check(self, graph: fx.Graph, mesh: Mapping[str, int]) -> None:
        """BadArgument for a pattern that no parameter matches or a notation that does not fit."""
        kinds = {
            str(n.target): tensor_type(n) for n in graph.nodes if is_state(n) and n.meta.get("kind") == "parameter"
        }
        for pattern, wanted in self.placements.items():
            matched = [name for name in kinds if fnmatchcase(name, pattern)]
            if not matched:
                raise BadArgument(f"no parameter matches the override {pattern!r}", use=", ".join(list(kinds)[:8]))
            for name in matched:
                kind = kinds[name]
                assert kind is not None
                self._wanted(name, wanted, kind, mesh)

    @staticmethod
    def _wanted(name: str, wanted: str | int, kind: TensorType, mesh: Mapping[str, int]) -> Placement | None:
        """The placement an override asks for; None for "whole"."""
        if wanted == "whole":
            return None
        if isinstance(wanted, bool) or not isinstance(wanted, (int, str)):
            raise BadArgument(
                f"the placement of {name} is {wanted!r}", use='the notation ("3072/tp 768"), a dim number, or "whole"'
            )
        if isinstance(wanted, int):
            if not -len(kind.shape) <= wanted < len(kind.shape):
                raise BadArgument(f"{name} has no dim {wanted}: its shape is {tuple(kind.shape)}")
            return Shard(wanted % len(kind.shape))
        shape, sharding = parse_notation(wanted, mesh)
        if shape != kind.shape:
            raise BadArgument(f"the placement {wanted!r} is of shape {tuple(shape)}, and {name} is {tuple(kind.shape)}")
        other = sorted(set(sharding) - {"tp"})
        if other:
            raise BadArgument(
                f"the placement {wanted!r} of {name} splits over {', '.join(other)}", use="a split over tp"
            )
        return sharding.get("tp")

    def pins(self, mesh: Mapping[str, int]) -> Pins | None:
        """The solver's view: which of a parameter's choices are left."""
        if not self.placements:
            return None

        def narrowed(name: str, kind: TensorType, choices: Sequence[Placement]) -> Sequence[Placement]:
            kept: list[str] = []  # the overrides that this parameter has followed so far
            for pattern, wanted in self.placements.items():
                if not fnmatchcase(name, pattern):
                    continue
                target = self._wanted(name, wanted, kind, mesh)
                left: list[Placement]
                if target is None:
                    left = [c for c in choices if not isinstance(c, Shard)]
                elif isinstance(wanted, int):
                    left = [
                        c for c in choices if isinstance(c, Shard) and isinstance(target, Shard) and c.dim == target.dim
                    ]
                else:
                    left = [c for c in choices if c == target]
                if not left:
                    possible = ", ".join(
                        dict.fromkeys(notation(kind.shape, {"tp": c} if isinstance(c, Shard) else {}) for c in choices)
                    )
                    if kept:
                        raise NoLegalSharding(
                            f"the overrides {' and '.join(kept)} and {pattern!r}: {wanted!r} contradict each other: both are for {name}",
                            use=f"one of them, or a pattern that does not match {name}",
                        )
                    raise NoLegalSharding(
                        f"the override {pattern!r}: {wanted!r} cannot be: {name} has no such placement over tp={mesh['tp']}",
                        use=possible,
                    )
                choices = left
                kept.append(f"{pattern!r}: {wanted!r}")
            return choices

        return narrowed

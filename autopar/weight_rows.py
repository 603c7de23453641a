"""The rows of a printed plan's WEIGHTS: each parameter's placement and what it means in words, repeated layers in one
row.

The words come from what the stages' graphs do with a parameter, never from its name: a split that leaves a sum owed
is by "row", one that does not is by "column"; where the split dim is looked up with an input of the model or ends in
the cross entropy, it is the "vocabulary"; where attention follows or precedes it, whole heads stay together. Names
are read for one thing only: numbers between dots.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from passes.local_ops import pad_shard
from passes.placement import Shard, parse_notation

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan

Record = Mapping[str, Any]

_ATTENTION = ("scaled_dot_product_attention", "softmax")
_NEAR = 24  # calls to look back or ahead for attention


@dataclass(frozen=True)
class WeightRow:
    """`count` parameters that are placed alike and differ only in the numbers in their names."""

    name: str
    placement: str
    meaning: str
    count: int


def weight_rows(plan: Plan) -> list[WeightRow]:
    """One row per parameter, those of repeated layers folded; in the order of their first use."""
    words = meanings(plan)
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, text in plan.parameter_notation.items():
        groups[name_pattern(name), text, words[name]].append(name)
    return [
        WeightRow(folded, text, meaning, count)
        for (_, text, meaning), names in groups.items()
        for folded, count in fold_names(names)
    ]


# ---- names --------------------------------------------------------------------------------------------------------


def name_pattern(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def fold_names(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names of one pattern in as few folded ones as say exactly the same: `h.{0..11}.attn.qkv.weight`, and how many
    each stands for.

    Where the numbers are not all combinations of each other (two lists of different lengths), the first number alone
    is folded.
    """
    parts = [name.split(".") for name in names]
    places = [k for k, part in enumerate(parts[0]) if part.isdigit()]
    numbers = [tuple(int(part[k]) for k in places) for part in parts]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if len(set(numbers)) == len(list(itertools.product(*columns))):
        return [(_filled(parts[0], places, columns), len(names))]
    by_rest: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for first, *rest in numbers:
        by_rest[tuple(rest)].append(first)
    return [
        (_filled(parts[0], places, [sorted(firsts), *([n] for n in rest)]), len(firsts))
        for rest, firsts in by_rest.items()
    ]


def _filled(parts: Sequence[str], places: Sequence[int], columns: Sequence[Sequence[int]]) -> str:
    filled = list(parts)
    for place, column in zip(places, columns, strict=True):
        filled[place] = number_set(column) if len(column) > 1 else str(column[0])
    return ".".join(filled)


def number_set(numbers: Sequence[int]) -> str:
    """`{0..11}`, `{0..3,8,9}`."""
    return "{" + ",".join(ranges(numbers, "..")) + "}"


def ranges(numbers: Sequence[int], dash: str) -> list[str]:
    """Sorted numbers with runs of three and more joined: ["0..3", "8", "9"]."""
    found: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        found += [f"{members[0]}{dash}{members[-1]}"] if len(members) > 2 else [str(number) for number in members]
    return found


# ---- words --------------------------------------------------------------------------------------------------------


def meanings(plan: Plan) -> dict[str, str]:
    """What each parameter's placement means, in words."""
    uses: dict[str, list[str]] = defaultdict(list)
    axes = tuple(plan.mesh)
    shards = {name: _shard(text, axes) for name, text in plan.parameter_notation.items()}
    for stage in plan.stages:
        graph = _Records(stage)
        for name, node in graph.parameters.items():
            uses[name] += [graph.use_text(node, user, shards.get(name)) for user in graph.users[node]]
    owed = {name for stage in plan.stages for name in stage.partial_gradients}
    also: dict[str, list[str]] = defaultdict(list)
    for alias, name in plan.aliases.items():
        also[name].append(alias)
    found = {}
    for name, shard in shards.items():
        text = (
            _split_text(shard, uses[name]) if shard else "whole, gradient summed over tp" if name in owed else "whole"
        )
        found[name] = text + (f"; is also {', '.join(also[name])}" if also[name] else "")
    return found


def _shard(text: str, axes: Sequence[str]) -> Shard | None:
    _, sharding = parse_notation(text, axes)
    return next((p for p in sharding.values() if isinstance(p, Shard)), None)


def _split_text(shard: Shard, uses: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(uses)) or ["split"]
    # "vocabulary" of the logits says nothing more beside "vocabulary, then all_reduce" of the embedding
    distinct = [text for text in distinct if not any(other.startswith(f"{text},") for other in distinct)]
    count = len(shard.segments) if isinstance(shard.segments, tuple) else shard.segments
    first, *rest = distinct
    if count != 1:
        kind, heads, tail = first.partition(", by heads")
        kind, comma, collective = (kind, "", tail) if heads else first.partition(",")
        first = f"{kind}{heads or ','} within {count} fused blocks{comma}{collective}"
    return " / ".join([first, *rest])


@dataclass
class _Records:
    """A stage's graph as its records tell it: who reads what. No graph module is built: printing a large plan stays
    quick.
    """

    stage: StagePlan
    by_name: dict[str, Record] = field(default_factory=dict)
    users: defaultdict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    parameters: dict[str, str] = field(default_factory=dict)  # parameter -> node
    logits: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        records = _without_padding(self.stage.records)
        for record in records:
            self.by_name[record["name"]] = record
            for name in dict.fromkeys(_nodes(record)):
                self.users[name].append(record)
            if record["op"] == "get_attr" and record.get("kind") == "parameter":
                self.parameters[record["target"]] = record["name"]
        for record in records:
            if record.get("target") == "local_ops.sharded_cross_entropy":
                self.logits.add(self._maker_of_logits(record))

    def _maker_of_logits(self, record: Record) -> str:
        """The call with a weight that the scores of a vocabulary-split cross entropy come from."""
        name = next(iter(_nodes(record)))
        while not any(self._is_parameter(source) for source in _nodes(self.by_name[name])):
            name = next(iter(_nodes(self.by_name[name])), "")
            if not name:
                break
        return name

    def _is_parameter(self, name: str) -> bool:
        return self.by_name[name]["op"] == "get_attr"

    def use_text(self, node: str, user: Record, shard: Shard | None) -> str:
        """How one call uses a parameter that is split."""
        if shard is None:
            return "whole"
        target = str(user.get("target", ""))
        owes = "partial(" in user.get("type", "")
        if "embedding" in target and shard.dim == 0:
            kind = "vocabulary" if self._looked_up_with_input(user, node) else "table rows"
        elif user["name"] in self.logits:
            kind = "vocabulary"
        elif "convolution" in target or "conv" in target.partition(".")[2]:
            kind = "input channels" if owes else "output channels"
        else:
            kind = "row" if owes else "column"
            if any(self._meets_attention(user["name"], ahead) for ahead in ([False] if owes else [True])):
                kind += ", by heads"
        return kind + (f", then {self._following_collective(user['name'])}" if owes else "")

    def _looked_up_with_input(self, user: Record, weight: str) -> bool:
        return any(
            self.by_name[name]["op"] == "placeholder" and name in self.stage.inputs
            for name in _nodes(user)
            if name != weight
        )

    def _meets_attention(self, name: str, ahead: bool) -> bool:
        """True if attention is ahead of (or behind) a call with no other matrix in between."""
        seen, queue = {name}, [name]
        while queue and len(seen) < _NEAR:
            at = queue.pop(0)
            following = [r["name"] for r in self.users[at]] if ahead else list(_nodes(self.by_name[at]))
            for other in following:
                record = self.by_name[other]
                if other in seen or record["op"] != "call_function":
                    continue
                seen.add(other)
                if any(part in str(record["target"]) for part in _ATTENTION):
                    return True
                if not any(self._is_parameter(source) and " " in self._state_text(source) for source in _nodes(record)):
                    queue.append(other)
        return False

    def _state_text(self, node: str) -> str:
        """A parameter's or buffer's placement; more than one dim has a space outside of parentheses."""
        name = self.by_name[node]["target"]
        text = self.stage.parameters.get(name) or self.stage.buffers.get(name, "")
        return re.sub(r"\([^()]*\)", "()", text)

    def _following_collective(self, name: str) -> str:
        """The collective that pays the sum a call leaves owed."""
        for _ in range(6):
            following = self.users[name]
            reshard = next((r for r in following if str(r.get("target", "")).startswith("reshard.")), None)
            if reshard is not None:
                return str(reshard["target"]).partition(".")[2]
            if not following:
                break
            name = following[0]["name"]
        return "all_reduce"


def _without_padding(records: Sequence[Record]) -> list[Record]:
    """The records with whoever reads a padded parameter reading the parameter."""
    padded = {
        record["name"]: next(iter(_nodes(record)))
        for record in records
        if record.get("target") == f"local_ops.{pad_shard.__name__}"
    }

    def bare(arg: Any) -> Any:
        if isinstance(arg, Mapping):
            return {**arg, "node": padded.get(arg["node"], arg["node"])} if "node" in arg else arg
        return [bare(item) for item in arg] if isinstance(arg, (list, tuple)) else arg

    def with_bare_arguments(record: Record) -> Record:
        kwargs = {name: bare(value) for name, value in record.get("kwargs", {}).items()}
        return {**record, "args": bare(record.get("args", ())), "kwargs": kwargs}

    if not padded:
        return list(records)
    return [with_bare_arguments(record) for record in records if record["name"] not in padded]


def _nodes(record: Record) -> Iterator[str]:
    """The names of the nodes that a record's arguments read, in order."""

    def visit(arg: Any) -> Iterator[str]:
        if isinstance(arg, Mapping):
            if "node" in arg:
                yield arg["node"]
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                yield from visit(item)

    yield from visit(record.get("args", ()))
    for value in record.get("kwargs", {}).values():
        yield from visit(value)

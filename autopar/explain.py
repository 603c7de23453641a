"""Why a parameter is placed as it is: the whole problem solved again with it held to each of its candidates.

A placement is not judged alone: a neighbour that must change with it is part of what it costs. So each row is a whole
assignment, the cheapest one that has this placement, and says which other parameters it moves. The objective is that
of `passes.shard`: seconds of a microbatch, with the memory it holds priced in. Compute and collectives are of one
rank, for the whole model, without the pipeline.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import fx

from autopar.plan_text import bytes_text
from autopar.trace import Traced
from autopar.weight_rows import fold_names
from costmodel.errors import BadArgument, NoLegalSharding
from costmodel.hardware import Hardware
from costmodel.memory import state_bytes
from passes.costs import Pricing
from passes.ir import TensorType, calls, is_state, is_trainable, output_types, tensor_type
from passes.line import node_cost
from passes.localize import localize
from passes.loss import weigh_loss
from passes.overrides import Overrides
from passes.placement import Copied, Partial, Placement, Replicate, Shard, local_type, notation
from passes.schedules import schedule as schedule_named
from passes.shard import ShardPlan, shard
from passes.values import value_of


@dataclass(frozen=True)
class Candidate:
    """One placement of a parameter, and the cheapest whole assignment that has it. No figures if there is none."""

    placement: str
    chosen: bool
    objective_seconds: float | None = None
    compute_seconds: float = 0.0
    collective_seconds: float = 0.0
    rank_bytes: float = 0.0
    moves: tuple[str, ...] = ()  # other parameters that it places otherwise than the chosen assignment


@dataclass(frozen=True)
class Explanation:
    """A parameter and its candidates, cheapest first. Prints as a table."""

    name: str
    shape: tuple[Any, ...]
    mesh: Mapping[str, int]
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        best = next(c for c in self.candidates if c.chosen)
        assert best.objective_seconds is not None
        rows = []
        for c in self.candidates:
            mark = "*" if c.chosen else ""
            if c.objective_seconds is None:
                rows.append((mark, c.placement, *("",) * 6, "cannot be"))
                continue
            more = "" if c.chosen else f"+{(c.objective_seconds / best.objective_seconds - 1) * 100:.2g}%"
            memory_seconds = c.objective_seconds - c.compute_seconds - c.collective_seconds
            rows.append(
                (
                    mark,
                    c.placement,
                    _ms(c.objective_seconds),
                    more,
                    _ms(c.compute_seconds),
                    _ms(c.collective_seconds),
                    _ms(memory_seconds),
                    bytes_text(c.rank_bytes),
                    _moves(c.moves),
                )
            )
        headers = ("", "placement", "cost", "more", "compute", "tp", "memory", "a rank", "moves too")
        align = ("left", "left", "right", "right", "right", "right", "right", "right", "left")
        table = tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
        title = f"{self.name} ({' '.join(map(str, self.shape)) or 'scalar'}) over tp={self.mesh['tp']}"
        return "\n".join([title, *(line.rstrip() for line in table.splitlines())])


LEGEND = (
    "Each row is the cheapest whole assignment that has this placement; * is the plan's.\n"
    "cost = compute + tp (collectives) + memory (what is held, priced, and the optimizer's share), "
    "in ms of a microbatch;\n"
    "a rank: bytes held for the whole model without the pipeline; moves too: parameters that are then placed otherwise."
)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _moves(moves: Sequence[str]) -> str:
    return f"{moves[0].partition(' to ')[0]}{f' + {len(moves) - 1}' if len(moves) > 1 else ''}" if moves else ""


def explain(
    traced: Traced,
    name: str,
    *,
    mesh: Mapping[str, int],
    hardware: Hardware,
    microbatches: int,
    schedule: str = "1f1b",
    overrides: Overrides | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Explanation]:
    """The candidates of parameter `name`, or of every parameter of the module with that path. BadArgument if there is
    none, or tp = 1.

    The other arguments are those of the plan to explain.
    """
    if mesh["tp"] == 1:
        raise BadArgument("there is nothing to choose with tp = 1: every parameter is whole", use="tp of 2 or more")
    problem = _Problem(traced, mesh, hardware, microbatches, schedule, overrides or Overrides())
    aliases = {alias: first for first, others in traced.aliases.items() for alias in others}
    first = aliases.get(name, name)
    wanted = [first] if first in problem.choices else [n for n in problem.choices if n.startswith(name + ".")]
    if not wanted:
        raise BadArgument(f"no parameter or module {name!r} is used by the model", use=_known(problem.choices, name))
    found = []
    for parameter in wanted:
        progress(parameter)
        found.append(problem.explain(parameter))
    return found


def _known(choices: Mapping[str, Any], name: str) -> str:
    modules = {path for parameter in choices for path in _parents(parameter)}
    near = difflib.get_close_matches(name, sorted({*choices, *modules}), 6, 0.3)
    return ", ".join(near or [folded for folded, _ in fold_names(list(choices)[:1])])


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


class _Problem:
    """The shard pass's problem of a plan, solved once freely."""

    def __init__(
        self,
        traced: Traced,
        mesh: Mapping[str, int],
        hardware: Hardware,
        microbatches: int,
        schedule: str,
        overrides: Overrides,
    ) -> None:
        rows = traced.sizes.get("B", 1)
        self.mesh = dict(mesh)
        self.pricing = Pricing(hardware, {**traced.sizes, "B": -(-rows // microbatches)})
        self.module: fx.GraphModule = weigh_loss(traced.graph_module, traced.loss).module
        self.loss = next((node for node in self.module.graph.nodes if node.meta.get("loss")), None)
        self.microbatches = microbatches
        self.in_flight = schedule_named(schedule).max_in_flight(0, mesh["pp"], microbatches)
        overrides.check(self.module.graph, mesh)
        self.user_pins = overrides.pins(mesh)
        self.choices: dict[str, list[Placement]] = {}
        self.state = {
            str(n.target): n for n in self.module.graph.nodes if is_state(n) and n.meta.get("kind") == "parameter"
        }
        self.chosen = self._solve(None, None)
        self.chosen_cost = self._cost(self.chosen)

    def _solve(self, name: str | None, placement: Placement | None) -> ShardPlan:
        def pins(parameter: str, kind: TensorType, choices: Sequence[Placement]) -> Sequence[Placement]:
            if self.user_pins is not None:
                choices = self.user_pins(parameter, kind, choices)
            self.choices.setdefault(parameter, list(choices))
            return [c for c in choices if c == placement] if parameter == name else choices

        return shard(
            self.module,
            axis="tp",
            axis_size=self.mesh["tp"],
            pricing=self.pricing,
            microbatches=self.microbatches,
            in_flight=self.in_flight,
            loss=self.loss,
            pins=pins,
            may_regroup=name is None,  # candidates are compared within the plan's own rules
        )

    def _cost(self, plan: ShardPlan) -> tuple[float, float, float]:
        """(compute seconds, collective seconds, bytes) of a microbatch on one rank."""
        local = localize(self.module, plan)
        saved: set[object] = set()
        compute = collectives = kept = 0.0
        for node in calls(local.graph):
            if not output_types(node) or not is_trainable(node):
                continue
            cost = node_cost(node, self.pricing, self.mesh, saved)
            compute += cost.forward_seconds + cost.backward_seconds - cost.collective_seconds
            collectives += cost.collective_seconds
            kept += cost.saved_bytes
        count = 0
        for name, node in self.state.items():
            kind = tensor_type(node)
            assert kind is not None
            piece = local_type(kind, {"tp": plan.placements[value_of(self.state[name])]}, self.mesh)
            count += self.pricing.num_bytes(piece) // kind.dtype.itemsize
        return compute, collectives, float(state_bytes(count).total) + kept * self.in_flight

    def explain(self, name: str) -> Explanation:
        node = self.state[name]
        kind = tensor_type(node)
        assert kind is not None
        best = self.chosen.placement(node)
        candidates = []
        for placement in self.choices[name]:
            text = placement_text(kind, placement)
            chosen = placement == best
            try:
                plan = self.chosen if chosen else self._solve(name, placement)
            except NoLegalSharding:
                candidates.append(Candidate(text, False))
                continue
            compute, collectives, num_bytes = self.chosen_cost if chosen else self._cost(plan)
            moved = [
                other
                for other, n in self.state.items()
                if other != name and plan.placement(n) != self.chosen.placement(n)
            ]
            candidates.append(
                Candidate(
                    text, chosen, plan.objective_seconds, compute, collectives, num_bytes, self._moved(moved, plan)
                )
            )
        candidates.sort(key=lambda c: (c.objective_seconds is None, c.objective_seconds or 0.0, not c.chosen))
        return Explanation(name, tuple(kind.shape), self.mesh, tuple(candidates))

    def _moved(self, names: Sequence[str], plan: ShardPlan) -> tuple[str, ...]:
        found = []
        for name in names:
            kind = tensor_type(self.state[name])
            assert kind is not None
            found.append(f"{name} to {placement_text(kind, plan.placement(self.state[name]))}")
        return tuple(found)


def placement_text(kind: TensorType, placement: Placement) -> str:
    """A candidate as it is printed: the notation, and for whole ones what becomes of the gradient."""
    text = notation(kind.shape, {"tp": placement} if isinstance(placement, (Shard, Partial)) else {})
    if isinstance(placement, Copied):
        return f"{text} whole, sum gradient"
    return f"{text} whole" if isinstance(placement, Replicate) else text

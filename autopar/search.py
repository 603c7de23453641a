"""`search`: every way to run a model on so many devices, the fastest that fit first.

The space is `autopar.search_space`, the price of a layout `passes.layout_evaluator`. Layouts are priced with closed forms, those with
the least compute first; one whose compute alone is slower than everything that is kept is left out (`_Found.limit`). The fastest are then
priced again with their schedule played instruction by instruction.

What is kept of the rest: per decision and value the best layout that fits (else the one that comes nearest), from which
`autopar.search_text` says why the others lost, and per memory size the fastest, which is the Pareto front.

A plan of the result is an ordinary `Plan` that is made when first looked into: its degrees and prediction are known at once.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from autopar.options import call_arguments, device_for, mesh_of, model_name
from autopar.plan import Plan, Prediction
from autopar.planner import make_plan
from autopar.precision import precision_named
from autopar.predict import Evaluator, Layout, LayoutPrediction, evaluator
from autopar.search_space import RECOMPUTES, ZEROS, Space
from autopar.trace import Traced, trace
from costmodel.errors import AutoparError, BadArgument, DoesNotFit
from costmodel.hardware import Hardware
from costmodel.hardware import hardware as hardware_named
from costmodel.machine import basis_text
from passes.schedules import schedule as schedule_named

if TYPE_CHECKING:
    from autopar.explain_decision import DecisionExplanation

EXACT = 8  # of the fastest layouts: priced again, with their schedules played
PLAYED_COMPUTES = 12_000  # forwards of all schedules that are played: what a few seconds are enough for
KEPT = 64  # of the fastest layouts, until then
FAR = 1.5  # times the best step: what takes longer at least is not priced
DECISIONS = ("tp", "pp", "dp", "zero", "sequence_parallel", "schedule", "virtual_stages", "microbatch_rows", "recompute")
Progress = Callable[[int, int], None]


@dataclass
class _Best:
    """The best layout with one value of a decision: the fastest that fits, and the one that comes nearest to fitting."""

    fastest: LayoutPrediction | None = None
    smallest: LayoutPrediction | None = None

    def add(self, found: LayoutPrediction, fits: bool) -> None:
        if fits:
            if self.fastest is None or found.step_seconds < self.fastest.step_seconds:
                self.fastest = found
        elif self.smallest is None or found.peak_bytes < self.smallest.peak_bytes:
            self.smallest = found


class _SearchedPlan(Plan):
    """A Plan whose degrees and prediction are known and whose programs are made at the first look at anything else."""

    @classmethod
    def lazily(cls, known: Mapping[str, Any], make: Callable[[], Plan]) -> _SearchedPlan:
        plan = object.__new__(cls)
        plan.__dict__.update(known, _make=make)
        return plan

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in _FIELDS and name not in own and "_make" in own:
            plan = own["_make"]()
            own |= {each: getattr(plan, each) for each in _FIELDS if each not in own or each in _REFINED}
        return object.__getattribute__(self, name)


_FIELDS = {item.name for item in fields(Plan)}
_REFINED = ("mesh", "virtual_stages")


@dataclass
class Plans(Sequence[Plan]):
    """The fastest plans of a search. Prints as a table, with why the others lost.

    `predictions` are those of the plans, in the same order. `evaluated` layouts were priced in `seconds` after tracing, and `fitting` of
    them fit. `decisions[name][value]`: the best layout with that value, or the one that comes nearest to fitting. `front`: the
    layouts that no other beats in both time and memory, fastest first.
    """

    plans: tuple[Plan, ...]
    predictions: tuple[LayoutPrediction, ...]
    space: Space
    hardware: Hardware
    model: str
    evaluated: int
    fitting: int
    seconds: float
    decisions: Mapping[str, Mapping[Any, LayoutPrediction]]
    front: tuple[LayoutPrediction, ...]
    evaluator: Evaluator = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Plan]: ...
    def __getitem__(self, index: int | slice) -> Plan | Sequence[Plan]:
        return self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    def __str__(self) -> str:
        from autopar.search_text import search_text

        return search_text(self)

    def explain(self, decision: str) -> DecisionExplanation:
        """Why a decision is as it is: `explain("tp")` for all its values, `explain("tp=16")` for one; prints as a table."""
        from autopar.explain_decision import explain_decision

        return explain_decision(self, decision)


def search(
    model: nn.Module | Traced,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    gpus: int,
    hardware: str | Hardware = "h100-sxm",
    global_batch: int | None = None,
    nodes: int | None = None,
    memory_bytes: int | None = None,
    tp: int | str = "auto",
    pp: int | str = "auto",
    dp: int | str = "auto",
    microbatches: int | str | None = "auto",
    schedule: str = "auto",
    virtual_stages: int | None = None,
    recompute: str = "auto",
    zero: int | str = "auto",
    zeros: Sequence[int] = ZEROS,
    sequence_parallel: bool | str = "auto",
    precision: str = "fp32",
    loss_fn: Callable[..., torch.Tensor] | None = None,
    top: int = 10,
    progress: Progress = lambda done, total: None,
) -> Plans:
    """The fastest plans of a training step of `global_batch` rows on `gpus` devices, at most `top`.

    example_inputs: as of `parallelize`; of their sizes all but the rows are what is planned for. global_batch: rows of all replicas
    (None: each replica has the rows of the example). nodes: how many the devices are spread over; memory_bytes: of a device, where it
    is not the profile's. precision: as of `parallelize`; the model is traced in it. The rest are decisions: "auto" leaves them to the
    search, anything else is kept; `zeros`: the ZeRO stages that zero="auto" may choose.

    BadArgument: no devices, unknown hardware, a batch that no layout divides. DoesNotFit: no layout is within the memory; it says what
    would be. Errors of tracing as `parallelize` raises them.
    """
    profile = _profile(hardware, gpus, nodes, memory_bytes)
    for name, value in (("global_batch", global_batch), ("top", top)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise BadArgument(f"{name} = {value!r}", use="a positive integer")
    traced, own_name = _traced(model, example_inputs, precision, loss_fn)
    space = Space(
        gpus, global_batch, traced.sizes.get("B", 1), _given("tp", tp), _given("pp", pp), _given("dp", dp),
        _given("microbatches", microbatches), None if schedule == "auto" else (schedule_named(schedule).name,),
        _given("virtual_stages", virtual_stages),
        RECOMPUTES if recompute == "auto" else (_one_of("recompute", recompute, RECOMPUTES),),
        tuple(zeros) if zero == "auto" else (_one_of("zero", zero, ZEROS),),
        (False, True) if sequence_parallel == "auto" else (_one_of("sequence_parallel", sequence_parallel, (False, True)),),
        traced.precision.name,
    )  # fmt: skip
    with _collector_paused():
        return _searched(traced, own_name, space, profile, top, progress)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A search makes hundreds of thousands of values and hardly a cycle of them; the collector would walk the whole traced graph again and
    again meanwhile.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _searched(traced: Traced, own_name: str, space: Space, profile: Hardware, top: int, progress: Progress) -> Plans:
    begin = time.perf_counter()
    gpus = space.gpus
    priced = evaluator(traced, None, profile.for_ranks(gpus))
    priced.units(Layout(precision=space.precision))  # a device without the precision is an error, not one of each layout
    space.check(priced.facts, profile)
    found = _enumerate(priced, space, progress)
    if found.smallest is None and found.refused is not None:
        raise found.refused
    if not found.fastest:
        raise _fits_nowhere(priced, space, found)
    exact = _played(priced, found)
    played = {each.layout for each in exact}
    others = [each for _, _, each in sorted(found.fastest, reverse=True) if each.layout not in played]
    best = [*sorted(exact, key=_cost), *others][:top]
    decisions = {
        name: {value: again for value, entry in sorted(values.items(), key=lambda item: str(item[0])) if (again := _again(entry, exact))}
        for name, values in found.decisions.items()
    }
    seconds = time.perf_counter() - begin
    plans = tuple(_plan(each, traced, profile, own_name, space) for each in best)
    front = _front([*found.by_memory.values(), *best])
    return Plans(plans, tuple(best), space, profile, own_name, found.evaluated, found.fitting, seconds, decisions, front, priced)


# ---- the arguments --------------------------------------------------------------------------------------------------


def _profile(hardware: str | Hardware, gpus: int, nodes: int | None, memory_bytes: int | None) -> Hardware:
    profile = hardware_named(hardware)
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise BadArgument(f"gpus = {gpus!r}: there is nothing to plan for", use="the number of devices, 1 or more")
    profile = profile.on_nodes(gpus, nodes)
    return replace(profile, memory_bytes=memory_bytes) if memory_bytes is not None else profile


def _given(name: str, value: int | str | None) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadArgument(f"{name} = {value!r}", use='a positive integer, or "auto"')
    return value


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise BadArgument(f"{name} = {value!r}", use=", ".join(["auto", *map(str, allowed)]))
    return value


def _traced(
    model: nn.Module | Traced, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None, precision: str,
    loss_fn: Callable[..., torch.Tensor] | None,
) -> tuple[Traced, str]:  # fmt: skip
    """The model as it computes in the precision, and what it is called."""
    row = precision_named(precision)
    if isinstance(model, Traced):
        if precision not in ("fp32", model.precision.name):
            raise BadArgument(
                f"precision = {precision!r}, and the model was traced in {model.precision.name!r}", use="the precision of the trace"
            )
        return model, "model"
    if not isinstance(model, nn.Module):
        raise BadArgument(f"the model is a {type(model).__name__}, not an nn.Module")
    if example_inputs is None:
        raise BadArgument("a search needs example inputs", why="sizes decide what is fast", use="example_inputs={...}")
    args, kwargs = call_arguments(example_inputs)
    found = trace(model, args, kwargs, loss_fn=loss_fn, precision=row, device=device_for(None, model))
    return found, model_name(model)


# ---- the search -----------------------------------------------------------------------------------------------------


def _cost(found: LayoutPrediction) -> float:
    """Seconds a row: where replicas bring their own rows, more of them do more."""
    return found.step_seconds / found.layout.global_rows


@dataclass
class _Found:
    """What is kept of all layouts."""

    evaluated: int = 0
    fitting: int = 0
    fastest: list[tuple[float, int, LayoutPrediction]] = field(default_factory=list)  # a heap of -seconds a row
    decisions: dict[str, dict[Any, _Best]] = field(default_factory=lambda: {name: {} for name in DECISIONS})
    by_memory: dict[int, LayoutPrediction] = field(default_factory=dict)  # the fastest per 1/64 of the device's memory
    smallest: LayoutPrediction | None = None
    refused: AutoparError | None = None  # why the first of those that cannot be could not

    def limit(self, layout: Layout) -> float:
        """Seconds beyond which a layout changes nothing that is kept: slower than the best of each of its decisions, or than FAR times the
        best of all.
        """
        if len(self.fastest) < KEPT:
            return float("inf")
        far = -FAR * max(self.fastest)[0] * layout.global_rows
        slowest = -self.fastest[0][0] * layout.global_rows
        for name in DECISIONS:
            best = self.decisions[name].get(getattr(layout, name))
            if best is None or best.fastest is None:
                return far
            slowest = max(slowest, best.fastest.step_seconds)
        return min(far, slowest)

    def add(self, found: LayoutPrediction) -> None:
        fits, peak = found.fits, found.peak_bytes
        self.evaluated += 1
        layout = found.layout
        for name in DECISIONS:
            value = getattr(layout, name)
            best = self.decisions[name].get(value)
            if best is None:
                best = self.decisions[name][value] = _Best()
            best.add(found, fits)
        if self.smallest is None or peak < self.smallest.peak_bytes:
            self.smallest = found
        if not fits:
            return
        self.fitting += 1
        entry = (-_cost(found), -self.evaluated, found)
        if len(self.fastest) < KEPT:
            heapq.heappush(self.fastest, entry)
        elif entry > self.fastest[0]:
            heapq.heapreplace(self.fastest, entry)
        size = int(peak * 64 / found.memory_bytes)
        if size not in self.by_memory or found.step_seconds < self.by_memory[size].step_seconds:
            self.by_memory[size] = found


def best_with(plans: Plans, name: str, value: Any) -> LayoutPrediction | None:
    """The fastest layout that has this value of a decision, its schedule played; the one that comes nearest where none fits; None where
    there is none. The other decisions are as free as in the search.
    """
    known = plans.decisions.get(name, {}).get(value)
    if known is None:
        with _collector_paused():
            found = _enumerate(plans.evaluator, plans.space.holding(name, value), keep=lambda layout: getattr(layout, name) == value)
        known = max(found.fastest)[2] if found.fastest else found.smallest
    return None if known is None else exactly(plans.evaluator, known) or known


def _enumerate(
    priced: Evaluator, space: Space, progress: Progress = lambda done, total: None, keep: Callable[[Layout], bool] = lambda layout: True
) -> _Found:
    """Prices layouts in the order of what they take at least, and leaves out those that can no longer be kept."""
    found, facts = _Found(), priced.facts
    groups: list[tuple[float, int, _Least, list[Layout]]] = []
    for group in space.layouts(facts, priced.hardware):
        group = list(filter(keep, group))
        if not group:
            continue
        try:
            least = _least(priced, replace(group[0], recompute="none"))
        except AutoparError as error:  # the model cannot be split so
            found.refused = found.refused or error
            continue
        groups.append((min(map(least.seconds, group)), len(groups), least, group))
    groups.sort(key=lambda entry: entry[:2])
    for done, (_, _, least, group) in enumerate(groups):
        progress(done, len(groups))
        for layout in group:
            if least.seconds(layout) > found.limit(layout):
                continue
            try:
                found.add(priced.predict(layout))
            except AutoparError as error:  # no sharding, too many stages, a schedule that cannot be: not a layout of this model
                found.refused = found.refused or error
    return found


@dataclass(frozen=True)
class _Least:
    """Seconds of a microbatch on the whole model, nothing computed again and no traffic that could be hidden."""

    forward: float
    backward: float
    weight: float

    def seconds(self, layout: Layout) -> float:
        """A step's lower bound: microbatches times the mean rank's compute, and the schedule's idle time between equal stages, of which a
        rank that is busier than the others takes at most one microbatch's excess.

        Proof, for x seconds of a microbatch on the busiest rank, T on all p, and any of the schedule's sums that only adds, at most p - 1
        forwards, input and weight gradients of a rank: m x + (its share of T - x) >= (m - 1) x + its share of T, and x >= T / p.
        """
        pp, count = layout.pp, layout.microbatches
        whole = self.forward + self.backward
        if pp == 1:
            return count * whole
        row, virtual = schedule_named(layout.schedule), layout.virtual_stages
        sums = row.idle(pp, count, virtual) if row.idle is not None else None
        weight = self.weight if row.splits_backward else self.backward / 2
        shares = [
            (f * self.forward + i * (self.backward - weight) + w * weight) / ((pp - 1) * virtual)
            for f, i, w in sums or ()
            if min(f, i, w) >= 0 and max(f, i, w) <= (pp - 1) * virtual
        ]
        return (count - 1) * whole / pp + max(*shares, whole / pp) if shares else count * whole / pp


def _least(priced: Evaluator, layout: Layout) -> _Least:
    units = priced.units(layout)
    tensor = "tp" not in layout.overlap
    return _Least(
        sum(unit.count * (unit.forward_seconds + tensor * unit.forward_tensor_seconds) for unit in units),
        sum(unit.count * (unit.backward_seconds + tensor * unit.backward_tensor_seconds) for unit in units),
        sum(unit.count * unit.weight_seconds for unit in units),
    )


def _played(priced: Evaluator, found: _Found) -> list[LayoutPrediction]:
    """The fastest layouts, their schedules played, as far as EXACT and PLAYED_COMPUTES go; without those whose schedule cannot be."""
    played: list[LayoutPrediction] = []
    schedules: set[tuple[object, ...]] = set()
    computes = 0
    for _, _, each in sorted(found.fastest, reverse=True):
        layout = each.layout
        key = (layout.schedule, layout.pp, layout.virtual_stages, layout.microbatches)
        if key not in schedules and layout.pp > 1:
            schedules.add(key)
            computes += layout.num_stages * layout.microbatches
        if len(played) == EXACT or (played and computes > PLAYED_COMPUTES):
            break
        with_times = exactly(priced, each)
        if with_times is not None:
            played.append(with_times)
    return played


def exactly(priced: Evaluator, found: LayoutPrediction) -> LayoutPrediction | None:
    """The prediction with the schedule played; None if there is no such schedule."""
    try:
        return priced.predict(found.layout, exact=True)
    except AutoparError:
        return None


def _again(entry: _Best, exact: Iterable[LayoutPrediction]) -> LayoutPrediction | None:
    kept = entry.fastest or entry.smallest
    return next((each for each in exact if kept is not None and each.layout == kept.layout), kept)


def _front(found: Sequence[LayoutPrediction]) -> tuple[LayoutPrediction, ...]:
    """Those that no other beats in time and memory both."""
    front: list[LayoutPrediction] = []
    for each in sorted(found, key=lambda p: (p.step_seconds, p.peak_bytes)):
        if not front or each.peak_bytes < front[-1].peak_bytes:
            front.append(each)
    return tuple(front)


def _fits_nowhere(priced: Evaluator, space: Space, found: _Found) -> AutoparError:
    """What was nearest, and what would fit: freer decisions on the same devices, else more devices."""
    from autopar.plan_text import bytes_text
    from autopar.search_text import layout_text

    freed = replace(space, recomputes=RECOMPUTES, zeros=ZEROS, sequence_parallel=(False, True), schedules=None, microbatches=None)
    ways = [("", freed)] if freed != space else []
    ways += [(f"{count} GPUs", _with_gpus(freed, count)) for count in (space.gpus * 2**k for k in range(1, 9))]
    remedy = "a smaller model, or devices with more memory"
    for label, way in ways:
        rows = {dp for _, _, dp in way.degrees(priced.facts, priced.hardware.devices_per_node) if way.rows_of(dp) is not None}
        if not rows:
            continue
        fitting = _enumerate(priced, replace(way, recomputes=("full",) if label else way.recomputes))
        if fitting.fastest:
            best = max(fitting.fastest)[2]
            remedy = f"{label + ', ' if label else ''}{layout_text(best.layout)}: {bytes_text(best.peak_bytes)} a device"
            break
    limit = bytes_text(priced.hardware.memory_bytes)
    nearest = found.smallest
    why = "parameters, gradients and optimizer state alone are more than that, however they are spread"
    if nearest is not None:
        why = f"the least is {bytes_text(nearest.peak_bytes)} a device, with {layout_text(nearest.layout)}"
    return DoesNotFit(f"the model fits on {space.gpus} GPUs of {limit} in no layout", why=why, use=remedy)


def _with_gpus(space: Space, gpus: int) -> Space:
    return replace(space, gpus=gpus, tp=None, pp=None, dp=None)


# ---- plans ----------------------------------------------------------------------------------------------------------


def _plan(found: LayoutPrediction, traced: Traced, hardware: Hardware, name: str, space: Space) -> Plan:
    layout = found.layout
    zero = layout.zero if layout.dp > 1 else 0
    mesh = mesh_of(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    predicted = Prediction(
        found.step_seconds, found.peak_bytes, found.bubble_fraction, sum(found.communication_seconds.values()), found.tflops_per_gpu,
        found.mfu, basis_text(found.basis, found.uncertainty),
        found.replicas if found.replicas.seconds else None,
    )  # fmt: skip
    known = {
        "model": name, "mesh": mesh, "microbatches": layout.microbatches, "schedule": layout.schedule, "hardware": hardware.name,
        "virtual_stages": layout.virtual_stages, "recompute": layout.recompute, "predicted": predicted, "layout": layout,
        "zero": zero, "precision": traced.precision.name,
    }  # fmt: skip

    def make() -> Plan:
        sizes = {**traced.sizes, **({"B": layout.microbatch_rows * layout.microbatches} if "B" in traced.sizes else {})}
        return make_plan(
            replace(traced, sizes=sizes), mesh=mesh, microbatches=layout.microbatches, schedule=layout.schedule, hardware=hardware,
            model_name=name, sequence_parallel=layout.sequence_parallel, virtual_stages=layout.virtual_stages,
            recompute=layout.recompute, zero=zero,
        )  # fmt: skip

    return _SearchedPlan.lazily(known, make)

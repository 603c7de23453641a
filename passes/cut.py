"""The cut pass: contiguous pipeline stages with the least step time of the chosen schedule, within memory.

- Candidates are the places on the line (`passes.line`) where fewer bytes cross than on both sides (`_candidates`). The clean ones
  among them are those that no place within half a stage undercuts: between layers, as a rule (`_clean`).
- A stage's time is the roofline forward + backward of its calls, collectives included, plus sending its results on: each value is a
  message. Its memory is its parameters' training state plus what backward keeps times the microbatches in flight there.
- Dynamic programming over places and stages finds the least possible maximum time (`_Search.bottleneck`), and among the cuts within
  one percent of it the one that sends least, then the most even one (`_Search.ends`).
- From there on the aim itself is what counts: the step time of the schedule that will run, with each rank's stages, each pair of stages'
  transfers and the memory of a rank (`passes.cut_objective`). Few cuts are all tried; of many, the neighbours of the best so far.
- Where that leaves a rank with much less to do than another, places with more crossing are looked at too.
- Clean cuts are taken if they come within CLEAN_SLACK of what any cut could do, and are no slower than the dynamic programme's; a layer is
  then never split in a way that sends more than needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from costmodel.collectives import send_seconds
from costmodel.errors import BadArgument, TooManyStages
from costmodel.memory import PeakMemory, state_bytes
from costmodel.mesh import nodes_spanned
from passes.costs import Pricing
from passes.cut_objective import InFlight, Objective
from passes.ir import is_state, origin
from passes.line import NEVER, Line, running_sums
from passes.step_time import StepTimes

Held = Mapping[str, tuple[int, ...]]  # parameter name -> the stages that hold it
MOST_EXPLAINED = 6  # boundaries that get a note each
MOST_PLACES = 700  # candidates that the dynamic programme looks at
SLACK = 1.01  # cuts within one percent of the best maximum compete on bytes sent and evenness
CLEAN_SLACK = 1.10  # how much slower than the best cut one between layers may be
UNBALANCED = 1.25  # the busiest rank's time over the mean: from here on places inside of layers are looked at too


@dataclass(frozen=True)
class StageCost:
    """Predictions for one stage, per microbatch and rank. `sends`: stages that get something from it, and the seconds of each transfer."""

    forward_seconds: float
    backward_seconds: float
    collective_seconds: float
    send_seconds: float
    parameter_count: int
    state_bytes: float
    saved_bytes: float
    in_flight: int
    recompute_seconds: float = 0.0  # of the backward: what is run again
    memory: PeakMemory | None = None  # of its rank, measured; None while stages are being chosen
    sends: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sends", tuple((int(stage), float(seconds)) for stage, seconds in self.sends))

    def seconds_to(self, stage: int) -> float:
        """Seconds of a transfer to a later stage, or of its gradients back."""
        return dict(self.sends).get(stage, 0.0)

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds + self.send_seconds

    @property
    def peak_bytes(self) -> float:
        """The most that a rank of this stage holds, with all its stages."""
        if self.memory is not None:
            return float(self.memory.peak_bytes)
        return self.state_bytes + self.saved_bytes * self.in_flight


@dataclass(frozen=True)
class CutPlan:
    """`stage_of` every parametric node, the stages' predicted costs, and per boundary why it is there."""

    stage_of: Mapping[fx.Node, int]
    costs: tuple[StageCost, ...]
    boundaries: tuple[str, ...]
    notes: tuple[str, ...]


def _candidates(line: Line) -> list[int]:
    """Places to cut: where fewer bytes cross than on both sides of it (of the run of places with as many)."""
    count = len(line.nodes)
    found: list[int] = []
    start = 1
    while start < count:
        end = start
        while end + 1 < count and line.crossing[end + 1] == line.crossing[start]:
            end += 1
        before = line.crossing[start - 1] if start > 1 else float("inf")
        after = line.crossing[end + 1] if end + 1 < count else float("inf")
        if before >= line.crossing[start] <= after and line.crossing[start] < NEVER:
            found += range(start, end + 1)
        start = end + 1
    return found


def _clean(line: Line, found: Sequence[int], share: float) -> list[int]:
    """The places that no other within this share of the line's time undercuts."""
    total = running_sums([cost.forward_seconds + cost.backward_seconds for cost in line.costs])
    near = total[-1] * share
    kept: list[int] = []
    for index, place in enumerate(found):
        around: list[int] = []
        for step in (-1, 1):
            other = index + step
            while 0 <= other < len(found) and abs(total[found[other]] - total[place]) <= near:
                around.append(found[other])
                other += step
        if all(line.crossing[place] <= line.crossing[neighbour] for neighbour in around):
            kept.append(place)
    return kept


def _thinned(line: Line, found: list[int]) -> list[int]:
    """At most MOST_PLACES, those where least crosses."""
    return (
        sorted(sorted(found, key=lambda place: line.crossing[place])[:MOST_PLACES])
        if len(found) > MOST_PLACES
        else found
    )


@dataclass
class _Search:
    """The dynamic programme over some places to cut. `points` are 0, the places, and the end of the line."""

    line: Line
    points: list[int]
    num_stages: int
    pricing: Pricing
    axis_sizes: Mapping[str, int]
    in_flight: InFlight
    sends: torch.Tensor = field(init=False)  # seconds of what crosses at each point, there and back
    seconds: torch.Tensor = field(init=False)  # [start, end]: of a stage between two points
    tables: list[torch.Tensor] = field(init=False)  # per stage: its seconds, inf where it does not fit
    fits: bool = field(init=False)
    bottleneck: float = field(init=False)  # the least possible maximum of the stages' seconds

    def __post_init__(self) -> None:
        costs, hardware = self.line.costs, self.pricing.hardware
        mesh = {"pp": self.num_stages, **self.axis_sizes}
        self._link = hardware.inside if nodes_spanned(mesh, "pp", hardware.devices_per_node) == 1 else hardware.across
        times = self._at_points([cost.forward_seconds + cost.backward_seconds for cost in costs])
        self.sends = torch.tensor([self._send_seconds(k) for k in range(len(self.points))], dtype=torch.float64)
        ordered = torch.ones(len(self.points), len(self.points), dtype=torch.bool).triu(1)
        self.seconds = (times.unsqueeze(0) - times.unsqueeze(1) + self.sends.unsqueeze(0)).masked_fill(
            ~ordered, float("inf")
        )
        kept = self._at_points([cost.saved_bytes for cost in costs])
        # counted at the first use of each parameter; a tied parameter's second copy is little beside the rest
        first = [sum(numel for numel, previous in uses if previous < 0) for uses in self.line.first_use]
        state = self._at_points([float(state_bytes(numel).total) for numel in first])
        capacity = float(hardware.memory_bytes)
        self.tables = []
        for stage in range(self.num_stages):
            saved = (kept.unsqueeze(0) - kept.unsqueeze(1)) * self.in_flight(stage, self.num_stages)
            self.tables.append(
                self.seconds.masked_fill(state.unsqueeze(0) - state.unsqueeze(1) + saved > capacity, float("inf"))
            )
        self.bottleneck, self.fits = self._least_maximum(), True
        if self.bottleneck == float("inf"):
            self.tables, self.fits = [self.seconds] * self.num_stages, False
            self.bottleneck = self._least_maximum()

    def _at_points(self, values: Sequence[float]) -> torch.Tensor:
        sums = running_sums(values)
        return torch.tensor([sums[point] for point in self.points], dtype=torch.float64)

    def _send_seconds(self, index: int) -> float:
        if index == len(self.points) - 1:
            return 0.0
        place, link = self.points[index], self._link
        messages = max(self.line.num_crossing[place] - 1, 0) * link.latency_seconds  # each further value is one more
        return 2 * (
            float(send_seconds(num_bytes=self.line.crossing[place], link=link)) + messages
        )  # there, and its gradient back

    def _least_maximum(self) -> float:
        best = self.tables[0][0]
        for table in self.tables[1:]:
            best = torch.maximum(best.unsqueeze(1), table).amin(0)
        return float(best[-1])

    def ends(self) -> list[int]:
        """Indices into `points` of the stages' ends, 0 first: within SLACK of the bottleneck, least sent, then most even."""
        even = float(self.seconds[0, -1]) / self.num_stages
        total = torch.full((len(self.points),), float("inf"), dtype=torch.float64)
        total[0] = 0.0
        choices: list[torch.Tensor] = []
        for table in self.tables:
            price = (
                self.sends.unsqueeze(0) + (table - even) ** 2 / (1e3 * even)
                if even
                else self.sends.unsqueeze(0) + table * 0
            )
            price = price.masked_fill(table > self.bottleneck * SLACK, float("inf"))
            total, choice = (total.unsqueeze(1) + price).min(0)
            choices.append(choice)
        ends = [len(self.points) - 1]
        for choice in reversed(choices):
            ends.append(int(choice[ends[-1]]))
        return ends[::-1]


def cut(
    module: fx.GraphModule, num_stages: int, *, pricing: Pricing, axis_sizes: Mapping[str, int],
    in_flight: InFlight = lambda stage, num_stages: num_stages - stage, forced: Sequence[str] | Held | None = None,
    step_times: StepTimes | None = None,
) -> CutPlan:  # fmt: skip
    """Assign every parametric node to a stage. TooManyStages if there are not enough places to cut.

    `in_flight(stage, num_stages)`: microbatches whose activations a stage holds at once. `forced`: module paths, each cut falling right
    before the first call of its path; or for each parameter the stages that hold it, as in an earlier plan of the model. `step_times`:
    of the schedule that the stages are for; None: they are cut for the least maximum stage time.
    """
    line = Line(module, pricing, axis_sizes)
    if not line.nodes:
        raise TooManyStages("the model has no calls that depend on parameters: there is nothing to cut or to train")
    if step_times is not None:
        assert step_times.num_stages == num_stages

    def search(places: Sequence[int]) -> _Search:
        return _Search(line, [0, *places, len(line.nodes)], num_stages, pricing, axis_sizes, in_flight)

    def objective(points: Sequence[int]) -> Objective:
        return Objective(
            line, points, num_stages, hardware=pricing.hardware, axis_sizes=axis_sizes, in_flight=in_flight, step_times=step_times
        )

    notes: list[str] = []
    if forced:
        places = (
            _held_places(line, forced, num_stages)
            if isinstance(forced, Mapping)
            else _forced_places(line, forced, num_stages)
        )
        chosen = _Chosen(objective([0, *places, len(line.nodes)]), list(range(num_stages + 1)))
    else:
        chosen, plain = _best(line, num_stages, search, objective)
        explained = min(num_stages - 1, MOST_EXPLAINED)
        notes += _better_than(chosen, plain)
        notes += [_why(line, chosen, stage) for stage in range(explained)]
        notes += [f"the other {num_stages - 1 - explained} boundaries likewise"] if explained < num_stages - 1 else []
    if chosen.excess_bytes > 0:
        capacity = pricing.hardware.memory_bytes / 2**30
        notes.insert(
            0, f"no cut into {num_stages} stages fits {capacity:.0f} GiB a device: this one takes {_bytes_text(chosen.excess_bytes)} more"
        )
    places = chosen.places
    stage_of = {node: stage for stage in range(num_stages) for node in line.nodes[places[stage] : places[stage + 1]]}
    transfers = chosen.objective.transfers(torch.tensor([chosen.ends]))[1][0].tolist()
    costs = tuple(
        _stage_cost(line, places, stage, transfers[stage], in_flight(stage, num_stages)) for stage in range(num_stages)
    )
    boundaries = tuple(str(origin(line.first_own(place))) for place in places[1:-1])
    return CutPlan(stage_of, costs, boundaries, tuple(notes))


@dataclass
class _Chosen:
    """A cut of an objective's places, judged."""

    objective: Objective
    ends: list[int]
    excess_bytes: float = field(init=False)
    bare_ranks: float = field(init=False)
    step_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        judged = self.objective.judge(torch.tensor([self.ends]))
        self.excess_bytes, self.bare_ranks = float(judged.excess_bytes[0]), float(judged.bare_ranks[0])
        self.step_seconds = float(judged.step_seconds[0])

    @property
    def places(self) -> list[int]:
        return [self.objective.points[end] for end in self.ends]

    @property
    def imbalance(self) -> float:
        """The busiest rank's seconds over their mean."""
        forward, backward = self.objective.stage_seconds(torch.tensor([self.ends]))
        loads = torch.zeros(max(self.objective.stage_ranks) + 1, dtype=torch.float64)
        loads.index_add_(0, torch.tensor(self.objective.stage_ranks), (forward + backward)[0])
        return float(loads.amax() / loads.mean()) if float(loads.sum()) else 1.0

    def no_worse(self, other: _Chosen, slack: float = 1.0) -> bool:
        """Exceeds the device by no more than the other, leaves no more ranks bare, and is at most `slack` times as slow."""
        mine, others = (self.excess_bytes, self.bare_ranks), (other.excess_bytes, other.bare_ranks)
        return mine < others or (mine == others and self.step_seconds <= slack * other.step_seconds)


def _best(
    line: Line, num_stages: int, search: Callable[[Sequence[int]], _Search], objective: Callable[[Sequence[int]], Objective]
) -> tuple[_Chosen, _Chosen]:
    """The best cut found; and what the dynamic programme alone would have taken."""
    candidates = _candidates(line)
    everywhere = [place for place in range(1, len(line.nodes)) if line.crossing[place] < NEVER]
    if len(candidates) < num_stages - 1:
        candidates = everywhere
    if len(candidates) < num_stages - 1:
        raise TooManyStages(
            f"cannot cut the model into {num_stages} pipeline stages", why=f"its graph has {len(candidates)} places to cut",
            use=f"pp <= {len(candidates) + 1}",
        )  # fmt: skip
    clean = _thinned(line, _clean(line, candidates, 0.5 / num_stages))
    worth_it = _clean(line, candidates, 0.05 / num_stages)
    anywhere = search(_thinned(line, worth_it if len(worth_it) >= num_stages - 1 else candidates))
    plain = _Chosen(objective(anywhere.points), anywhere.ends())
    best = _improved(plain)
    if len(clean) >= num_stages - 1:
        between = search(clean)
        start = _Chosen(objective(between.points), between.ends())
        if between.bottleneck <= CLEAN_SLACK * anywhere.bottleneck and between.fits == anywhere.fits:
            plain = start
        cleaner = _improved(start)
        if cleaner.no_worse(best, CLEAN_SLACK) and cleaner.no_worse(plain):
            best = cleaner
    if best.objective.step_times is not None and best.imbalance > UNBALANCED and len(everywhere) > len(anywhere.points) - 2:
        # large layers and few of them: a rank would have next to nothing, so places are worth it where more crosses
        widest = search(_thinned(line, everywhere))
        inside = _improved(_Chosen(objective(widest.points), widest.ends()))
        if not best.no_worse(inside, CLEAN_SLACK):
            best = inside
    return best, plain


def _improved(start: _Chosen) -> _Chosen:
    if start.objective.step_times is None:
        return start
    return _Chosen(start.objective, start.objective.improved(start.ends))


def _stage_cost(line: Line, places: Sequence[int], stage: int, sends: Sequence[float], in_flight: int) -> StageCost:
    start, end = places[stage], places[stage + 1]
    costs = line.costs[start:end]
    count = line.parameters_between(start, end)
    return StageCost(
        sum(cost.forward_seconds for cost in costs), sum(cost.backward_seconds for cost in costs),
        sum(cost.collective_seconds for cost in costs),
        2 * sum(sends), count, float(state_bytes(count).total), sum(cost.saved_bytes for cost in costs), in_flight,
        sends=tuple((to, seconds) for to, seconds in enumerate(sends) if seconds),
    )  # fmt: skip


def _forced_places(line: Line, forced: Sequence[str], num_stages: int) -> list[int]:
    if len(forced) != num_stages - 1:
        raise BadArgument(
            f"{len(forced)} cuts were given for {num_stages} stages", use=f"{num_stages - 1} module paths"
        )
    places = []
    for path in forced:
        place = next(
            (k for k, n in enumerate(line.nodes) if origin(n).path == path or origin(n).path.startswith(path + ".")),
            None,
        )
        if place is None:
            known = sorted({origin(n).path.rsplit(".", 1)[0] for n in line.nodes if origin(n).path})
            raise BadArgument(f"cannot cut before {path!r}: no call comes from that module", use=", ".join(known[:12]))
        places.append(place)
        if line.crossing[place] >= NEVER:
            raise BadArgument(
                f"cannot cut before {path!r}: it would part an op's results, or the readers of a buffer that forward updates"
            )
    if sorted(set(places)) != places or places[0] == 0:
        raise BadArgument(f"the cuts {', '.join(forced)} are not in the model's order, or leave a stage empty")
    return places


def _held_places(line: Line, held: Held, num_stages: int) -> list[int]:
    """Where to cut so that every stage uses only parameters that it holds: of the places that do, the one where least crosses."""
    places: list[int] = []
    for stage in range(1, num_stages):
        low, high = (places[-1] if places else 0) + 1, len(line.nodes) - (num_stages - stage)
        for k, node in enumerate(line.nodes):
            for source in node.all_input_nodes:
                stages = held.get(str(source.target), ()) if is_state(source) else ()
                if stages and max(stages) < stage:
                    low = max(low, k + 1)
                elif stages and min(stages) >= stage:
                    high = min(high, k)
        if low > high:
            raise BadArgument(
                f"this call of the model uses parameters in another order: it cannot be cut before stage {stage} as planned"
            )
        places.append(min(range(low, high + 1), key=lambda k: (line.crossing[k], k)))
    return places


def _bytes_text(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _why(line: Line, chosen: _Chosen, stage: int) -> str:
    """Why a boundary is where it is: what moving it to the neighbouring places would do to the step, and to what is sent."""
    objective, ends = chosen.objective, chosen.ends
    sent = objective.transfers(torch.tensor([ends]))[0][0].sum()

    def moved(step: int, words: str) -> list[str]:
        place = ends[stage + 1] + step
        if not ends[stage] < place < ends[stage + 2]:
            return []
        row = torch.tensor([[*ends[: stage + 1], place, *ends[stage + 2 :]]])
        judged = objective.judge(row)
        more = float(objective.transfers(row)[0][0].sum() - sent)
        memory = ", beyond the device's memory" if float(judged.excess_bytes[0]) > chosen.excess_bytes else ""
        bytes_text = f", {_bytes_text(abs(more))} {'more' if more > 0 else 'less'}" if more else ""
        label = _label(line, objective.points[place])
        return [f"{words}, at {label}: {_milliseconds(float(judged.step_seconds[0]))}{bytes_text}{memory}"]

    place = objective.points[ends[stage + 1]]
    what = "a step before its optimizer" if objective.step_times else "the slowest stage"
    others = [*moved(-1, "one place earlier"), *moved(1, "one place later")]
    text = f"stage {stage + 1} begins at {_label(line, place)}: {_bytes_text(line.crossing[place])} cross; "
    return text + f"{what} takes {_milliseconds(chosen.step_seconds)}" + (f" ({'; '.join(others)})" if others else "")


def _label(line: Line, place: int) -> str:
    first = line.first_own(place)
    return origin(first).path or origin(first).source or first.name


def _better_than(chosen: _Chosen, plain: _Chosen) -> list[str]:
    """Where stages of equal time are not the quickest: what they would take."""
    if plain.places == chosen.places or plain.step_seconds <= chosen.step_seconds * 1.001:
        return []
    begins = [_label(chosen.objective.line, place) for place in plain.places[1:-1][:MOST_EXPLAINED]]
    more = ", ..." if len(plain.places) - 2 > MOST_EXPLAINED else ""
    return [
        f"cut for the step, {_milliseconds(chosen.step_seconds)}; the least maximum stage time alone would begin stages at "
        f"{', '.join(begins)}{more} and take {_milliseconds(plain.step_seconds)}"
    ]

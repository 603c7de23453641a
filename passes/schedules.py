"""SCHEDULES: the order in which a pipeline rank runs its microbatches, one row per schedule.

Design note. A schedule is a generator of computes (Forward, Backward, or BackwardInput and BackwardWeight) for one
pipeline rank: `generator(rank, num_ranks, num_microbatches, virtual_stages)`. Which stages the rank has follows from
the row's placement, and `chunk` counts them. The generator says nothing of transfers: passes/order.py adds them from
the edges of the cut model, and passes/prove.py proves the whole. So a new schedule is a few lines, and cannot be wrong
in silence: `register` runs the proof over a grid of sizes before the name exists.

In every schedule the backwards of a stage run in the order of the microbatches, and so do its weight gradients.
Gradients are then added up in the order of single-process accumulation, and a pipelined step is equal to that to the
last bit.

A row also states what is known of the schedule, and the tests hold it to that: the most microbatches in flight
(forwards whose backward, with its weight gradients, has not run, which is what activation memory is paid for), and the
bubble, the idle part of the step when all stages take the same time and transfers take none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from costmodel.errors import BadArgument, BadSchedule
from passes import dualpipe, evaluation, interleaved, zero_bubble
from passes.instructions import Backward, BackwardInput, Compute, Forward

# (rank, num_ranks, num_microbatches, virtual_stages); with one stage a rank the last may be left out.
Generator = Callable[..., Iterator[Compute]]
# (stage, num_ranks, virtual_stages) -> the pipeline rank that has the stage.
Placement = Callable[[int, int, int], int]


def loop(stage: int, num_ranks: int, virtual_stages: int) -> int:
    """Around and around: rank r has the stages r, p + r, 2p + r, ..."""
    return stage % num_ranks


def v_shape(stage: int, num_ranks: int, virtual_stages: int) -> int:
    """Down and up again: with two stages a rank, rank r has r and 2p - 1 - r, so rank 0 has the first and the last."""
    turn, place = divmod(stage, num_ranks)
    return num_ranks - 1 - place if turn % 2 else place


PLACEMENTS: dict[str, Placement] = {"loop": loop, "v": v_shape}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A row of SCHEDULES.

    `generator(rank, num_ranks, num_microbatches, virtual_stages)` yields a rank's computes.
    `max_in_flight(rank, num_ranks, num_microbatches, virtual_stages)` bounds the forwards, of all the rank's stages
    together, whose backward with its weight gradients has not run.
    `bubble(num_ranks, num_microbatches, virtual_stages)` is the idle fraction of the ranks' time in the step for equal
    stages (where the backward is split: as long as the forward, and the weight gradients as long again); None where
    none is known.
    `bubble_seconds(num_ranks, num_microbatches, virtual_stages, forward, inputs, weights)` is the published formula: the
    most that a rank idles between its first compute and its last, when every stage takes these seconds for a forward,
    its input gradients and its weight gradients; None for times or sizes that the source says nothing of.
    `idle(num_ranks, num_microbatches, virtual_stages)`: the step takes as long as a rank computes and the most of these sums more, each
    (forwards, input gradients, weight gradients) of a stage, when all stages take the same time; None where that is not known.
    `virtual_stages` are the numbers of stages a rank may have, None for any from 2 on; the first is the default.
    `placement` says which rank has which stage. `splits_backward` says that there are BackwardInput and BackwardWeight.
    `trains` is False for a schedule of forwards only.
    """

    name: str
    generator: Generator
    description: str
    max_in_flight: Callable[..., int]
    bubble: Callable[..., Fraction | None] | None = None
    bubble_seconds: Callable[..., float | None] | None = None
    idle: Callable[..., tuple[tuple[int, int, int], ...] | None] | None = None
    source: str = ""
    trains: bool = True
    virtual_stages: tuple[int, ...] | None = (1,)
    placement: Placement = loop
    splits_backward: bool = False

    def idle_seconds(
        self, num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
    ) -> float | None:
        """Seconds that a step takes beyond a rank's own computes, when every stage takes these for a forward, its input gradients and its
        weight gradients; None where it is not known.
        """
        sums = self.idle(num_ranks, num_microbatches, virtual_stages) if self.idle is not None else None
        if sums is None:
            return None
        return max(f * forward + i * inputs + w * weights for f, i, w in sums)

    @property
    def default_virtual_stages(self) -> int:
        """The stages of a rank unless the user says how many."""
        return 2 if self.virtual_stages is None else self.virtual_stages[0]

    def checked_virtual_stages(self, virtual_stages: int | None) -> int:
        """The stages of a rank; the default for None. BadArgument if this schedule cannot have so many."""
        if virtual_stages is None:
            return self.default_virtual_stages
        allowed = self.virtual_stages
        if isinstance(virtual_stages, bool) or not isinstance(virtual_stages, int) or virtual_stages < 1:
            raise BadArgument(f"The number of virtual stages is an integer of at least 1; got {virtual_stages!r}.")
        if virtual_stages < 2 if allowed is None else virtual_stages not in allowed:
            raise BadArgument(
                f"The schedule {self.name!r} cannot have {virtual_stages} virtual stages, stages of one rank.",
                use="2 or more" if allowed is None else " or ".join(map(str, allowed)),
            )
        return virtual_stages

    def stage_ranks(self, num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
        """Per stage the pipeline rank that has it."""
        stages = range(num_ranks * virtual_stages)
        return tuple(self.placement(stage, num_ranks, virtual_stages) for stage in stages)


def naive(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
    """One microbatch at a time, forward through all stages and backward, before the next begins."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)
        yield Backward(microbatch)


def gpipe(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
    """All forwards, then all backwards."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)
    for microbatch in range(num_microbatches):
        yield Backward(microbatch)


def one_forward_one_backward(
    rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1
) -> Iterator[Compute]:
    """Fill the stages below with forwards, then alternate; with fewer microbatches than that, it ends while filling."""
    ahead = min(num_microbatches, num_ranks - 1 - rank)
    for microbatch in range(ahead):
        yield Forward(microbatch)
    for microbatch in range(ahead, num_microbatches):
        yield Forward(microbatch)
        yield Backward(microbatch - ahead)
    for microbatch in range(num_microbatches - ahead, num_microbatches):
        yield Backward(microbatch)


def _pipeline_bubble(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Fraction:
    return Fraction(num_ranks - 1, num_microbatches + num_ranks - 1)


def _pipeline_bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float:
    return (num_ranks - 1) * (forward + inputs + weights)


def _pipeline_idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> tuple[tuple[int, int, int], ...]:
    return ((num_ranks - 1,) * 3,)


def _naive_idle(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> tuple[tuple[int, int, int], ...]:
    return ((num_microbatches * (num_ranks - 1),) * 3,)


def _naive_bubble_seconds(
    num_ranks: int, num_microbatches: int, virtual_stages: int, forward: float, inputs: float, weights: float
) -> float:
    return num_microbatches * (num_ranks - 1) * (forward + inputs + weights)


SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        Schedule(
            name="naive",
            generator=naive,
            description="one microbatch at a time through all stages and back; one stage works at a time",
            max_in_flight=lambda rank, num_ranks, num_microbatches, virtual_stages=1: 1,
            bubble=lambda num_ranks, num_microbatches, virtual_stages=1: Fraction(num_ranks - 1, num_ranks),
            bubble_seconds=_naive_bubble_seconds,
            idle=_naive_idle,
            source="Huang et al. 2019, GPipe, figure 2b: one of K accelerators works at a time",
        ),
        Schedule(
            name="gpipe",
            generator=gpipe,
            description="all forwards, then all backwards; every microbatch's activations are held",
            max_in_flight=lambda rank, num_ranks, num_microbatches, virtual_stages=1: num_microbatches,
            bubble=_pipeline_bubble,
            bubble_seconds=_pipeline_bubble_seconds,
            idle=_pipeline_idle,
            source="Huang et al. 2019, GPipe, section 2.3: (K - 1) / (M + K - 1)",
        ),
        Schedule(
            name="1f1b",
            generator=one_forward_one_backward,
            description="a backward as soon as one can run; holds at most as many microbatches as stages from here on",
            max_in_flight=lambda rank, num_ranks, num_microbatches, virtual_stages=1: min(
                num_microbatches, num_ranks - rank
            ),
            bubble=_pipeline_bubble,
            bubble_seconds=_pipeline_bubble_seconds,
            idle=_pipeline_idle,
            source="Narayanan et al. 2021, Megatron-LM, section 2.2: (p - 1) / m of the ideal time, PipeDream-Flush",
        ),
        Schedule(
            name="interleaved-1f1b",
            generator=interleaved.interleaved_1f1b,
            description="1f1b with several stages a rank, which take turns: a smaller bubble, more transfers",
            max_in_flight=interleaved.in_flight,
            bubble=interleaved.bubble,
            bubble_seconds=interleaved.bubble_seconds,
            idle=interleaved.idle,
            source="Narayanan et al. 2021, Megatron-LM, section 2.2: (p - 1) / (v m) of the ideal time",
            virtual_stages=None,
        ),
        Schedule(
            name="zb-h1",
            generator=zero_bubble.zb_h1,
            description="1f1b whose weight gradients fill two thirds of the bubble; no rank holds more than its first",
            max_in_flight=lambda rank, num_ranks, num_microbatches, virtual_stages=1: min(num_microbatches, num_ranks),
            bubble=zero_bubble.zb_h1_bubble,
            bubble_seconds=zero_bubble.zb_h1_bubble_seconds,
            idle=zero_bubble.zb_h1_idle,
            source="Qi et al. 2023, Zero Bubble Pipeline Parallelism, table 2: (p - 1)(F + B - W), memory p",
            splits_backward=True,
        ),
        Schedule(
            name="zb-h2",
            generator=zero_bubble.zb_h2,
            description="no bubble if forward, input and weight gradients take as long; twice the memory of zb-h1",
            max_in_flight=zero_bubble.zb_h2_in_flight,
            bubble=zero_bubble.zb_h2_bubble,
            bubble_seconds=zero_bubble.zb_h2_bubble_seconds,
            idle=zero_bubble.zb_h2_idle,
            source="Qi et al. 2023, Zero Bubble Pipeline Parallelism, table 2: (p - 1)(F + B - 2W), memory 2p - 1",
            splits_backward=True,
        ),
        Schedule(
            name="zb-v",
            generator=zero_bubble.zb_v,
            description="two stages a rank, down and up again; no bubble if forward, input and weight gradients take as long",
            max_in_flight=zero_bubble.zb_v_in_flight,
            bubble=zero_bubble.zb_v_bubble,
            bubble_seconds=zero_bubble.zb_v_bubble_seconds,
            idle=zero_bubble.zb_v_idle,
            source="Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 6: none for F = B = W, memory 2p half stages",
            virtual_stages=(2,),
            placement=v_shape,
            splits_backward=True,
        ),
        Schedule(
            name="dualpipe-v",
            generator=dualpipe.dualpipe_v,
            description="two stages a rank, down and up again; a forward of one beside a backward of the other",
            max_in_flight=dualpipe.in_flight,
            bubble=dualpipe.bubble,
            bubble_seconds=dualpipe.bubble_seconds,
            idle=dualpipe.idle,
            source="DualPipe (arXiv 2412.19437), its repository's README: (PP / 2 - 1)(F&B + B - 3W), memory PP + 1, PP = 2p",
            virtual_stages=(2,),
            placement=v_shape,
            splits_backward=True,
        ),
    )
}


def forward_only(stage_ranks: Sequence[int] | None = None) -> Schedule:
    """The schedule of evaluation, forwards only, for stages that are placed so; None: in a loop over the ranks.

    Evaluation is no choice of the user's, so this is no row: `par(...)` runs it whatever the training schedule is.
    """

    def generator(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Iterator[Compute]:
        if stage_ranks is None:
            return interleaved.forwards(rank, num_ranks, num_microbatches, virtual_stages)
        return iter(_forwards(tuple(stage_ranks), num_microbatches)[rank])

    def placement(stage: int, num_ranks: int, virtual_stages: int) -> int:
        return loop(stage, num_ranks, virtual_stages) if stage_ranks is None else stage_ranks[stage]

    return Schedule(
        name="forward-only",
        generator=generator,
        description="forwards only, for evaluation",
        max_in_flight=lambda rank, num_ranks, num_microbatches, virtual_stages=1: 1,
        bubble=interleaved.bubble,
        source="the forward half of GPipe",
        trains=False,
        virtual_stages=None,
        placement=placement,
    )


# Generators are per rank, but what is found for all ranks at once: kept for the next rank of the same step.
_forwards = lru_cache(maxsize=8)(evaluation.forwards)

FORWARD_ONLY = forward_only()


def schedule(name: str) -> Schedule:
    """The row of SCHEDULES with this name, or the schedule in the file `name`, a path that ends in .csv or .json.

    BadArgument lists the names if there is none; see `load` for files.
    """
    if not isinstance(name, str):
        raise BadArgument(f"schedule = {name!r}", use="a name, " + " or ".join(f'"{known}"' for known in SCHEDULES))
    if name in SCHEDULES:
        return SCHEDULES[name]
    from passes.schedule_files import ENDINGS, read_schedule

    if name.endswith(ENDINGS):
        return read_schedule(name, name)
    known = " or ".join(f'"{known}"' for known in SCHEDULES)
    raise BadArgument(f"There is no schedule {name!r}.", use=f"{known}, or a .csv or .json file")


def load(path: str | Path, name: str | None = None) -> Schedule:
    """Add the schedule in a file to SCHEDULES, as `name` or else the file's name without its ending.

    The file is a CSV as torch.distributed.pipelining writes it, or JSON (passes/schedule_files.py says which), and holds
    one size: other numbers of ranks, virtual stages or microbatches are refused. BadArgument for a file that cannot be
    read or a name that is taken, with the line and column of what cannot be read; BadSchedule if the schedule is wrong.
    """
    from passes.schedule_files import read_schedule

    row = read_schedule(path, name)
    if row.name in SCHEDULES:
        raise BadArgument(f"There is already a schedule {row.name!r}.", use="another name")
    SCHEDULES[row.name] = row
    return row


def _with_virtual_stages(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A function of `count` arguments, the last of them virtual_stages, from one that may leave that out."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return lambda *arguments: function(*arguments[: count - 1])
    except ValueError:  # a builtin that does not tell
        pass
    return function


def register(
    name: str,
    generator: Generator,
    *,
    description: str = "",
    max_in_flight: Callable[..., int] | None = None,
    bubble: Callable[..., Fraction | None] | None = None,
    source: str = "",
    virtual_stages: int | Sequence[int] | None = 1,
    placement: str | Placement = "loop",
) -> Schedule:
    """Add a schedule of the user's to SCHEDULES, after proving it for 1-8 pipeline ranks and 1-16 microbatches.

    `generator(rank, num_ranks, num_microbatches, virtual_stages)` yields a rank's computes; with one stage a rank it may
    leave out the last argument, and so may `max_in_flight` and `bubble`. `virtual_stages` is the number of stages a rank,
    several where the user of the schedule may choose, None for any from 2 on; `placement` says which, "loop" or "v" or a
    function `(stage, num_ranks, virtual_stages)` to a rank. Schedule tells what the other arguments are: each is held to.
    Without `max_in_flight` the bound is that of gpipe: all microbatches.

    The generator may raise BadArgument for sizes that it does not support. BadSchedule says which size fails and why; the
    table is then unchanged. BadArgument if the name is taken, or if no size is supported.
    """
    if name in SCHEDULES:
        raise BadArgument(f"There is already a schedule {name!r}.", use="another name")
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise BadArgument(f"There is no placement {placement!r}.", use=" or ".join(f'"{one}"' for one in PLACEMENTS))
    held = max_in_flight or (
        lambda rank, num_ranks, num_microbatches, virtual_stages=1: num_microbatches * virtual_stages
    )
    row = Schedule(
        name=name,
        generator=_with_virtual_stages(generator, 4),
        description=description,
        max_in_flight=_with_virtual_stages(held, 4),
        bubble=_with_virtual_stages(bubble, 3) if bubble else None,
        source=source,
        virtual_stages=virtual_stages if virtual_stages is None else _as_tuple(virtual_stages),
        placement=PLACEMENTS[placement] if isinstance(placement, str) else placement,
    )
    refused: BadArgument | None = None
    supported = 0
    split = False
    for num_ranks, num_microbatches, stages in product(range(1, 9), range(1, 17), row.virtual_stages or (2, 3)):
        try:
            split |= _prove_size(row, num_ranks, num_microbatches, stages)
            supported += 1
        except BadArgument as error:
            refused = error
        except BadSchedule as error:
            size = f"{num_ranks * stages} stages and {num_microbatches} microbatches"
            what = f"The schedule {name!r} is wrong for {size}: {error.what}"
            raise BadSchedule(what, where=error.where, why=error.why) from error
    if not supported:
        why = refused.what if refused else None
        raise BadArgument(f"The schedule {name!r} supports no size of 1-8 stages and 1-16 microbatches.", why=why)
    SCHEDULES[name] = row = replace(row, splits_backward=split)
    return row


def _as_tuple(numbers: int | Sequence[int]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else tuple(numbers)


def _prove_size(row: Schedule, num_ranks: int, num_microbatches: int, virtual_stages: int) -> bool:
    """Prove a schedule for one size of a model whose stages form a chain. Whether it splits backwards."""
    # Here and not above: they take their schedules from this table.
    from passes.order import order
    from passes.timeline import simulate

    num_stages = num_ranks * virtual_stages
    edges = [(stage, stage + 1) for stage in range(num_stages - 1)]
    lists = order(row, num_ranks, num_microbatches, edges, virtual_stages=virtual_stages)
    stated = row.bubble(num_ranks, num_microbatches, virtual_stages) if row.bubble else None
    if stated is not None:
        times = simulate(
            lists,
            stage_ranks=row.stage_ranks(num_ranks, virtual_stages),
            forward_seconds=[1.0] * num_stages,
            backward_seconds=[2.0] * num_stages,
        )
        if abs(times.bubble_fraction - stated) > 1e-9:
            raise BadSchedule(
                f"It idles {times.bubble_fraction:.4f} of the step, and its bubble is stated as {float(stated):.4f}.",
                why="in a simulation with equal stages, a backward twice as long as a forward and no transfer time",
            )
    return any(isinstance(one, BackwardInput) for listed in lists for one in listed)

"""SCHEDULES: the order in which a pipeline stage runs its microbatches, one row per schedule.

Design note. A schedule is a generator of Forward and Backward for one stage: `generator(stage, num_stages,
num_microbatches)`. It says nothing of transfers: passes/order.py adds them from the edges of the cut model and proves
the whole. So a new schedule is a few lines, and cannot be wrong in silence: `register` runs the proof over a grid of
sizes before the name exists.

In every schedule the backwards of a stage run in the order of the microbatches. Gradients are then added up in the
order of single-process accumulation, and a pipelined step is equal to that to the last bit.

A row also states what is known of the schedule, and the tests hold it to that: the most microbatches in flight
(forwards whose backward has not run, which is what activation memory is paid for), and the bubble, the idle part of
the step when all stages take the same time and transfers take none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from costmodel.errors import BadArgument, BadSchedule
from passes.instructions import Backward, Compute, Forward

Generator = Callable[[int, int, int], Iterator[Compute]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A row of SCHEDULES.

    `max_in_flight(stage, num_stages, num_microbatches)` bounds the forwards whose backward has not run.
    `bubble(num_stages, num_microbatches)` is the idle fraction of the step for equal stages; None where none is known.
    `trains` is False for a schedule of forwards only.
    """

    name: str
    generator: Generator
    description: str
    max_in_flight: Callable[[int, int, int], int]
    bubble: Callable[[int, int], Fraction] | None = None
    source: str = ""
    trains: bool = True


def naive(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
    """One microbatch at a time, forward through all stages and backward, before the next begins."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)
        yield Backward(microbatch)


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
    """All forwards, then all backwards."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)
    for microbatch in range(num_microbatches):
        yield Backward(microbatch)


def one_forward_one_backward(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
    """Fill the stages below with forwards, then alternate; with fewer microbatches than that, it ends while filling."""
    ahead = min(num_microbatches, num_stages - 1 - stage)
    for microbatch in range(ahead):
        yield Forward(microbatch)
    for microbatch in range(ahead, num_microbatches):
        yield Forward(microbatch)
        yield Backward(microbatch - ahead)
    for microbatch in range(num_microbatches - ahead, num_microbatches):
        yield Backward(microbatch)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
    """Evaluation: the forwards, nothing kept."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)


def _pipeline_bubble(num_stages: int, num_microbatches: int) -> Fraction:
    return Fraction(num_stages - 1, num_microbatches + num_stages - 1)


SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        Schedule(
            name="naive",
            generator=naive,
            description="one microbatch at a time through all stages and back; one stage works at a time",
            max_in_flight=lambda stage, num_stages, num_microbatches: 1,
            bubble=lambda num_stages, num_microbatches: Fraction(num_stages - 1, num_stages),
            source="Huang et al. 2019, GPipe, figure 2b: one of K accelerators works at a time",
        ),
        Schedule(
            name="gpipe",
            generator=gpipe,
            description="all forwards, then all backwards; every microbatch's activations are held",
            max_in_flight=lambda stage, num_stages, num_microbatches: num_microbatches,
            bubble=_pipeline_bubble,
            source="Huang et al. 2019, GPipe, section 2.3: (K - 1) / (M + K - 1)",
        ),
        Schedule(
            name="1f1b",
            generator=one_forward_one_backward,
            description="a backward as soon as one can run; holds at most as many microbatches as stages from here on",
            max_in_flight=lambda stage, num_stages, num_microbatches: min(num_microbatches, num_stages - stage),
            bubble=_pipeline_bubble,
            source="Narayanan et al. 2021, Megatron-LM, section 2.2: (p - 1) / m of the ideal time, PipeDream-Flush",
        ),
    )
}

# Evaluation is no choice of the user's, so this is no row: `par(...)` runs it whatever the training schedule is.
FORWARD_ONLY = Schedule(
    name="forward-only",
    generator=forward_only,
    description="forwards only, for evaluation",
    max_in_flight=lambda stage, num_stages, num_microbatches: 1,
    bubble=_pipeline_bubble,
    source="the forward half of GPipe",
    trains=False,
)


def schedule(name: str) -> Schedule:
    """The row of SCHEDULES with this name. BadArgument lists the names if there is none."""
    if name not in SCHEDULES:
        raise BadArgument(f"There is no schedule {name!r}.", use=" or ".join(f'"{known}"' for known in SCHEDULES))
    return SCHEDULES[name]


def register(
    name: str,
    generator: Generator,
    *,
    description: str = "",
    max_in_flight: Callable[[int, int, int], int] | None = None,
    bubble: Callable[[int, int], Fraction] | None = None,
    source: str = "",
) -> Schedule:
    """Add a schedule of the user's to SCHEDULES, after proving it for 1-8 stages and 1-16 microbatches.

    The generator may raise BadArgument for sizes that it does not support. Without `max_in_flight` the bound is that of
    gpipe: all microbatches. BadSchedule says which size fails and why; the table is then unchanged. BadArgument if the
    name is taken, or if no size is supported.
    """
    # Here and not above: order takes its schedules from this table.
    from passes.order import order

    if name in SCHEDULES:
        raise BadArgument(f"There is already a schedule {name!r}.", use="another name")
    row = Schedule(
        name=name,
        generator=generator,
        description=description,
        max_in_flight=max_in_flight or (lambda stage, num_stages, num_microbatches: num_microbatches),
        bubble=bubble,
        source=source,
    )
    refused: BadArgument | None = None
    supported = 0
    for num_stages in range(1, 9):
        edges = [(stage, stage + 1) for stage in range(num_stages - 1)]
        for num_microbatches in range(1, 17):
            try:
                order(row, num_stages, num_microbatches, edges)
                supported += 1
            except BadArgument as error:
                refused = error
            except BadSchedule as error:
                size = f"{num_stages} stages and {num_microbatches} microbatches"
                what = f"The schedule {name!r} is wrong for {size}: {error.what}"
                raise BadSchedule(what, where=error.where, why=error.why) from error
    if not supported:
        why = refused.what if refused else None
        raise BadArgument(f"The schedule {name!r} supports no size of 1-8 stages and 1-16 microbatches.", why=why)
    SCHEDULES[name] = row
    return row

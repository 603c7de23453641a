"""The space of a search: every layout of so many devices, in an order in which neighbours share what the evaluator has solved.

Left out is only what cannot win: layouts whose parameters, gradients and optimizer state alone, spread as evenly as possible, are more
than the device holds (`state_fits`, a lower bound, so exact); and `gpipe`, which idles as long as `1f1b` and holds at least as much.
Tensor parallelism goes up to TP_NODES nodes: each doubling across nodes only adds traffic.

Context and expert parallelism are further fields of `passes.layout.Layout`; a new axis is a new loop here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from costmodel.errors import BadArgument
from costmodel.hardware import Hardware
from costmodel.memory import state_bytes
from passes.layout import Layout
from passes.layout_evaluator import Facts
from passes.schedules import SCHEDULES

RECOMPUTES = ("none", "selective", "full")  # what programs can be emitted for
ZEROS = (0, 1, 2, 3)
LEFT_OUT = ("gpipe", "naive")  # unless asked for
TP_NODES = 4
VIRTUAL_STAGES = (2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Space:
    """What may be chosen; a tuple of one value is a decision already taken. None: any.

    The batch: `global_batch` rows over all replicas, or `replica_rows` on each.
    """

    gpus: int
    global_batch: int | None = None
    replica_rows: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    microbatches: int | None = None
    schedules: tuple[str, ...] | None = None
    virtual_stages: int | None = None
    recomputes: tuple[str, ...] = RECOMPUTES
    zeros: tuple[int, ...] = ZEROS
    sequence_parallel: tuple[bool, ...] = (False, True)
    precision: str = "fp32"

    def holding(self, name: str, value: Any) -> Space:
        """The space with one decision taken, as far as it has a place for it (rows of a microbatch have none)."""
        lists = {"zero": "zeros", "sequence_parallel": "sequence_parallel", "schedule": "schedules", "recompute": "recomputes"}
        taken: dict[str, Any] = {lists[name]: (value,)} if name in lists else {name: value}
        return self if name == "microbatch_rows" else replace(self, **taken)

    def degrees(self, facts: Facts, devices_per_node: int) -> list[tuple[int, int, int]]:
        """Every (tp, pp, dp) whose product is the number of devices."""
        found = []
        for tp in divisors(self.gpus):
            if (self.tp is None and tp > TP_NODES * devices_per_node) or self.tp not in (None, tp):
                continue
            for pp in divisors(self.gpus // tp):
                dp = self.gpus // tp // pp
                if self.pp in (None, pp) and self.dp in (None, dp) and pp <= max(facts.num_blocks, 1):
                    found.append((tp, pp, dp))
        return found

    def rows_of(self, dp: int) -> int | None:
        """Rows of one replica's batch; None where the batch does not divide."""
        if self.global_batch is None:
            return self.replica_rows or 1
        return self.global_batch // dp if self.global_batch % dp == 0 else None

    def microbatches_of(self, rows: int) -> list[tuple[int, int]]:
        """(rows of a microbatch, microbatches)."""
        if self.microbatches is not None:
            return [(rows // self.microbatches, self.microbatches)] if rows % self.microbatches == 0 else []
        return [(each, rows // each) for each in divisors(rows)]

    def schedules_of(self, pp: int, microbatches: int, facts: Facts) -> list[tuple[str, int]]:
        """(schedule, stages a rank) for a pipeline."""
        if pp == 1:
            return [(self.schedules[0] if self.schedules and len(self.schedules) == 1 else "1f1b", 1)]
        names = self.schedules or tuple(
            name for name, row in SCHEDULES.items() if row.trains and name not in LEFT_OUT
        )
        found = []
        for name in names:
            row = SCHEDULES[name]
            choices: Sequence[int] = VIRTUAL_STAGES if row.virtual_stages is None else row.virtual_stages
            for virtual in choices:
                if self.virtual_stages not in (None, virtual) or pp * virtual > facts.num_blocks:
                    continue
                if row.virtual_stages is None and (microbatches % pp or (virtual > 2 and facts.num_layers % (pp * virtual))):
                    continue
                if row.splits_backward and microbatches < 2 * pp:  # their sources give orders for steady states only
                    continue
                found.append((name, virtual))
        return found

    def layouts(self, facts: Facts, hardware: Hardware) -> Iterator[list[Layout]]:
        """The layouts, those with the same sharding, microbatch and recompute together."""
        for tp, pp, dp in self.degrees(facts, hardware.devices_per_node):
            rows = self.rows_of(dp)
            if rows is None:
                continue
            zeros = [z for z in (self.zeros if dp > 1 else (min(self.zeros),)) if self._state_fits(facts, hardware, tp, pp, dp, z)]
            sequences = [s for s in self.sequence_parallel if (tp > 1 and facts.sequence_splits) or not s]
            for sequence in sequences or [False]:
                for each, count in self.microbatches_of(rows):
                    for recompute in self.recomputes:
                        yield [
                            Layout(
                                tp=tp, pp=pp, dp=dp, virtual_stages=virtual, schedule=name, microbatch_rows=each, microbatches=count,
                                zero=zero, recompute=recompute, sequence_parallel=sequence, precision=self.precision,
                            )
                            for name, virtual in self.schedules_of(pp, count, facts)
                            for zero in zeros
                        ]  # fmt: skip

    def _state_fits(self, facts: Facts, hardware: Hardware, tp: int, pp: int, dp: int, zero: int) -> bool:
        """Whether an even share of the state is within the device: no rank of a layout can hold less."""
        least = state_bytes(facts.parameters // (tp * pp), precision=self.precision, zero=zero, dp_size=dp)
        return least.parameters + least.gradients + least.master + least.optimizer <= hardware.memory_bytes

    def check(self, facts: Facts, hardware: Hardware) -> None:
        """BadArgument where no layout has these degrees, or none divides the batch."""
        degrees = self.degrees(facts, hardware.devices_per_node)
        fixed = ", ".join(f"{n} = {v}" for n, v in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if v is not None)
        if not degrees:
            raise BadArgument(
                f"no degrees multiply to {self.gpus} GPUs" + (f" with {fixed}" if fixed else ""),
                why=f"the model has {facts.num_blocks} blocks to cut between, which bounds pp" if not fixed else "",
                use="degrees that divide the number of GPUs, or another number of them",
            )
        replicas = sorted({dp for _, _, dp in degrees})
        rows = {dp: self.rows_of(dp) for dp in replicas}
        if all(n is None for n in rows.values()):
            batch, least = self.global_batch or 0, replicas[0]
            below, above = batch // least * least, (batch // least + 1) * least
            raise BadArgument(
                f"no layout of {self.gpus} GPUs{f' with {fixed}' if fixed else ''} divides a global batch of {batch}",
                why=f"it is dealt out to dp replicas, and dp can be {', '.join(map(str, replicas[:12]))} here",
                use=f"a global batch of {f'{below} or ' if below else ''}{above}, or another number of GPUs",
            )
        if self.microbatches is not None and not any(n is not None and self.microbatches_of(n) for n in rows.values()):
            raise BadArgument(
                f"{self.microbatches} microbatches divide no replica's batch",
                why=f"replicas have {', '.join(str(n) for n in rows.values() if n is not None)} rows", use="a divisor of the rows",
            )  # fmt: skip


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, sorted."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})

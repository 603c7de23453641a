"""What data parallelism allocates on a stage: the runtime's own sums over replicas and shards of ZeRO, run without values.

Design note. The same classes as on a rank (`runtime/replicas.py`, `runtime/parameter_shards.py`, `runtime/gathered.py`) over an axis that
moves nothing, while `measure_memory` counts storages. Only the last microbatch of a step differs from the others. Which parameters are
gathered ahead is known from the step before: a step is run twice.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from autopar.runtime.gathered import GatheredParameters
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.replicas import ReplicaSums
from costmodel.memory import Reducing
from costmodel.mesh import REPLICA_AXIS

if TYPE_CHECKING:
    from autopar.measure_memory import StorageCount, _Run


class ReplicasOfStage:
    """The sums and shards of one stage.

    `run`: how `measure_memory` runs it; its forward is made to gather parameters if the plan's ZeRO stage is 3.
    """

    def __init__(self, run: _Run) -> None:
        self.run, plan, stage, fake = run, run.plan, run.stage, run.fake
        axis = getattr(fake.stage, REPLICA_AXIS)
        held = {name: fake.stage.p(name) for name in stage.parameters}
        late = {*stage.partial_gradients, *(name for name, stages in stage.tied.items() if len(stages) > 1)}
        self.shards: ParameterShards | None = None
        self.gathered: GatheredParameters | None = None
        with fake.mode:
            if plan.zero:
                self.shards = ParameterShards(held, [stage.parameters], plan.mesh, 0, plan.zero)  # type: ignore[arg-type]
            if self.shards is not None and self.shards.gathers:
                self.gathered = GatheredParameters(axis, self.shards, fake.stage.p)
                fake.stage.p = self.gathered
                run.around_forward, run.gathered_bytes = self.gathered.saving, self.gathered.held_bytes
            self.sums = ReplicaSums(
                axis, {stage.index: [name for name in stage.parameters if name in fake.parameters and name not in late]},
                sorted(late.intersection(fake.parameters)), HeldGradients(fake.parameters, self.shards),
            )  # fmt: skip
        self.known = list(self.shards.of.values()) if self.shards is not None else []

    @property
    def runs(self) -> int:
        """How often a step is run until one is like all that follow."""
        return 1 if self.gathered is None else 2

    def after_step(self) -> None:
        """Gathered parameters are let go of."""
        if self.gathered is not None:
            self.gathered.clear()

    def last_microbatch(self, count: StorageCount, change_bytes: int, gathered_bytes: int) -> Reducing:
        """The backward of the last microbatch of a step, and the end of the step. `change_bytes`: of a backward without the sums;
        `gathered_bytes`: of whole parameters that count as being there all the time.
        """
        run, stage = self.run, self.run.stage
        for parameter in run.fake.parameters.values():
            parameter.grad = None
        self.sums.begin()
        if run.plan.microbatches > 1:
            run.microbatch(count, False)
        before: list[int] = []
        casts = weakref.proxy(run.fake.stage.casts)
        cast_bytes = count.bytes_of(casts.of.values())

        def begins() -> None:
            before.append(run.begin(count))
            self.sums.watch(())
            casts.ending = True

        run.microbatch(count, False, begins)
        self.sums.unwatch()
        self.sums.complete(stage.index)
        run.fake.stage.drop_casts()
        peak = count.bytes_peak - before[0] - gathered_bytes
        change = count.bytes_now + cast_bytes - run.gathered_bytes() - before[0] - change_bytes
        start = count.restart()
        self.sums.finish()
        return Reducing(peak, change, count.bytes_peak - start, count.bytes_now - start)

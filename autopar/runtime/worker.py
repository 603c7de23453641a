"""The worker: executes one rank's schedule, a map from instruction to method.

Design note. When it is made, the instruction list becomes a list of (what the board shows, method, argument): everything a table can
hold is looked up once. The stages of the rank are chunks (`chunk.py`), what goes to other ranks and comes from them are runs of transfers
(`transfers.py`).

Equal to single-process accumulation to the last bit, for pipelines without tensor parallelism, because
- a value that several later stages use gets its gradients summed from the last stage to the first, as autograd does;
- a tied weight's gradient is kept per microbatch and summed over its stages (last first) and then over microbatches, as one process
  does that runs microbatch after microbatch (`gradients.py`; `TIED_EXACT` False keeps one gradient and sends less);
- weight gradients that are put off are the same products, added in the same order (`autopar/deferred.py`).
One case is left: a weight or skipping value that several stages use, one of them more than once. A stage adds up its own uses before
they meet the others', where one process adds one use after the other: equal but for the last bits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autopar.program import Program
from autopar.runtime.axis import Axis, TransferFailed
from autopar.runtime.batch import BatchTypes, Layout
from autopar.runtime.board import padded
from autopar.runtime.chunk import Chunk
from autopar.runtime.compiled import Compile, compile_stage
from autopar.runtime.gradients import GradientSums
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.outputs import join, share_loss
from autopar.runtime.record import RankRecord, meet, recorded_step
from autopar.runtime.replicas import mean_over
from autopar.runtime.scaling import LossScale
from autopar.runtime.transfers import TRANSFERS, Line, Transfers
from autopar.runtime.world import World
from costmodel.errors import BadPlan, RankFailed
from costmodel.mesh import REPLICA_AXIS
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    RecvActivation,
    SendActivation,
    SumGradients,
)

_RING_SLACK = 3


class Interrupted(Exception):
    """The step was told to end: another rank of this process failed or the user pressed Ctrl-C."""


_Action = tuple[bytes, Callable[[Any], None], Any]


class Worker:
    """One rank of a job.

    `parameters` and `buffers` are this rank's local tensors under the user's names. `step` leaves gradients in
    `.grad`, added to what was there. `microbatches` is checked against the schedule. `seed` starts the stages' random
    generators. `compile`: torch.compile for the stages' forwards (see `compiled.py`). `record`: while it is a list, a
    step adds what it did: (instruction, start, end) in seconds of time.perf_counter. `loss_scale`: gradients are of the
    loss times its value; to divide them is for whoever holds the parameters (see `scaling.py`).

    With data parallelism the batch of `step` is this replica's, the loss and the gradients are of all replicas' together;
    buffers that forward updates are averaged over them. `forward` is of this replica's batch alone, unless
    `joins_replicas`: then losses in its outputs are parts of the loss of all replicas' batches. `held`: the gradients of
    `parameters`, or of this replica's parts of them, which an optimizer then updates; shared by all workers on the same parameters. None:
    there is no other worker, and there are no parts.
    """

    def __init__(
        self,
        program: Program,
        world: World,
        parameters: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        *,
        microbatches: int | None = None,
        seed: int = 0,
        compile: Compile = False,
        joins_replicas: bool = False,
        held: HeldGradients | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        if dict(program.mesh) != world.mesh or dict(program.coords) != world.coords:
            raise BadPlan(
                f"The program is for {dict(program.coords)} of {dict(program.mesh)}, this is {world} of {world.mesh}."
            )
        self.num_microbatches = program.num_microbatches
        if microbatches is not None and microbatches != self.num_microbatches:
            raise BadPlan(f"The schedule has {self.num_microbatches} microbatches, not {microbatches}.")
        self.program, self.world = program, world
        self._replicas, self._joins_replicas = world.axis(REPLICA_AXIS), joins_replicas
        self._loss_scale = loss_scale
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        self.record: list[tuple[str, float, float]] | None = None
        self._batch_types = BatchTypes(program.batch, self.num_microbatches, tuple(world.mesh))
        stages = dict(zip(program.stage_numbers, program.stages, strict=True))
        held = held or HeldGradients(self.parameters, None)
        self._shards, self._compiled = held.shards, bool(compile)
        self._sums = GradientSums(
            world, stages, program.stage_ranks, held, self.num_microbatches
        )
        if self._sums and not any(isinstance(instruction, SumGradients) for instruction in program.schedule):
            raise BadPlan("Gradients have to be summed over ranks, but the schedule has no SumGradients().")
        updated = {name for cls in stages.values() for name in cls.UPDATED_BUFFERS}
        self._updated = [self.buffers[name] for name in sorted(updated)] if self._replicas.size > 1 else []
        tensors = {**self.parameters, **self.buffers}
        self._chunks = [
            Chunk(
                program, world, number, cls, tensors, self._sums, self._batch_types,
                seed=seed, depth=self.num_microbatches + _RING_SLACK, shards=self._shards, compiled=self._compiled,
            )
            for number, cls in stages.items()
        ]  # fmt: skip
        by_number = {chunk.number: chunk for chunk in self._chunks}
        for chunk in self._chunks:
            chunk.connect(by_number)
            if compile:
                compile_stage(chunk.stage, compile)
        self._loss_chunk = by_number.get(program.loss_stage)
        self._loss_rank = program.stage_ranks[program.loss_stage]
        self._loss_dtype: torch.dtype | None = None
        self._transfers = Transfers(world, self._chunks, program.stage_ranks)
        self._training = self._compile(program.schedule)
        evaluation = program.evaluation if program.evaluation is not None else self._forward_schedule()
        self._evaluation = self._compile(evaluation)

    # ---- what can be looked up once --------------------------------------------------------------------------------

    def _forward_schedule(self) -> list[Instruction]:
        """One stage a rank: microbatch after microbatch."""
        (chunk,) = self._chunks
        sources = sorted({value.source for value in chunk.receives})
        targets = sorted({stage for value in chunk.sends for stage in value.to})
        listed: list[Instruction] = []
        for microbatch in range(self.num_microbatches):
            listed += [RecvActivation(microbatch, source=source) for source in sources]
            listed += [Forward(microbatch)]
            listed += [SendActivation(microbatch, to=stage) for stage in targets]
        return listed

    def _compile(self, schedule: Sequence[Instruction]) -> tuple[Line, list[_Action]]:
        """The transfers of a schedule, and what is to be done one after the other."""
        trains = any(isinstance(instruction, (Backward, BackwardInput)) for instruction in schedule)
        methods: dict[type, Callable[[Chunk], Callable[[int], None]]] = {
            Forward: lambda chunk: chunk.forward if trains else chunk.forward_only,
            Backward: lambda chunk: chunk.backward,
            BackwardInput: lambda chunk: chunk.backward_input,
            BackwardWeight: lambda chunk: chunk.backward_weight,
        }
        line = self._transfers.compile(schedule)
        last: dict[tuple[int, bool], int] = {}  # of each chunk, the last backward and the last that adds what was put off
        for index, instruction in enumerate(schedule):
            if isinstance(instruction, (Backward, BackwardInput, BackwardWeight)):
                last[instruction.chunk, isinstance(instruction, BackwardWeight)] = index
        actions: list[_Action] = []
        for index, instruction in enumerate(schedule):
            text = padded(repr(instruction))
            actions += [(each.text, self._transfers.receive, each) for each in line.waits.get(index, ())]
            if index in line.runs:
                actions.append((line.runs[index].text, self._transfers.run, line.runs[index]))
            elif isinstance(instruction, SumGradients):
                actions.append((text, self._sum_gradients, None))
            elif type(instruction) in methods:
                if instruction.chunk >= len(self._chunks):
                    raise BadPlan(f"{instruction!r}: this rank has {len(self._chunks)} stages.")
                chunk = self._chunks[instruction.chunk]
                method = methods[type(instruction)](chunk)
                if self._sums.replicas is not None and index in last.values():
                    end = max(last.get((instruction.chunk, half), -1) for half in (False, True))
                    method = chunk.last(method, complete=index == end)
                actions.append((text, method, instruction.microbatch))
            elif not isinstance(instruction, TRANSFERS):
                raise BadPlan(f"This runtime has no instruction {instruction!r}.")
        return line, actions

    # ---- a step ---------------------------------------------------------------------------------------------------

    def check(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        """The microbatches' sizes; BadArgument if the batch does not fit the program."""
        return self._batch_types.layout(batch)

    @property
    def reductions(self) -> Counter[str]:
        """How often the last step summed each parameter's gradient over the replicas."""
        return self._sums.replicas.reductions if self._sums.replicas is not None else Counter()

    def train(self, mode: bool = True) -> None:
        """Whether dropout and the like are on."""
        for chunk in self._chunks:
            chunk.stage.training = mode

    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool = False) -> torch.Tensor:
        """Forward and backward of the whole batch. The loss of the whole batch, the same on every rank.

        `accumulate`: more steps follow before the optimizer's; see `held_gradients.py`.

        BadArgument for a batch that does not fit; RankFailed if another rank died, raised or stalled.
        """
        layout = self._begin(batch)
        return self._guarded(lambda: self._step(batch, layout, accumulate))

    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, RankRecord]:
        """`step` right after all ranks have met, with the times of what this one did."""
        self._begin(batch)
        self._guarded(lambda: meet(self.world))
        return recorded_step(self, batch)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward only, without gradients: the outputs of this rank's stages (its pieces) for the whole batch."""
        layout = self._begin(batch)
        return self._guarded(lambda: self._evaluate(batch, layout))

    def _begin(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        if self.world.closed:
            raise RankFailed("This job has ended or failed earlier; no step can be run.", where=str(self.world))
        return self.check(batch)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except TransferFailed as error:
            suspects, reason = error.suspects, str(error)
        except BaseException as error:
            self._abandon()
            self.world.failed(error)
            raise
        # outside of the handler, so that no traceback keeps the connections open
        self._abandon()
        raise self.world.lost(suspects, reason)

    def _abandon(self) -> None:
        self._drop()
        self._sums.abandon()
        if self._shards is not None:
            self._shards.forget()

    def _drop(self) -> None:
        """Forget everything of this step."""
        self._transfers.drop()
        for chunk in self._chunks:
            chunk.drop()

    def _step(self, batch: Mapping[str, torch.Tensor], layout: Layout, accumulate: bool) -> torch.Tensor:
        self._prepare(batch, layout, self._replicas)
        if self._loss_scale is not None and self._loss_chunk is not None:
            self._loss_chunk.loss_scale = self._loss_scale.value
        self._sums.begin(accumulate)
        with torch.enable_grad():
            self._execute(*self._training)
        return self._whole_loss()

    def _evaluate(self, batch: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self._prepare(batch, layout, self._replicas if self._joins_replicas else None)
            self._execute(*self._evaluation)
            outputs = {
                name: join(name, chunk.stage.OUTPUTS[name], [each[place] for each in chunk.collected], self.world.mesh)
                for chunk in self._chunks
                for place, name in enumerate(chunk.outputs)
            }
        self._drop()
        return outputs

    def refresh(self) -> None:
        """Bring whole parameters up to date with all replicas' shards. All replicas take part."""
        if self._shards is not None:
            self._shards.expect(self._replicas)
            self._shards.refresh()

    def _prepare(self, batch: Mapping[str, torch.Tensor], layout: Layout, replicas: Axis | None) -> None:
        if self._shards is not None:
            self._shards.expect(self._replicas)
            if self._compiled:
                self._shards.refresh()
        for chunk in self._chunks:
            chunk.begin(batch, layout, replicas)

    def _execute(self, line: Line, actions: list[_Action]) -> None:
        board, record = self.world.board, self.record
        show = board.show
        self._transfers.start(line)
        for text, method, argument in actions:
            show(text)
            if board.stop:
                raise Interrupted(board.showing())
            if record is None:
                method(argument)
            else:
                start = time.perf_counter()
                method(argument)
                record.append((text.rstrip(b"\0").decode(), start, time.perf_counter()))
        self._transfers.finish_sends()
        if self._shards is not None:
            self._shards.refresh()
        self.world.rest()

    def _sum_gradients(self, _: None) -> None:
        self._transfers.finish_sends()
        self._sums.finish()
        if self._updated:
            with torch.no_grad():
                mean_over(self._replicas, self._updated)

    def _whole_loss(self) -> torch.Tensor:
        """The sum of the microbatches' and replicas' shares, from the rank that has the loss to all: its value and its dtype."""
        losses = self._loss_chunk.step_losses if self._loss_chunk is not None else []
        self._drop()
        loss, self._loss_dtype = share_loss(losses, self._loss_dtype, self._loss_rank, self.world)
        return loss

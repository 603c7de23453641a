"""The worker: executes one rank's schedule, a map from instruction to method.

Design note. When it is made, the instruction list becomes a list of (what the board shows, method, record):
everything a table can hold is looked up once. Adjacent transfers become one run: all its receives and sends are
posted, then its receives are waited for. Unbuffered transfers one by one would deadlock 1F1B. Sends are waited for
when the next run begins, and at the end of the step.

What a microbatch needs between its instructions is one `_Flight`: received activations and gradients, outputs that
are still to be sent, and the graph's edges (not the output tensors: those are freed when sent unless the graph itself
keeps them).

Equal to single-process accumulation to the last bit, for pipelines without tensor parallelism, because
- a value that several later stages use gets its gradients summed from the last stage to the first, as autograd does;
- a tied weight's gradient is kept per microbatch and, at the end of the step, summed over its stages (last first) and
  then over microbatches, as one process does that runs microbatch after microbatch (`TIED_EXACT`; False keeps one
  gradient and sends less).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopar.program import Program, Receive, Send, StageModule
from autopar.runtime.axis import TransferFailed
from autopar.runtime.batch import Arguments, BatchTypes, Layout
from autopar.runtime.board import padded
from autopar.runtime.buffers import Rings, RingTable
from autopar.runtime.gradients import GradientSums
from autopar.runtime.world import PIPELINE_AXIS, World
from costmodel.errors import BadArgument, BadPlan, RankFailed
from passes.instructions import (
    Backward,
    Forward,
    Instruction,
    RecvActivation,
    RecvGradient,
    SendActivation,
    SendGradient,
    SumGradients,
)
from passes.ir import size_symbol
from passes.placement import parse_type

LOSS = "loss"
_TENSORS_PER_TRANSFER = 256  # room in a tag
_RECVS = (RecvActivation, RecvGradient)
_TRANSFERS = (RecvActivation, RecvGradient, SendActivation, SendGradient)
_RING_SLACK = 2


class Interrupted(Exception):
    """The step was told to end: another rank of this process failed or the user pressed Ctrl-C."""


class _Flight:
    """One microbatch between its first and its last instruction."""

    __slots__ = ("arguments", "gradients", "input_gradients", "losses", "outputs", "roots")

    def __init__(self, num_receives: int) -> None:
        self.arguments: list[torch.Tensor | None] = [None] * num_receives
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.roots: list[tuple[int, GradientEdge]] = []
        self.losses: list[tuple[GradientEdge, torch.Tensor]] = []
        self.gradients: dict[int, list[torch.Tensor]] = {}
        self.input_gradients: list[torch.Tensor | None] = []


@dataclass(frozen=True)
class _Transfer:
    """A transfer instruction on this rank. `values` are places in RECEIVES or SENDS, in the order they are sent."""

    text: bytes
    microbatch: int
    stage: int
    gradient: bool
    values: tuple[int, ...]
    tag: int
    last: bool  # the last of its kind for its microbatch: what it sends may be dropped


@dataclass
class _Run:
    """Adjacent transfers."""

    recvs: list[_Transfer] = field(default_factory=list)
    sends: list[_Transfer] = field(default_factory=list)


_Action = tuple[bytes, Callable[[Any], None], Any]


class Worker:
    """One rank of a job.

    `parameters` and `buffers` are this rank's local tensors under the user's names. `step` leaves gradients in
    `.grad`, added to what was there. `microbatches` is checked against the schedule. `seed` starts the stage's random
    generators.
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
    ) -> None:
        if dict(program.mesh) != world.mesh or dict(program.coords) != world.coords:
            raise BadPlan(
                f"The program is for {dict(program.coords)} of {dict(program.mesh)}, this is {world} of {world.mesh}."
            )
        if len(program.stages) != 1:
            raise BadPlan(f"{program.filename} has {len(program.stages)} stages; one per rank can be run.")
        self.num_microbatches = program.num_microbatches
        if microbatches is not None and microbatches != self.num_microbatches:
            raise BadPlan(f"The schedule has {self.num_microbatches} microbatches, not {microbatches}.")
        self.program, self.world = program, world
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        axes = {name: world.axis(name) for name in world.mesh}
        tensors = {**self.parameters, **self.buffers}
        self.stage: StageModule = program.stage(tensors, axes, world.coords, device=world.device, seed=seed)
        self._batch_types = BatchTypes(program.batch, self.num_microbatches, tuple(world.mesh))
        self._receives: list[Receive] = list(self.stage.RECEIVES.values())
        self._sends: list[Send] = list(self.stage.SENDS.values())
        self._outputs = list(self.stage.OUTPUTS)
        self._num_sends = len(self._sends)
        self._loss = self._num_sends + self._outputs.index(LOSS) if LOSS in self._outputs else -1
        self._arguments = Arguments(program, self.stage, self._batch_types, world.device)
        self._receives_gradient = [value.gradient and _is_float(value.type, world) for value in self._receives]
        self._sends_gradient = [value.gradient and _is_float(value.type, world) for value in self._sends]
        self._gradient_places = self._places_of_gradients()
        self._ring_table = RingTable(
            [value.type for value in self._receives], [value.type for value in self._sends], world.mesh, world.device,
            depth=self.num_microbatches + _RING_SLACK,
        )  # fmt: skip
        self._pending: list[tuple[Any, torch.Tensor, _Transfer]] = []
        self._posted: list[tuple[Any, _Transfer]] = []
        self._flights: list[_Flight | None] = [None] * self.num_microbatches
        self._step_losses: list[torch.Tensor] = []
        self._collected: list[tuple[torch.Tensor, ...]] = []
        self._keywords: list[dict[str, Any]] = []
        self._rings: Rings | None = None
        self._sums = GradientSums(world, self.stage, self.parameters, self.num_microbatches)
        if self._sums and not any(isinstance(instruction, SumGradients) for instruction in program.schedule):
            raise BadPlan("Gradients have to be summed over ranks, but the schedule has no SumGradients().")
        self._actions = self._compile(program.schedule)
        self._forward_actions = self._compile(self._forward_schedule())

    # ---- what can be looked up once --------------------------------------------------------------------------------

    def _places_of_gradients(self) -> list[list[tuple[int, int]]]:
        """Per value of SENDS: the stages that send a gradient for it, last first, and its place in what they send."""
        targets = sorted({stage for value in self._sends for stage in value.to}, reverse=True)
        places: list[list[tuple[int, int]]] = [[] for _ in self._sends]
        for stage in targets:
            with_gradient = [i for i, value in enumerate(self._sends) if stage in value.to and self._sends_gradient[i]]
            for place, index in enumerate(with_gradient):
                places[index].append((stage, place))
        return places

    def _forward_schedule(self) -> list[Instruction]:
        sources = sorted({value.source for value in self._receives})
        targets = sorted({stage for value in self._sends for stage in value.to})
        listed: list[Instruction] = []
        for microbatch in range(self.num_microbatches):
            listed += [RecvActivation(microbatch, source=source) for source in sources]
            listed += [Forward(microbatch)]
            listed += [SendActivation(microbatch, to=stage) for stage in targets]
        return listed

    def _compile(self, schedule: Sequence[Instruction]) -> list[_Action]:
        methods: dict[type, Callable[[Any], None]] = {
            Forward: self._forward, Backward: self._backward, SumGradients: self._sum_gradients,
        }  # fmt: skip
        trains = any(isinstance(instruction, Backward) for instruction in schedule)
        methods[Forward] = self._forward if trains else self._forward_only
        last: dict[tuple[type, int], int] = {
            (type(instruction), instruction.microbatch): index
            for index, instruction in enumerate(schedule)
            if isinstance(instruction, (SendActivation, SendGradient))
        }
        actions: list[_Action] = []
        run: _Run | None = None
        for index, instruction in enumerate(schedule):
            text = padded(repr(instruction))
            if not isinstance(instruction, _TRANSFERS):
                run = None
                record = None if isinstance(instruction, SumGradients) else instruction.microbatch
                if type(instruction) not in methods:
                    raise BadPlan(f"This runtime has no instruction {instruction!r}.")
                actions.append((text, methods[type(instruction)], record))
                continue
            transfer = self._transfer_of(
                instruction, text, last.get((type(instruction), instruction.microbatch)) == index
            )
            if run is None:
                run = _Run()
                actions.append((text, self._transfer, run))
            (run.recvs if isinstance(instruction, _RECVS) else run.sends).append(transfer)
        return actions

    def _transfer_of(self, instruction: Any, text: bytes, last: bool) -> _Transfer:
        gradient = isinstance(instruction, (RecvGradient, SendGradient))
        stage = instruction.source if isinstance(instruction, _RECVS) else instruction.to
        if isinstance(instruction, (RecvActivation, SendGradient)):
            values = [index for index, value in enumerate(self._receives) if value.source == stage]
            values = [index for index in values if self._receives_gradient[index] or not gradient]
        else:
            values = [index for index, value in enumerate(self._sends) if stage in value.to]
            values = [index for index in values if self._sends_gradient[index] or not gradient]
        if len(values) >= _TENSORS_PER_TRANSFER:
            raise BadPlan(
                f"{instruction!r} would move {len(values)} tensors; at most {_TENSORS_PER_TRANSFER - 1} can be."
            )
        tag = (instruction.microbatch * 2 + gradient) * _TENSORS_PER_TRANSFER
        return _Transfer(text, instruction.microbatch, stage, gradient, tuple(values), tag, last)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def check(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        """The microbatches' sizes; BadArgument if the batch does not fit the program."""
        return self._batch_types.layout(batch)

    def train(self, mode: bool = True) -> None:
        """Whether dropout and the like are on."""
        self.stage.training = mode

    def step(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Forward and backward of the whole batch. The loss of the whole batch, the same on every rank.

        BadArgument for a batch that does not fit; RankFailed if another rank died, raised or stalled.
        """
        layout = self._begin(batch)
        return self._guarded(lambda: self._step(batch, layout))

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward only, without gradients: this stage's outputs (this rank's pieces) for the whole batch."""
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

    def _drop(self) -> None:
        """Forget everything of this step."""
        self._pending.clear()
        self._posted.clear()
        self._flights = [None] * self.num_microbatches
        self._step_losses, self._collected, self._keywords, self._rings = [], [], [], None

    def _step(self, batch: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        self._prepare(batch, layout)
        self._sums.begin()
        with torch.enable_grad():
            self._execute(self._actions)
        return self._whole_loss()

    def _evaluate(self, batch: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self._prepare(batch, layout)
            self._execute(self._forward_actions)
            outputs = {name: self._join(name, place) for place, name in enumerate(self._outputs)}
        self._drop()
        return outputs

    def _prepare(self, batch: Mapping[str, torch.Tensor], layout: Layout) -> None:
        self._rings = self._ring_table.of(layout.sizes)
        self._keywords = self._arguments.of(batch, layout)
        self._step_losses, self._collected = [], []

    def _execute(self, actions: list[_Action]) -> None:
        board = self.world.board
        show = board.show
        for text, method, record in actions:
            show(text)
            if board.stop:
                raise Interrupted(board.showing())
            method(record)
        self._finish_sends()
        self.world.rest()

    # ---- the instructions ----------------------------------------------------------------------------------------

    def _flight(self, microbatch: int) -> _Flight:
        flight = self._flights[microbatch]
        if flight is None:
            flight = self._flights[microbatch] = _Flight(len(self._receives))
        return flight

    def _run_stage(self, flight: _Flight, microbatch: int) -> tuple[torch.Tensor, ...]:
        keywords, self._keywords[microbatch] = self._keywords[microbatch], {}
        outputs = self.stage.forward(*flight.arguments, **keywords)
        if isinstance(outputs, tuple):
            return outputs
        return () if outputs is None else (outputs,)

    def _forward(self, microbatch: int) -> None:
        flight = self._flight(microbatch)
        for index, argument in enumerate(flight.arguments):
            if self._receives_gradient[index]:
                assert argument is not None
                argument.requires_grad_()
        outputs = self._run_stage(flight, microbatch)
        for index in range(self._num_sends):
            if self._sends_gradient[index] and outputs[index].requires_grad:
                flight.roots.append((index, get_gradient_edge(outputs[index])))
        if self._loss >= 0:
            loss = outputs[self._loss]
            self._step_losses.append(loss.detach())
            if loss.requires_grad:
                flight.losses.append((get_gradient_edge(loss), torch.ones_like(loss)))
        flight.outputs = outputs[: self._num_sends]

    def _forward_only(self, microbatch: int) -> None:
        flight = self._flight(microbatch)
        outputs = self._run_stage(flight, microbatch)
        flight.outputs = outputs[: self._num_sends]
        flight.arguments = []
        self._collected.append(outputs[self._num_sends :])

    def _backward(self, microbatch: int) -> None:
        flight = self._flight(microbatch)
        roots, flight.roots = flight.roots, []
        losses, flight.losses = flight.losses, []
        received, flight.gradients = flight.gradients, {}
        edges, gradients = [edge for edge, _ in losses], [one for _, one in losses]
        for index, edge in roots:
            gradient = self._gradient_of(index, received)
            if gradient is not None:
                edges.append(edge)
                gradients.append(gradient)
        del received, roots, losses
        if edges:
            torch.autograd.backward(edges, gradients)
        del edges, gradients
        self._sums.after_backward(microbatch)
        arguments, flight.arguments = flight.arguments, []
        for wanted, argument in zip(self._receives_gradient, arguments, strict=True):
            assert argument is not None
            unused = wanted and argument.grad is None
            flight.input_gradients.append(torch.zeros_like(argument) if unused else argument.grad)

    def _gradient_of(self, index: int, received: dict[int, list[torch.Tensor]]) -> torch.Tensor | None:
        """The gradient of one of SENDS: the sum over the stages it went to, from the last to the first."""
        total: torch.Tensor | None = None
        for stage, place in self._gradient_places[index]:
            if stage in received:
                gradient = received[stage][place]
                total = gradient if total is None else total + gradient
        return total

    def _transfer(self, run: _Run) -> None:
        world, rings, posted = self.world, self._rings, self._posted
        assert rings is not None
        if self._pending:
            self._finish_sends()
        for transfer in run.recvs:
            flight, microbatch, tag = self._flight(transfer.microbatch), transfer.microbatch, transfer.tag
            from_rings = rings.gradients[microbatch] if transfer.gradient else rings.received[microbatch]
            tensors = [from_rings[index].take() for index in transfer.values]
            for offset, tensor in enumerate(tensors):
                posted.append((world.recv(tensor, transfer.stage, tag + offset), transfer))
            if transfer.gradient:
                flight.gradients[transfer.stage] = tensors
            else:
                for index, tensor in zip(transfer.values, tensors, strict=True):
                    flight.arguments[index] = tensor
        for transfer in run.sends:
            flight = self._flight(transfer.microbatch)
            source = flight.input_gradients if transfer.gradient else flight.outputs
            for offset, index in enumerate(transfer.values):
                tensor = source[index].detach().contiguous()  # type: ignore[union-attr]
                self._pending.append((world.send(tensor, transfer.stage, transfer.tag + offset), tensor, transfer))
            if transfer.last:
                if transfer.gradient:
                    flight.input_gradients = []
                else:
                    flight.outputs = ()
        for work, transfer in posted:
            world.board.show(transfer.text)
            world.wait(work, transfer.stage)
        posted.clear()

    def _finish_sends(self) -> None:
        for work, _, transfer in self._pending:
            self.world.board.show(transfer.text)
            self.world.wait(work, transfer.stage)
        self._pending.clear()

    # ---- the end of a step ---------------------------------------------------------------------------------------

    def _sum_gradients(self, _: None) -> None:
        self._finish_sends()
        self._sums.finish()

    def _whole_loss(self) -> torch.Tensor:
        """The sum of the microbatches' shares, from the stage that has the loss to all: its value and its dtype."""
        axis = self.world.axis(PIPELINE_AXIS)
        losses, self._step_losses = self._step_losses, []
        message = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        total: torch.Tensor | None = None
        if losses:
            total = losses[0]
            for loss in losses[1:]:
                total = total + loss
            message[0] = total
            message[1] = _LOSS_DTYPES.index(total.dtype)
        self._drop()
        if axis.size > 1:
            axis.broadcast(message, self.program.loss_stage)
        if total is None:
            total = message[0].to(_LOSS_DTYPES[int(message[1])])
        return total

    def _join(self, name: str, place: int) -> torch.Tensor:
        """One output of the whole batch from its microbatches'."""
        pieces = [outputs[place] for outputs in self._collected]
        if name == LOSS:
            total = pieces[0]
            for piece in pieces[1:]:
                total = total + piece
            return total
        if len(pieces) == 1:
            return pieces[0]
        value, _ = parse_type(self.stage.OUTPUTS[name], tuple(self.world.mesh))
        for dim, size in enumerate(value.shape):
            if not isinstance(size, int) and size_symbol("B") in size.free_symbols:
                return torch.cat(pieces, dim)
        if all(torch.equal(piece, pieces[0]) for piece in pieces[1:]):
            return pieces[0]
        raise BadArgument(
            f"The output {name!r} cannot be put together from {len(pieces)} microbatches.",
            why=f"{self.stage.OUTPUTS[name]} has no rows",
            use="microbatches=1",
        )


_LOSS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_float(type_text: str, world: World) -> bool:
    return parse_type(type_text, tuple(world.mesh))[0].dtype.is_floating_point

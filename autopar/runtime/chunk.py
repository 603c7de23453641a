"""A chunk: one of a rank's stages at work. Forward and backward of one microbatch, and the way to stages of the same rank.

Design note. What a microbatch needs between its instructions is one `_Flight`: received activations and gradients, outputs that are
still to be sent, and the graph's edges (not the output tensors: those are freed when sent unless the graph itself keeps them).

Stages of one rank hand values over in place. Each has a graph of its own all the same: what is handed over is detached, a leaf of the
next stage's graph, so the backward of each stage is its own and in its schedule's time.

`.grad` and shared memory. Autograd gives memory away: the gradient of a parameter may be a view of the gradient that came in (torch
takes such a tensor over without a copy), which another stage, a send under way or a deferred weight gradient may still read, and the
next microbatch is added to it in place. That can only begin in the first backward after `.grad` was empty. So after a stage's first
backward of a step, each parameter's gradient whose memory something else refers to as well is copied once; from then on no gradient
shares memory with anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopar.deferred import Product, add_deferred
from autopar.program import Program, Receive, Send, StageModule
from autopar.runtime.axis import Axis
from autopar.runtime.batch import Arguments, BatchTypes, Layout
from autopar.runtime.buckets import shares_memory
from autopar.runtime.buffers import Rings, RingTable
from autopar.runtime.gathered import GatheredParameters, RefreshedParameters
from autopar.runtime.gradients import GradientSums
from autopar.runtime.parameter_shards import ParameterShards
from autopar.runtime.world import World
from costmodel.mesh import REPLICA_AXIS
from passes.placement import parse_type

LOSS = "loss"


class _Flight:
    """One microbatch between its first and its last instruction on a stage."""

    __slots__ = ("arguments", "deferred", "gradients", "input_gradients", "losses", "outputs", "roots")

    def __init__(self, num_receives: int, num_gradients: int) -> None:
        self.arguments: list[torch.Tensor | None] = [None] * num_receives
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.roots: list[tuple[GradientEdge, range]] = []
        self.losses: list[tuple[GradientEdge, torch.Tensor]] = []
        self.gradients: list[torch.Tensor | None] = [None] * num_gradients
        self.input_gradients: list[torch.Tensor | None] = []
        self.deferred: list[Product] = []


class Chunk:
    """One stage of this rank.

    `number` is the stage's, `tensors` are its parameters and buffers by name, `shards` the rank's with ZeRO. `compiled`: the
    shards are up to date before a step.
    `connect` tells it of the rank's other stages.
    """

    def __init__(
        self, program: Program, world: World, number: int, cls: type[StageModule], tensors: Mapping[str, torch.Tensor],
        sums: GradientSums, batch_types: BatchTypes, *, seed: int, depth: int,
        shards: ParameterShards | None = None, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.number, self.world, self._compiled = number, world, compiled
        axes = {name: world.axis(name) for name in world.mesh}
        self._shared_buffers = {name: tensors[name] for name in cls.OWN_BUFFERS}
        own = {name: tensor.clone() for name, tensor in self._shared_buffers.items()}
        self.stage: StageModule = cls({**tensors, **own}, axes, world.coords, device=world.device, seed=seed)
        self._own_buffers = own
        self._gathered: GatheredParameters | None = None
        if shards is not None and shards.gathers:
            self.stage.p = self._gathered = GatheredParameters(world.axis(REPLICA_AXIS), shards, self.stage.p)
        elif shards is not None and not compiled:
            self.stage.p = RefreshedParameters(shards, self.stage.p)
        self._sums = sums
        self.num_microbatches = batch_types.num_microbatches
        self.receives: list[Receive] = list(cls.RECEIVES.values())
        self.sends: list[Send] = list(cls.SENDS.values())
        self.outputs = list(cls.OUTPUTS)
        self.num_sends = len(self.sends)
        self._loss = self.num_sends + self.outputs.index(LOSS) if LOSS in self.outputs else -1
        self._arguments = Arguments(program, self.stage, batch_types, world.device)
        self.receives_gradient = [value.gradient and _is_float(value.type, world) for value in self.receives]
        self.sends_gradient = [value.gradient and _is_float(value.type, world) for value in self.sends]
        # Each value has a slot for the gradient from each stage it goes to, the last stage first: autograd adds them so.
        self._slots: list[dict[int, int]] = []
        count = 0
        for value, with_gradient in zip(self.sends, self.sends_gradient, strict=True):
            stages = sorted(value.to, reverse=True) if with_gradient else []
            self._slots.append({stage: count + place for place, stage in enumerate(stages)})
            count += len(stages)
        self._num_slots = count
        self._ring_table = RingTable(
            [value.type for value in self.receives], [value.type for value in self.sends], world.mesh, world.device,
            depth=depth,
        )  # fmt: skip
        self.rings: Rings | None = None
        self._trained = [tensors[name] for name in cls.PARAMS if tensors[name].requires_grad]
        self._first_backward, self._backwards_left = True, 0
        self.loss_scale = 1.0  # what the loss's gradient starts from
        # Filled by `connect`: values for other stages of this rank (place in SENDS, stage, place in its RECEIVES), and
        # gradients for them (place in RECEIVES, stage, slot there).
        self._hands_on: list[tuple[int, Chunk, int]] = []
        self._hands_back: list[tuple[int, Chunk, int]] = []
        self._sends_away = False
        self._sends_back: list[bool] = []  # per value of RECEIVES: its gradient leaves the rank; empty if none does
        self._flights: list[_Flight | None] = []
        self._keywords: list[dict[str, Any]] = []
        self.step_losses: list[torch.Tensor] = []
        self.collected: list[tuple[torch.Tensor, ...]] = []

    # ---- what can be looked up once --------------------------------------------------------------------------------

    def connect(self, chunks: Mapping[int, Chunk]) -> None:
        """Find the values that come from and go to other stages of this rank (by number)."""
        names = list(self.stage.SENDS)
        self._sends_away = any(stage not in chunks for value in self.sends for stage in value.to)
        for place, (name, value) in enumerate(zip(names, self.sends, strict=True)):
            for stage in value.to:
                if stage in chunks:
                    self._hands_on.append((place, chunks[stage], list(chunks[stage].stage.RECEIVES).index(name)))
        for place, (name, received) in enumerate(self.stage.RECEIVES.items()):
            source = chunks.get(received.source)
            if source is not None and self.receives_gradient[place]:
                sent = list(source.stage.SENDS).index(name)
                self._hands_back.append((place, source, source._slots[sent][self.number]))
        local = {place for place, _, _ in self._hands_back}
        away = [wanted and place not in local for place, wanted in enumerate(self.receives_gradient)]
        self._sends_back = away if any(away) else []

    def activations_from(self, stage: int) -> list[int]:
        """The places in RECEIVES of what `stage` sends."""
        return [place for place, value in enumerate(self.receives) if value.source == stage]

    def gradients_to(self, stage: int) -> list[int]:
        """The places in RECEIVES of what `stage` gets a gradient for."""
        return [place for place in self.activations_from(stage) if self.receives_gradient[place]]

    def activations_to(self, stage: int) -> list[int]:
        """The places in SENDS of what goes to `stage`."""
        return [place for place, value in enumerate(self.sends) if stage in value.to]

    def gradients_from(self, stage: int) -> list[tuple[int, int]]:
        """(place in SENDS, slot) of what `stage` sends a gradient for."""
        return [
            (place, self._slots[place][stage]) for place in self.activations_to(stage) if self.sends_gradient[place]
        ]

    # ---- a step ---------------------------------------------------------------------------------------------------

    def begin(self, batch: Mapping[str, torch.Tensor], layout: Layout, replicas: Axis | None = None) -> None:
        """Prepare for a step or an evaluation. `replicas`: of whose batches together the loss is to be; None: this one's alone."""
        self.rings = self._ring_table.of(layout.sizes)
        self._keywords = self._arguments.of(batch, layout, replicas)
        self._flights = [None] * self.num_microbatches
        self.step_losses, self.collected = [], []
        self._first_backward, self._backwards_left = True, self.num_microbatches
        casts = self.stage.hold_casts(self._sums.added)
        if self._compiled:
            casts.make_all()
        with torch.no_grad():
            for name, buffer in self._own_buffers.items():
                buffer.copy_(self._shared_buffers[name])

    def drop(self) -> None:
        """Forget everything of this step."""
        self._flights, self._keywords, self.rings = [], [], None
        self.step_losses, self.collected = [], []
        self.stage.deferred = None
        self.stage.drop_casts()
        if self._gathered is not None:
            self._gathered.clear()

    def flight(self, microbatch: int) -> _Flight:
        """The microbatch's flight, made when first asked for."""
        flight = self._flights[microbatch]
        if flight is None:
            flight = self._flights[microbatch] = _Flight(len(self.receives), self._num_slots)
        return flight

    def _run(self, flight: _Flight, microbatch: int) -> tuple[torch.Tensor, ...]:
        keywords, self._keywords[microbatch] = self._keywords[microbatch], {}
        if self._gathered is None:
            outputs = self.stage.forward(*flight.arguments, **keywords)
        else:
            with self._gathered.saving():
                outputs = self.stage.forward(*flight.arguments, **keywords)
        if isinstance(outputs, tuple):
            return outputs
        return () if outputs is None else (outputs,)

    def _pass_on(self, flight: _Flight, microbatch: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """The outputs to the stages of this rank, and where transfers find them."""
        for place, chunk, argument in self._hands_on:
            chunk.flight(microbatch).arguments[argument] = outputs[place].detach()
        if self._sends_away:
            flight.outputs = outputs[: self.num_sends]

    def forward(self, microbatch: int) -> None:
        """Forward of a training step."""
        flight = self.flight(microbatch)
        for argument, with_gradient in zip(flight.arguments, self.receives_gradient, strict=True):
            if with_gradient:
                argument.requires_grad_()  # type: ignore[union-attr]
        outputs = self._run(flight, microbatch)
        for output, slots in zip(outputs, self._slots, strict=False):
            if slots and output.requires_grad:
                first = next(iter(slots.values()))
                flight.roots.append((get_gradient_edge(output), range(first, first + len(slots))))
        if self._loss >= 0:
            loss = outputs[self._loss]
            self.step_losses.append(loss.detach())
            if loss.requires_grad:
                flight.losses.append((get_gradient_edge(loss), torch.full_like(loss, self.loss_scale)))
        self._pass_on(flight, microbatch, outputs)

    def forward_only(self, microbatch: int) -> None:
        """Forward of an evaluation."""
        flight = self.flight(microbatch)
        outputs = self._run(flight, microbatch)
        flight.arguments = []
        if self.outputs:
            self.collected.append(outputs[self.num_sends :])
        self._pass_on(flight, microbatch, outputs)

    def backward(self, microbatch: int) -> None:
        """All gradients of a microbatch."""
        self._gradients(self.flight(microbatch))
        self._sums.after_backward(self.number, microbatch, complete=True)
        self._pass_back(microbatch)

    def backward_input(self, microbatch: int) -> None:
        """The gradients of what was received, and of all parameters whose gradients are not put off."""
        flight = self.flight(microbatch)
        self.stage.deferred = flight.deferred
        self._gradients(flight)
        self.stage.deferred = None
        self._sums.after_backward(self.number, microbatch, complete=False)
        self._pass_back(microbatch)

    def backward_weight(self, microbatch: int) -> None:
        """The gradients that were put off."""
        flight = self.flight(microbatch)
        if flight.deferred:
            add_deferred(flight.deferred, self._sums.added)
        self._sums.after_backward(self.number, microbatch, complete=True)

    def last(self, backward: Callable[[int], None], *, complete: bool) -> Callable[[int], None]:
        """One of the three backwards where it is the last of its kind in a step. `complete`: no other follows."""

        def run(microbatch: int) -> None:
            flights = [] if complete else [self.flight(each) for each in range(self.num_microbatches)]
            self._sums.last_backward(self.number, [flight.deferred for flight in flights])
            backward(microbatch)
            self._sums.after_last_backward(self.number, complete=complete)

        return run

    def _gradients(self, flight: _Flight) -> None:
        edges: list[GradientEdge] = []
        gradients: list[torch.Tensor] = []
        for edge, gradient in flight.losses:
            edges.append(edge)
            gradients.append(gradient)
        received = flight.gradients
        for edge, slots in flight.roots:
            total: torch.Tensor | None = None
            for slot in slots:
                part = received[slot]
                if part is not None:
                    total = part if total is None else total + part
                    received[slot] = None
            if total is not None:
                edges.append(edge)
                gradients.append(total)
        flight.roots, flight.losses = [], []
        self._backwards_left -= 1
        if self._backwards_left == 0 and self.stage.casts is not None:
            self.stage.casts.ending = True
        if edges:
            torch.autograd.backward(edges, gradients)
        if self._backwards_left == 0:
            self.stage.drop_casts()
        if self._first_backward:
            del edges, gradients
            self._first_backward = False
            for parameter in self._trained:
                if parameter.grad is not None and shares_memory(parameter.grad):
                    parameter.grad = parameter.grad.clone()

    def _pass_back(self, microbatch: int) -> None:
        """The gradients of what was received, to the stages of this rank and to where transfers find them."""
        flight = self.flight(microbatch)
        arguments, flight.arguments = flight.arguments, []
        for place, chunk, slot in self._hands_back:
            chunk.flight(microbatch).gradients[slot] = arguments[place].grad  # type: ignore[union-attr]
        if self._sends_back:
            flight.input_gradients = [
                (torch.zeros_like(argument) if argument.grad is None else argument.grad) if wanted else None  # type: ignore
                for wanted, argument in zip(self._sends_back, arguments, strict=True)
            ]


def _is_float(type_text: str, world: World) -> bool:
    return parse_type(type_text, tuple(world.mesh))[0].dtype.is_floating_point

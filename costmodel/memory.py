"""Bytes a rank holds at its peak, and the seconds its optimizer takes.

State: parameters, gradients and optimizer state. On top of it come the activations of the microbatches in flight and the buffers they are
received into. Source of the terms: Rajbhandari et al., "ZeRO", SC 2020, section 3. The optimizer is taken to be AdamW with its two f32
moments a parameter. A gradient exists from the first backward that makes it to the end of the step: `zero_grad` lets it go, as torch's
default is.

While stages are being chosen, the bytes come from formulas (`costmodel.ops`). Those of a finished plan come from its programs, run without
values (`Phase`, `MicrobatchBytes`), and from the instructions that each rank follows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from costmodel.hardware import Hardware

OPTIMIZER_STATE_BYTES = 8  # a parameter: AdamW's two moments in f32


@dataclass(frozen=True)
class PeakMemory:
    """What a rank holds at the moment when it holds most; the sum is `peak_bytes`.

    `parameter_bytes`: parameters, and the model's buffers and constants. `gradient_bytes`: those that exist at that moment.
    `activation_bytes`: what autograd keeps for the microbatches in flight, and the temporaries of what runs. `buffer_bytes`: received
    values and gradients, and what is being sent.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Phase:
    """What one microbatch allocates on a stage in a forward or a backward, in bytes.

    `peak_bytes`: the most beyond what was there before, temporaries included, once the gradients of parameters exist; `first_peak_bytes`:
    while this microbatch is the first to make them. `change_bytes`: what is there afterwards more (or less) than before, parameters'
    gradients apart; `gradient_bytes`: those that this phase makes. `apart_bytes`: gradients of tied parameters, which are kept per
    microbatch.
    """

    peak_bytes: int = 0
    first_peak_bytes: int = 0
    change_bytes: int = 0
    gradient_bytes: int = 0
    apart_bytes: int = 0


@dataclass(frozen=True)
class MicrobatchBytes:
    """What one microbatch of one size takes on one stage: measured on the emitted program, without values.

    `backward` is the whole backward; `input` and `weight` are its halves, for schedules that split it. `sent_bytes` and `returned_bytes`:
    activations and gradients that only their transfers hold, from when they are made until they are sent; `sent_saved_bytes`: what is
    sent and kept for the backward as well, which leaves the transfers with it from then on. `keeps_received` and
    `keeps_gradients`: what is put off keeps what was received, or the gradients that came back, until `weight`.
    """

    forward: Phase
    backward: Phase
    input: Phase | None = None
    weight: Phase | None = None
    sent_bytes: int = 0
    sent_saved_bytes: int = 0
    returned_bytes: int = 0
    keeps_received: bool = False
    keeps_gradients: bool = False


def training_state_bytes(
    num_parameters: Any,
    *,
    parameter_bytes: int = 4,
    gradient_bytes: int = 4,
    optimizer_state_bytes: int = OPTIMIZER_STATE_BYTES,
) -> Any:
    """Bytes of `num_parameters` parameters with their gradients and optimizer state. Defaults: f32 with Adam's two f32
    moments, 16 a parameter.
    """
    return num_parameters * (parameter_bytes + gradient_bytes + optimizer_state_bytes)


def stage_peak_bytes(
    *, state_bytes: Any, saved_bytes: Any, microbatches_in_flight: int, receive_bytes: Any = 0, extra_bytes: Any = 0
) -> Any:
    """Peak bytes of one rank: state + (saved bytes of a microbatch + what it was received into) x microbatches in
    flight + extra.

    `receive_bytes` are the buffers of one microbatch (a received activation lives until its backward); `extra_bytes` is
    whatever else is held at the peak, such as the gradients in transit or the largest temporary.
    """
    return state_bytes + (saved_bytes + receive_bytes) * microbatches_in_flight + extra_bytes


def optimizer_seconds(
    num_parameters: Any,
    hardware: Hardware,
    *,
    parameter_bytes: int = 4,
    gradient_bytes: int = 4,
    optimizer_state_bytes: int = OPTIMIZER_STATE_BYTES,
) -> Any:
    """Seconds of an AdamW step: memory traffic of reading parameter, gradient and state and writing parameter and state
    back.

    (2 parameter + gradient + 2 state) bytes / bandwidth per parameter, 28 bytes in f32; a fused or foreach
    implementation, few kernels.
    """
    moved_bytes = num_parameters * (2 * parameter_bytes + gradient_bytes + 2 * optimizer_state_bytes)
    return moved_bytes / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)

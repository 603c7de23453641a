"""Bytes a rank holds at its peak, and the seconds its optimizer takes.

State: parameters, gradients and optimizer state. On top of it come the activations of the microbatches in flight and the buffers they are
received into. Source of the terms: Rajbhandari et al., "ZeRO", SC 2020, section 3. The optimizer is taken to be AdamW with its two
moments a parameter. A gradient exists from the first backward that makes it to the end of the step: `zero_grad` lets it go, as torch's
default is.

While stages are being chosen, the bytes come from formulas (`costmodel.ops`). Those of a finished plan come from its programs, run without
values (`Phase`, `MicrobatchBytes`), and from the instructions that each rank follows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from costmodel.errors import BadArgument
from costmodel.hardware import Hardware


@dataclass(frozen=True)
class PeakMemory:
    """What a rank holds at the moment when it holds most; the sum is `peak_bytes`.

    `parameter_bytes`: parameters, and the model's buffers and constants. `gradient_bytes`: those that exist at that moment.
    `activation_bytes`: what autograd keeps for the microbatches in flight, and the temporaries of what runs. `buffer_bytes`: received
    values and gradients, what is being sent, and copies of parameters that are held: gathered ones, casts that are made once a step.
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
class Reducing:
    """What the last backward of a step takes on a stage whose gradients are summed over replicas beside it, in bytes.

    `peak_bytes`: the most beyond what was there before that backward. `gradient_change_bytes`: what gradients and sums under way take
    afterwards more (or less) than gradients did before. `finish_peak_bytes` and `finish_change_bytes`: the same of waiting for the sums.
    """

    peak_bytes: int
    gradient_change_bytes: int
    finish_peak_bytes: int
    finish_change_bytes: int


@dataclass(frozen=True)
class MicrobatchBytes:
    """What one microbatch of one size takes on one stage: measured on the emitted program, without values.

    `backward` is the whole backward; `input` and `weight` are its halves, for schedules that split it. `sent_bytes` and `returned_bytes`:
    activations and gradients that only their transfers hold, from when they are made until they are sent; `sent_saved_bytes`: what is
    sent and kept for the backward as well, which leaves the transfers with it from then on. `reducing`: this microbatch as the last of
    a step with replicas. `keeps_received` and
    `keeps_gradients`: what is put off keeps what was received, or the gradients that came back, until `weight`. `gathered_bytes`: whole
    parameters that ZeRO 3 holds from one use to the next, once a stage; peaks are beyond them.
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
    reducing: Reducing | None = None
    gathered_bytes: int = 0


@dataclass(frozen=True)
class StatePrecision:
    """Bytes of one parameter: as the forward reads it, its gradient as it is accumulated, the f32 copy that the optimizer updates
    (0: it updates the parameter itself), and one moment of the optimizer.
    """

    parameter_bytes: int
    gradient_bytes: int
    master_bytes: int
    moment_bytes: int = 4


# What a job holds by the precision it computes in. Mixed ones cast f32 parameters as they are used, and the casts are values of the graph.
# "bf16" is pure: no f32 copy, and torch's optimizers keep moments in the parameter's dtype. Other 16-bit and 8-bit jobs keep 16-bit
# parameters and gradients beside an f32 master copy. Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1;
# Rajbhandari et al. 2020, section 3.1.
# Gradients of tied parameters are kept by microbatch until they are summed (bitwise equal sums) up to this much memory a stage.
TIED_EXACT_BYTES = 256 * 2**20

STATE_PRECISIONS: dict[str, StatePrecision] = {
    "fp32": StatePrecision(4, 4, 0),
    "tf32": StatePrecision(4, 4, 0),
    "bf16-mixed": StatePrecision(4, 4, 0),
    "fp16-mixed": StatePrecision(4, 4, 0),
    "fp64": StatePrecision(8, 8, 0, 8),
    "bf16": StatePrecision(2, 2, 0, 2),
    "bf16-master": StatePrecision(2, 2, 4),
    "fp16": StatePrecision(2, 2, 4),
    "fp8": StatePrecision(2, 2, 4),
}

# Moments that an optimizer keeps of a parameter.
OPTIMIZERS: dict[str, int] = {"adamw": 2, "adam": 2, "sgd-momentum": 1, "sgd": 0}


@dataclass(frozen=True)
class StateBytes:
    """What one rank holds of some parameters from step to step, in bytes."""

    parameters: Any
    gradients: Any
    master: Any
    optimizer: Any

    @property
    def total(self) -> Any:
        return self.parameters + self.gradients + self.master + self.optimizer


def state_bytes(
    numel: Any, *, precision: str = "fp32", zero: int = 0, dp_size: int = 1, optimizer: str = "adamw",
    gradient_bytes: int | None = None,
) -> StateBytes:  # fmt: skip
    """Bytes on one rank of `numel` parameters (one tensor-parallel rank's), their gradients, master copy and optimizer state.

    `zero` splits over the `dp_size` data-parallel ranks: 1 master copy and optimizer state, 2 gradients too, 3 parameters too; a part is
    ceil(numel / dp_size) elements. `gradient_bytes` (of one element) where gradients are accumulated in another dtype than the
    precision's. f32 with AdamW and no ZeRO: 16 bytes a parameter. BadArgument for an unknown precision, optimizer or stage.
    Source: Rajbhandari et al., "ZeRO", SC 2020, figure 1.
    """
    if precision not in STATE_PRECISIONS:
        raise BadArgument(f"no precision {precision!r}", use=f"one of {', '.join(STATE_PRECISIONS)}")
    if optimizer not in OPTIMIZERS:
        raise BadArgument(f"no optimizer {optimizer!r}", use=f"one of {', '.join(OPTIMIZERS)}")
    if zero not in (0, 1, 2, 3):
        raise BadArgument(f"zero is {zero!r}", use="0, 1, 2 or 3")
    if dp_size < 1:
        raise BadArgument(f"dp_size is {dp_size}", use="an integer of 1 or more")
    row = STATE_PRECISIONS[precision]
    part = numel if dp_size == 1 else -(-numel // dp_size)
    held = [part if zero >= stage else numel for stage in (3, 2, 1)]
    return StateBytes(
        held[0] * row.parameter_bytes,
        held[1] * (row.gradient_bytes if gradient_bytes is None else gradient_bytes),
        held[2] * row.master_bytes,
        held[2] * OPTIMIZERS[optimizer] * row.moment_bytes,
    )


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
    numel: Any, hardware: Hardware, *, precision: str = "fp32", optimizer: str = "adamw", gradient_bytes: int | None = None
) -> Any:
    """Seconds of an optimizer step over `numel` parameters: memory traffic of reading gradients, reading and writing what is updated and
    its state, and writing the copy that the forward reads where that is another one.

    (gradient + 2 master or parameter + 2 state (+ parameter)) bytes / bandwidth: 28 bytes a parameter of AdamW in f32 and in mixed
    precision alike. A fused or foreach implementation, few kernels.
    """
    row = STATE_PRECISIONS[precision]
    gradient = row.gradient_bytes if gradient_bytes is None else gradient_bytes
    updated = 2 * row.master_bytes + row.parameter_bytes if row.master_bytes else 2 * row.parameter_bytes
    moved_bytes = numel * (gradient + updated + 2 * OPTIMIZERS[optimizer] * row.moment_bytes)
    return moved_bytes / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)

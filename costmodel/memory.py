"""Bytes a rank holds at its peak, and the seconds its optimizer takes.

State: parameters, gradients and optimizer state, all of which live through the whole step. On top of it come the
activations of the microbatches in flight and the buffers they are received into. Source of the terms: Rajbhandari et
al., "ZeRO", SC 2020, section 3.
"""

from __future__ import annotations

from typing import Any

from costmodel.hardware import Hardware


def training_state_bytes(
    num_parameters: Any, *, parameter_bytes: int = 4, gradient_bytes: int = 4, optimizer_state_bytes: int = 8
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
    optimizer_state_bytes: int = 8,
) -> Any:
    """Seconds of an AdamW step: memory traffic of reading parameter, gradient and state and writing parameter and state
    back.

    (2 parameter + gradient + 2 state) bytes / bandwidth per parameter, 28 bytes in f32; a fused or foreach
    implementation, few kernels.
    """
    moved_bytes = num_parameters * (2 * parameter_bytes + gradient_bytes + 2 * optimizer_state_bytes)
    return moved_bytes / (hardware.memory_bandwidth_bytes_per_second * hardware.memory_efficiency)

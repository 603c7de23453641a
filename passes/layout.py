"""What a job can look like: degrees, schedule, microbatches, ZeRO, recompute, precision. `passes.layout_evaluator` prices it.

Ranks are numbered with tensor parallelism fastest, then context, data and pipeline parallelism: `AXES`. So the stride of an axis, and
with it whether its traffic leaves a node, follows from the degrees of the faster axes. A further axis (experts) is a further field with its
place in AXES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from costmodel.errors import BadArgument
from costmodel.memory import OPTIMIZERS, STATE_PRECISIONS
from costmodel.replicas import ReplicaTraffic

AXES = ("tp", "cp", "dp", "pp")  # fastest first
RECOMPUTES = ("none", "products", "selective", "alternate", "full")  # rows of passes.layout_recompute.RECOMPUTES


@dataclass(frozen=True)
class Layout:
    """One way to run a training step on tp * cp * dp * pp devices.

    `tp`: tensor-parallel ranks; `sequence_parallel`: they split tokens between the matmuls too. `cp`: ranks that split the sequence
    and pass keys and values round (or gather them). `pp` pipeline ranks with `virtual_stages` stages each, under `schedule`. `dp` ranks
    with `zero` stage 0 to 3. A step is `microbatches` of `microbatch_rows` rows on each data-parallel rank.
    `recompute`: what backward computes again; with `replay_all` all of a recomputed layer, else only up to the last thing it needs.
    `precision`: of compute and held state; `gradient_bytes`: of one element, where gradients are accumulated in another dtype.
    `overlap`: axes whose traffic runs beside compute where it can. `blocks`: how many of the model's blocks each stage takes, in order
    (the units between runs of blocks count as one each); None: the most even cut. `offload`: kept activations wait in host memory.
    `split_sends`: tensor-parallel ranks each send their part of a value that all of them hold, and gather it on arrival. `gather_again`:
    sequence-parallel ranks keep their part of what they gathered for a product, and gather it again beside the backward's first product.
    `fused_loss`: one kernel from the logits as they are to the loss (`passes.layout_loss`); it counts for memory.
    `zero_bucket_elements`: of the flat buffers that ZeRO 1 and 2 reduce and gather in; None: buckets as autopar's programs have them.
    `sums_each_microbatch`: ZeRO 3 sums gradients after each microbatch's backward, as FSDP does, not once a step as autopar's programs do.
    `barrier`: the optimizer step waits for all pipeline ranks, for the gradients' norm or overflow; without it each rank goes on with its
    next step, and a step is as long as the busiest rank's part of it (Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 4).
    `fused`: chains of calls on elements run as one kernel (`passes.fused`), as torch.compile makes them; not so in emitted programs.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    schedule: str = "1f1b"
    microbatch_rows: int = 1
    microbatches: int = 1
    zero: int = 0
    recompute: str = "none"
    replay_all: bool = False
    sequence_parallel: bool = False
    precision: str = "fp32"
    optimizer: str = "adamw"
    gradient_bytes: int | None = None
    overlap: frozenset[str] = frozenset({"dp"})
    blocks: tuple[int, ...] | None = None
    offload: bool = False
    split_sends: bool = False
    sums_each_microbatch: bool = False
    barrier: bool = True
    fused: bool = False
    zero_bucket_elements: int | None = None
    gather_again: bool = False
    fused_loss: bool = False

    def __post_init__(self) -> None:
        for name in (*AXES, "virtual_stages", "microbatch_rows", "microbatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadArgument(f"{name} of a layout is {value!r}", use="an integer of 1 or more")
        for name, known in (
            ("zero", (0, 1, 2, 3)), ("recompute", RECOMPUTES), ("precision", tuple(STATE_PRECISIONS)), ("optimizer", tuple(OPTIMIZERS)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise BadArgument(f"{name} of a layout is {getattr(self, name)!r}", use=f"one of {', '.join(map(str, known))}")

    @property
    def num_ranks(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def global_rows(self) -> int:
        """Rows of the whole batch of a step."""
        return self.microbatch_rows * self.microbatches * self.dp

    @property
    def num_stages(self) -> int:
        return self.pp * self.virtual_stages

    def stride(self, axis: str) -> int:
        """How many ranks lie from one rank of an axis to the next."""
        return math.prod(getattr(self, name) for name in AXES[: AXES.index(axis)])


@dataclass(frozen=True)
class LayoutMemory:
    """What the fullest rank holds at its peak, in bytes. `context_bytes`: the driver's and the communicators' own; `reserve_bytes`: what
    the allocator keeps beyond what is in use; `spare_bytes`: what of that it cannot do without.
    """

    parameter_bytes: float = 0.0
    gradient_bytes: float = 0.0
    master_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activation_bytes: float = 0.0  # kept for the microbatches in flight
    working_bytes: float = 0.0  # of the layer that runs: what it computes again, temporaries
    buffer_bytes: float = 0.0  # transfers, gathered parameters, gradient buckets
    reserve_bytes: float = 0.0
    context_bytes: float = 0.0
    spare_bytes: float = 0.0

    @property
    def allocated_bytes(self) -> float:
        """What tensors take: `torch.cuda.max_memory_allocated`."""
        return self.state_bytes + self.activation_bytes + self.working_bytes + self.buffer_bytes

    @property
    def state_bytes(self) -> float:
        return self.parameter_bytes + self.gradient_bytes + self.master_bytes + self.optimizer_bytes

    @property
    def reserved_bytes(self) -> float:
        """What the allocator holds: `torch.cuda.max_memory_reserved`."""
        return self.allocated_bytes + self.reserve_bytes

    @property
    def device_bytes(self) -> float:
        """What the device is short of, as nvidia-smi shows it."""
        return self.reserved_bytes + self.context_bytes

    @property
    def needed_bytes(self) -> float:
        """What the device must have."""
        return self.allocated_bytes + self.spare_bytes + self.context_bytes


@dataclass(frozen=True)
class LayoutPrediction:
    """What a layout is predicted to do. Seconds of one step.

    `communication_seconds` by axis: all traffic of the busiest rank; `exposed_seconds` by axis: what of it the step waits for.
    `model_flops`: of the whole step on all ranks, nothing computed twice. `replicas`: of data parallelism's traffic, the bytes too.
    `uncertainty`: relative, one standard deviation of the time; None: not known.
    """

    layout: Layout
    step_seconds: float
    memory: LayoutMemory
    memory_bytes: float  # of the device
    bubble_fraction: float
    communication_seconds: Mapping[str, float]
    exposed_seconds: Mapping[str, float]
    optimizer_seconds: float
    recompute_seconds: float
    model_flops: float
    peak_flops: float  # of one device, in the precision
    tokens: float  # of a step
    basis: str
    uncertainty: float | None = None
    stage_blocks: tuple[int, ...] = field(default=())
    replicas: ReplicaTraffic = field(default=ReplicaTraffic())

    @property
    def peak_bytes(self) -> float:
        """What the device must have."""
        return self.memory.needed_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_bytes

    @property
    def margin_bytes(self) -> float:
        """What is left of the device's memory; negative where it does not fit."""
        return self.memory_bytes - self.peak_bytes

    @property
    def tflops_per_gpu(self) -> float:
        return self.model_flops / self.step_seconds / self.layout.num_ranks / 1e12

    @property
    def mfu(self) -> float:
        return self.tflops_per_gpu * 1e12 / self.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

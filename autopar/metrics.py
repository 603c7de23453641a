"""Metrics of training, with every step and at no cost: nothing here waits for a device, takes part in a collective, or reads a value.

`Metrics` of a step holds tensors as the step and the clipping returned them; whoever prints them reads them, once the next step
begins, when they have long been there. Seconds are from the end of one step to the end of the next, so the optimizer and the
loading of data are in them, and evaluation in between is not. Asynchronous devices keep the same pace as the host after the first steps.

What is predicted rather than measured: the bubble (the plan's; `profile_step` measures it), and how many FLOPs a token takes (the plan's:
model FLOPs utilisation is the plan's own, scaled by measured over predicted tokens a second, against the peak of the plan's hardware
profile; with recomputation not counted).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from autopar.plan import Plan
from autopar.runtime.world import launched
from costmodel.errors import BadArgument
from passes.ir import size_symbol
from passes.placement import parse_type

_LINE_SECONDS = 0.2  # between two progress lines


@dataclass(frozen=True)
class Metrics:
    """Of one step. Sums over all replicas; `tokens` are those of the first integer input of two dims or more, else rows."""

    step: int  # from 1
    loss: torch.Tensor  # 0-dim
    grad_norm: torch.Tensor | None  # what clip_grad_norm_ returned after this step; None if it was not called
    step_seconds: float
    tokens: int
    mfu: float | None  # None where the plan's hardware has no known peak
    memory_bytes: int  # this process's own peak: allocated on its GPU, resident on a CPU (rank threads: of all ranks together)
    bubble_fraction: float  # as planned
    loss_scale: float | None  # of fp16-mixed, for the next step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def scalars(self) -> dict[str, float]:
        """Every number that is known, by name. Waits for the device where one is still being computed."""
        found: dict[str, float] = {"loss": self.loss.item()}
        if self.grad_norm is not None:
            found["grad_norm"] = self.grad_norm.item()
        found |= {"step_seconds": self.step_seconds, "tokens_per_second": self.tokens_per_second}
        found |= {"memory_bytes": float(self.memory_bytes), "bubble_fraction": self.bubble_fraction}
        found |= {"mfu": self.mfu} if self.mfu is not None else {}
        return found | ({"loss_scale": self.loss_scale} if self.loss_scale is not None else {})

    def __str__(self) -> str:
        parts = [f"step {self.step}: loss {self.loss.item():.4f}"]
        if self.grad_norm is not None:
            parts.append(f"grad norm {self.grad_norm.item():.3g}")
        parts += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.step_seconds * 1e3:,.0f} ms"]
        parts += [f"MFU {self.mfu:.1%}"] if self.mfu is not None else []
        return ", ".join([*parts, f"{self.memory_bytes / 2**30:.2f} GiB", f"bubble {self.bubble_fraction:.0%}"])


class Reporter(Protocol):
    """What is done with every step's metrics."""

    def __call__(self, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class Meter:
    """Makes the metrics of a ParallelModel's steps, and hands each to the reporters when the next step begins."""

    def __init__(self) -> None:
        self.latest: Metrics | None = None
        self.reporters: list[Reporter] = []
        self._last_end: float | None = None
        self._apart_seconds = 0.0  # spent on other things than training since the last step
        self._reported = 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of training: its time is not the next step's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._apart_seconds += time.perf_counter() - start

    def report(self) -> None:
        """Hand on the latest metrics, if that has not been done."""
        if self.latest is not None and self.latest.step > self._reported:
            self._reported = self.latest.step
            for reporter in self.reporters:
                reporter(self.latest)

    def close(self) -> None:
        """Hand on the last step's, and end what reporters have open."""
        self.report()
        for reporter in self.reporters:
            reporter.close()

    @contextmanager
    def step(self) -> Iterator[Callable[..., None]]:
        """Around a step; yields what takes its results: (plan, batch, loss, device, loss scale)."""
        self.report()
        start = time.perf_counter()

        def done(
            plan: Plan, batch: Mapping[str, torch.Tensor], loss: torch.Tensor, device: torch.device, loss_scale: float | None
        ) -> None:
            now = time.perf_counter()
            seconds = now - start if self._last_end is None else now - self._last_end - self._apart_seconds
            self._last_end, self._apart_seconds = now, 0.0
            planned, replicas = plan.predicted, plan.mesh.get("dp", 1)
            tokens = _tokens(batch) * (replicas if launched() else 1)  # rank threads get the batches of all replicas as one
            pace = (planned.step_seconds / seconds) * (tokens / (_tokens_of_plan(plan) * replicas))
            mfu = planned.mfu * pace if planned.mfu > 0 else None
            number = 1 if self.latest is None else self.latest.step + 1
            self.latest = Metrics(
                number, loss, None, seconds, tokens, mfu, _memory_bytes(device), planned.bubble_fraction, loss_scale
            )

        yield done

    def clipped(self, norm: torch.Tensor) -> None:
        """The gradients of the latest step have this norm."""
        if self.latest is not None:
            self.latest = replace(self.latest, grad_norm=norm)


def _tokens(batch: Mapping[str, torch.Tensor]) -> int:
    for tensor in batch.values():
        if tensor.ndim >= 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            return tensor.numel()
    return next((len(tensor) for tensor in batch.values() if tensor.ndim), 1)


def _tokens_of_plan(plan: Plan) -> int:
    """Those of one replica's batch that the plan was made for."""
    values = {size_symbol(name): size for name, size in plan.sizes.items()}
    types = {name: parse_type(text, tuple(plan.mesh))[0] for name, text in plan.inputs.items()}
    shapes = {
        name: [size if isinstance(size, int) else int(size.subs(values)) for size in kind.shape]
        for name, kind in types.items()
    }
    return _tokens({name: torch.empty(shapes[name], dtype=kind.dtype, device="meta") for name, kind in types.items()})


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- reporters -----------------------------------------------------------------------------------------------------


class ProgressLine:
    """The latest step on one line of a terminal. Silent in a pipe."""

    def __init__(self) -> None:
        self._shown, self._last = sys.stderr.isatty(), 0.0

    def __call__(self, metrics: Metrics) -> None:
        if self._shown and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(f"\r\x1b[2K{metrics}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown and self._last:
            print(file=sys.stderr, flush=True)


class TensorBoard:
    """Every step's numbers as scalars `train/...` in a folder, by torch's own writer. BadArgument if tensorboard is not installed."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadArgument(
                "metrics cannot be written for TensorBoard", why=str(error), use="pip install autopar[tensorboard]"
            ) from error
        self._writer: Any = SummaryWriter(folder)

    def __call__(self, metrics: Metrics) -> None:
        for name, value in metrics.scalars().items():
            self._writer.add_scalar(f"train/{name}", value, metrics.step)

    def close(self) -> None:
        self._writer.close()

"""Predictions for any layout of a model, without a plan: `evaluator(model, inputs, hardware)` and then `.predict(Layout(...))`.

The contract, for searches and command lines:

    found = evaluator(model, example_inputs, "a100-80gb")
    found.facts                                   # rows, tokens, num_blocks (most stages), num_layers, parameters, sequence_splits
    found.predict(Layout(tp=8, pp=4, dp=2, microbatch_rows=1, microbatches=64, schedule="1f1b", recompute="full"))

`predict` gives a `LayoutPrediction`: step_seconds, memory (terms; `fits`, `margin_bytes`), bubble_fraction, communication_seconds and
exposed_seconds by axis, tflops_per_gpu, mfu, tokens_per_second, optimizer_seconds, basis, uncertainty. It raises NoLegalSharding,
TooManyStages or BadArgument for a layout that cannot be. The first prediction with a (tp, sequence_parallel) solves that sharding, on the
folded graph; those after it are sums. `predict(layout, exact=True)` plays the schedule's instructions: for the few that matter.
Compute is priced in the dtypes that the model was traced with; a layout's precision says what state is held in, and that
products with weights run in "fp8" or "tf32". A layout's batch may be any: the example's sizes other than its rows are what is
predicted for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autopar.trace import Traced, trace
from costmodel.hardware import Hardware
from costmodel.hardware import hardware as hardware_named
from passes.layout import Layout, LayoutMemory, LayoutPrediction
from passes.layout_evaluator import Evaluator, Facts
from passes.loss import weigh_loss

__all__ = ["Evaluator", "Facts", "Layout", "LayoutMemory", "LayoutPrediction", "evaluator"]


def evaluator(
    model_or_traced: nn.Module | Traced, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None, hardware: str | Hardware,
    *, loss_fn: Callable[..., Any] | None = None,
) -> Evaluator:  # fmt: skip
    """The evaluator of a model (traced here, real or meta tensors) or of what `autopar.trace.trace` gave (then no inputs).

    CaptureError and BadArgument as `trace` raises them; BadArgument for unknown hardware.
    """
    profile = hardware_named(hardware)
    if isinstance(model_or_traced, Traced):
        traced = model_or_traced
    elif isinstance(example_inputs, Mapping):
        traced = trace(model_or_traced, (), example_inputs, loss_fn=loss_fn)
    else:
        traced = trace(model_or_traced, tuple(example_inputs or ()), {}, loss_fn=loss_fn)
    weighted = weigh_loss(traced.graph_module, traced.loss)
    return Evaluator(weighted.module, traced.sizes, profile)

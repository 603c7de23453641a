"""`verify`: does the parallel model give the untouched model's loss, gradients and buffers? Measured, on this machine.

The untouched model (a copy of it) runs the whole batch once; the parallel one runs its programs on all ranks, as
threads of this process. A model whose forward updates buffers (batch statistics, counters) means something else by a
microbatch than by its part of the batch; there the untouched model runs the same microbatches one after the other,
its losses weighed by their shares of the batch. A gradient's relative difference is its largest absolute difference
over its own largest element; gradients that are all rounding (below a thousandth of the model's largest, such as that
of a key projection's bias) are measured against that thousandth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from autopar.parallelize import _arguments, parallelize
from autopar.plan import Plan
from autopar.ranks import ThreadedRanks
from autopar.runtime.batch import BatchTypes
from costmodel.errors import BadArgument, WeightsMissing
from passes.ir import output_types

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
FLOOR = 1e-3
LOW_PRECISION_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Difference:
    """One tensor compared: kind is "gradient" or "buffer"."""

    name: str
    kind: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Report:
    """What `verify` found. Prints as a table, worst first."""

    ok: bool
    loss: float
    loss_reference: float
    loss_difference: float
    worst: Difference
    differences: tuple[Difference, ...]
    loss_tolerance: float
    tolerance: float
    plan: Plan = field(repr=False)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.plan.mesh.items())
        verdict = "equal" if self.ok else "DIFFERENT"
        lines = [
            f"{self.plan.model} on {mesh}, {self.plan.microbatches} microbatches, {self.plan.schedule}: {verdict} to the untouched model",
            f"loss {self.loss:.9g}, untouched {self.loss_reference:.9g}, difference {self.loss_difference:.3g} "
            f"(tolerance {self.loss_tolerance:.0e} relative)",
        ]
        shown = sorted(self.differences, key=lambda d: -d.relative)
        rows = [
            (
                d.name,
                d.kind,
                f"{d.absolute:.3g}",
                f"{d.relative:.3g}",
                "" if d.relative <= self.tolerance else "differs",
            )
            for d in shown[:12]
        ]
        lines.append(tabulate(rows, headers=("tensor", "kind", "absolute", "relative", ""), disable_numparse=True))
        if len(shown) > 12:
            lines.append(
                f"and {len(shown) - 12} more, all within {shown[12].relative:.3g} (tolerance {self.tolerance:.0e})"
            )
        return "\n".join(lines)


def verify(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    tp: int = 1,
    pp: int = 1,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    loss_tolerance: float | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Report:
    """Compare one step on tp x pp ranks with the untouched model on the same batch: loss, every gradient, every buffer.

    Takes the options of `parallelize`. Tolerances are relative; by default 1e-6 for the loss and 1e-5 for gradients and buffers in
    fp32, 4e-2 in bf16. Dropout is off: its numbers are others on other ranks. The model is not modified. WeightsMissing for a model on
    the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise WeightsMissing(
            "verify has to run the model, and it is on the meta device",
            use="a model with weights (random ones will do)",
        )
    args, kwargs = _arguments(example_inputs)
    reference = copy.deepcopy(model)
    reference.zero_grad()
    for module in reference.modules():  # both sides see these modes: no dropout, batch statistics as the user has them
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    par = parallelize(reference, example_inputs, tp=tp, pp=pp, loss_fn=loss_fn, **options)
    assert par._traced is not None
    if par._traced.loss is None:
        raise BadArgument(
            "there is no loss to compare",
            why="the model returns none",
            use="loss_fn=..., or example inputs with labels",
        )
    ranks = par._ranks()  # with their own copies of parameters and buffers, before the reference updates any
    assert isinstance(ranks, ThreadedRanks)
    expected = _reference_step(par, reference, args, kwargs, loss_fn)
    loss = par.step(*args, **kwargs)
    first_names = dict(reference.named_parameters(remove_duplicate=True))
    largest = max(
        (p.grad.abs().max().item() for p in first_names.values() if p.grad is not None and p.grad.numel()), default=0.0
    )
    differences = []
    for name, parameter in first_names.items():
        if name in par.plan.parameter_notation:
            differences.append(_compare(name, "gradient", ranks.whole(name, "grad"), parameter.grad, FLOOR * largest))
        elif parameter.grad is not None and parameter.grad.abs().max() > 0:
            differences.append(Difference(name, "gradient", parameter.grad.abs().max().item(), 1.0))
    held = {name for stage in par.plan.stages for name in stage.buffers}
    for name, buffer in reference.named_buffers():
        if name in held:
            differences.append(_compare(name, "buffer", ranks.whole(name), buffer, 0.0))
    par.close()
    loose = max((LOW_PRECISION_TOLERANCE.get(dtype, 0.0) for dtype in _computed_in(par.plan)), default=0.0)
    loss_tolerance = loss_tolerance if loss_tolerance is not None else loose or LOSS_TOLERANCE
    tolerance = tolerance if tolerance is not None else loose or GRADIENT_TOLERANCE
    off = abs(loss.item() - expected.item())
    worst = max(differences, key=lambda d: d.relative, default=Difference("", "none", 0.0, 0.0))
    ok = off <= loss_tolerance * max(1.0, abs(expected.item())) and all(d.relative <= tolerance for d in differences)
    return Report(ok, loss.item(), expected.item(), off, worst, tuple(differences), loss_tolerance, tolerance, par.plan)


def _reference_step(
    par: Any, reference: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss_fn: Callable[..., Any] | None
) -> torch.Tensor:
    """Forward and backward of the untouched model; the loss. Buffers end up as they do by the plan's microbatches."""
    plan: Plan = par.plan
    signature = par._traced.signature
    updates, felt = _buffer_updates(plan)
    whole = copy.deepcopy(reference) if updates and not felt else reference
    loss = torch.zeros(())
    if not (updates and felt and plan.microbatches > 1):
        expected = _reference_loss(reference, signature.bind(args, kwargs), loss_fn)
        expected.backward()
        if not updates or plan.microbatches == 1:
            return expected.detach()
        loss = expected.detach()
    types = BatchTypes(plan.inputs, plan.microbatches)
    batch = par._traced.flatten(args, kwargs)
    layout = types.layout(batch)
    parts = types.split(batch, layout, tuple(plan.inputs))
    weights = [_weight(plan, part, sizes) for part, sizes in zip(parts, layout.sizes, strict=True)] if felt else []
    for index, part in enumerate(parts):
        again = signature.rebuild(args, kwargs, [part[name] for name in plan.inputs])
        if felt:
            expected = _reference_loss(reference, again, loss_fn) * (
                weights[index] / sum(weights) if weights[0] is not None else 1.0
            )
            expected.backward()
            loss = loss + expected.detach()
        else:
            with torch.no_grad():
                _reference_loss(whole, again, loss_fn)
    if whole is not reference:
        for buffer, updated in zip(reference.buffers(), whole.buffers(), strict=True):
            buffer.copy_(updated)
    return loss


def _computed_in(plan: Plan) -> set[torch.dtype]:
    """The dtypes of the values that gradients flow through, autocast's included."""
    nodes = (node for stage in plan.stages for node in stage.graph_module.graph.nodes if node.meta.get("trainable"))
    return {kind.dtype for node in nodes for kind in output_types(node)}


def _buffer_updates(plan: Plan) -> tuple[bool, bool]:
    """Does forward update buffers, and can the loss tell: are they read by anything but their own update, or batch statistics?"""
    updates = felt = False
    for stage in plan.stages:
        nodes = list(stage.graph_module.graph.nodes)
        for node in nodes:
            names = node.meta.get("mutates", ())
            updates = updates or bool(names)
            reads = [n for n in nodes if n.op == "get_attr" and n.target in names]
            felt = felt or (bool(names) and (bool(node.users) or any(len(n.users) > 1 for n in reads)))
    return updates, felt


def _weight(plan: Plan, part: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> Any:
    """What a microbatch counts in the batch's loss; None if the loss is a sum. BadArgument for a loss of several terms."""
    loss = next(
        node
        for node in plan.stages[-1].graph_module.graph.nodes
        if node.meta.get("loss") and node.op == "call_function"
    )
    if plan.loss_weights is None:
        return None
    if not any(isinstance(arg, fx.Node) and "loss_share" in arg.meta for arg in loss.args):
        raise BadArgument(
            "the untouched model cannot be run by microbatches",
            why="forward updates buffers, and the loss has several terms that weigh differently",
            use="microbatches=1",
        )  # fmt: skip
    given = {**part, **sizes}
    return plan.loss_weights(
        *(given[str(node.target)] for node in plan.loss_weights.graph.nodes if node.op == "placeholder")
    )[0]


def _reference_loss(
    reference: nn.Module, call: tuple[Any, dict[str, Any]], loss_fn: Callable[..., Any] | None
) -> torch.Tensor:
    bound, targets = call
    output = reference(*bound.args, **bound.kwargs)
    if loss_fn is not None:
        return loss_fn(output, *targets.values())
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return output.loss if isinstance(getattr(output, "loss", None), torch.Tensor) else output[0]


def _compare(
    name: str, kind: str, found: torch.Tensor | None, expected: torch.Tensor | None, floor: float
) -> Difference:
    if found is None or expected is None:
        there = found if found is not None else expected
        size = there.abs().max().item() if there is not None and there.numel() else 0.0
        return Difference(name, kind, size, 0.0 if size == 0.0 else 1.0)
    if expected.numel() == 0:
        return Difference(name, kind, 0.0, 0.0)
    found, expected = found.double(), expected.double()
    if not torch.isfinite(expected).all():
        same = torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected))
        return Difference(name, kind, 0.0 if same else float("inf"), 0.0 if same else float("inf"))
    absolute = (found - expected).abs().max().item()
    scale = max(expected.abs().max().item(), floor)
    return Difference(name, kind, absolute, absolute / scale if scale else (0.0 if absolute == 0.0 else float("inf")))

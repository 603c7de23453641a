"""`verify`: does the parallel model give the untouched model's loss, gradients and buffers? Measured, on this machine.

The untouched model (a copy of it) runs the whole batch once; the parallel one runs its programs on all ranks, as
threads of this process. A model whose forward updates buffers (batch statistics, counters) means something else by a
microbatch than by its part of the batch; there the untouched model runs the same microbatches one after the other,
its losses weighed by their shares of the batch.

A model that computes in bf16 or fp16 anywhere is run once more by itself, as a copy in float64 with float64 inputs
(float32 if some op of it cannot): both sides are measured against that run. So is one whose gradients differ by more
than the tolerance: some are all rounding. What may differ by how much is in autopar/compare.py. The extra run costs the
time of one more step on one rank, and 16 bytes a parameter while it lasts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autopar.compare import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    LOW_PRECISION,
    Comparison,
    Difference,
    Outcome,
    allow_rounding,
    compare_fixed,
    compare_low_precision,
)
from autopar.options import call_arguments
from autopar.parallelize import parallelize
from autopar.plan import Plan
from autopar.precision import PRECISIONS, precision_named
from autopar.runtime.batch import BatchTypes
from autopar.threaded_ranks import ThreadedRanks
from autopar.trace_models import check_model, inner_model
from autopar.trace_precision import computing
from costmodel.errors import BadArgument, WeightsMissing
from passes.ir import output_types
from passes.loss import every_term_weighed

# Where no higher precision can run the model (it names a dtype itself): both sides beside each other, by this much.
LAST_TOLERANCE = 4e-2


@dataclass(frozen=True)
class Report:
    """What `verify` found. Prints as a table, worst first.

    `loss_tolerance` and `tolerance` are relative; in low precision they are what the loss and the worst tensor were
    allowed, and `worst.relative` is an error against the exact model (see autopar/compare.py; `criterion` says it).
    """

    ok: bool
    loss: float
    loss_reference: float
    loss_difference: float
    worst: Difference
    differences: tuple[Difference, ...]
    loss_tolerance: float
    tolerance: float
    criterion: str
    plan: Plan = field(repr=False)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.plan.mesh.items())
        verdict = "equal" if self.ok else "DIFFERENT"
        lines = [
            f"{self.plan.model} on {mesh}, {self.plan.microbatches} microbatches, {self.plan.schedule}: {verdict} to the untouched model",
            f"loss {self.loss:.9g}, untouched {self.loss_reference:.9g}, difference {self.loss_difference:.3g} "
            f"(tolerance {self.loss_tolerance:.2g} relative)",
            self.criterion,
        ]
        shown = sorted(self.differences, key=lambda d: -d.badness)
        low = any(d.untouched for d in shown)
        rows = [
            (
                d.name,
                d.kind,
                f"{d.absolute:.3g}",
                f"{d.relative:.3g}",
                *((f"{d.untouched:.3g}", f"{d.allowed:.3g}") if low else ()),
                "" if d.ok else "differs",
            )
            for d in shown[:12]
        ]
        headers = ("tensor", "kind", "absolute", "error", "untouched's", "allowed", "") if low else (
            "tensor", "kind", "absolute", "relative", "")  # fmt: skip
        lines.append(tabulate(rows, headers=headers, disable_numparse=True))
        if len(shown) > 12:
            wrong = sum(not d.ok for d in shown[12:])
            rest = f"{wrong} of them differ" if wrong else f"all within {max(d.relative for d in shown[12:]):.3g}"
            lines.append(f"and {len(shown) - 12} more, {rest}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    loss_tolerance: float | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Report:
    """Compare one step on tp x pp x dp ranks with the untouched model on the same batch: loss, every gradient, every buffer.

    The batch is that of all replicas: its rows are split over dp. Takes the options of `parallelize`.

    Tolerances are relative: 1e-6 for the loss and 1e-5 for gradients and buffers in
    full precision. In bf16 and fp16 a tensor's error against the same model in float64, |x - exact| / |exact| in the L2
    norm, may be 4 times the untouched model's own (or the median of those over all gradients, or the dtype's eps); a
    tolerance that is given replaces that. Dropout is off: its numbers are others on other ranks. The model is not
    modified. WeightsMissing for a model on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise WeightsMissing(
            "verify has to run the model, and it is on the meta device",
            use="a model with weights (random ones will do)",
        )
    check_model(model)
    args, kwargs = call_arguments(example_inputs)
    state = precision_named(options.get("precision", "fp32")).state
    model = model if state is None else copy.deepcopy(model).to(state)
    reference = _without_dropout(model)
    par = parallelize(reference, example_inputs, tp=tp, pp=pp, dp=dp, loss_fn=loss_fn, **options)
    assert par._traced is not None
    if par._traced.loss is None:
        raise BadArgument(
            "there is no loss to compare",
            why="the model returns none",
            use="loss_fn=..., or example inputs with labels",
        )
    ranks = par._ranks()  # with their own copies of parameters and buffers, before the reference updates any
    assert isinstance(ranks, ThreadedRanks)
    untouched = _outcome(par, reference, args, kwargs, loss_fn, state)
    loss = par.step(*args, **kwargs)
    held = par.plan.parameter_notation
    found = Outcome(
        loss.detach(),
        {name: ranks.whole(name, "grad") if name in held else None for name in untouched.gradients},
        {name: ranks.whole(name) for name in untouched.buffers},  # type: ignore[misc]
    )
    low = [torch.finfo(dtype).eps for dtype in _computed_in(par.plan) if dtype in LOW_PRECISION]
    comparison = None
    if low and tolerance is None and loss_tolerance is None:
        exact = _exact_outcome(par, model, args, kwargs, loss_fn)
        if exact is not None:
            comparison = compare_low_precision(found, untouched, exact, max(low))
    if comparison is None:
        loose = LAST_TOLERANCE if low else None
        comparison = compare_fixed(
            found,
            untouched,
            next(t for t in (loss_tolerance, loose, LOSS_TOLERANCE) if t is not None),
            next(t for t in (tolerance, loose, GRADIENT_TOLERANCE) if t is not None),
        )
        if not comparison.ok and not low and tolerance is None:
            exact = _exact_outcome(par, model, args, kwargs, loss_fn, (torch.float64,))
            comparison = allow_rounding(comparison, untouched, exact) if exact is not None else comparison
    par.close()
    return _report(comparison, found, untouched, par.plan)


def _report(comparison: Comparison, found: Outcome, untouched: Outcome, plan: Plan) -> Report:
    worst = max(comparison.differences, key=lambda d: (d.badness, d.relative), default=Difference("", "none", 0.0, 0.0))
    loss = untouched.loss.item()
    return Report(
        comparison.ok, found.loss.item(), loss, comparison.loss_difference, worst, comparison.differences,
        comparison.loss_tolerance, worst.allowed, comparison.criterion, plan,
    )  # fmt: skip


def _without_dropout(model: nn.Module) -> nn.Module:
    """A copy, without gradients. Both sides see its modes: no dropout, batch statistics as the user has them."""
    computed = [  # a tensor that forward computes and keeps cannot be copied; forward computes it again
        value for module in model.modules() for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]  # fmt: skip
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    copied.zero_grad()
    for module in copied.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    return copied


def _outcome(
    par: Any,
    reference: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_fn: Callable[..., Any] | None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """One step of a model by itself. A trained parameter that the plan does not hold counts if it has a gradient."""
    loss = _reference_step(par, reference, args, kwargs, loss_fn, dtype)
    held = {name for stage in par.plan.stages for name in stage.buffers}
    return Outcome(
        loss,
        {
            name: parameter.grad.to_dense() if parameter.grad is not None and parameter.grad.is_sparse else parameter.grad
            for name, parameter in reference.named_parameters(remove_duplicate=True)
            if name in par.plan.parameter_notation or parameter.grad is not None
        },
        {name: buffer for name, buffer in reference.named_buffers() if name in held},
    )


class _InPlaceOfFloat32(TorchFunctionMode):
    """Takes a precision where a model's own code names float32, as norms and softmaxes in low precision do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].to(self.dtype)
        return func(*self._raised(args), **self._raised(kwargs or {}))

    def _raised(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self._raised(item) for item in value)
        if isinstance(value, dict):
            return {key: self._raised(item) for key, item in value.items()}
        return self.dtype if value is torch.float32 else value


def _exact_outcome(
    par: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss_fn: Callable[..., Any] | None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
) -> Outcome | None:  # fmt: skip
    """The same step of the same numbers in a higher precision, of the first of these that works; None if none does."""
    for dtype in dtypes:
        try:
            raised = _without_dropout(model).to(dtype)
            function = copy.deepcopy(loss_fn).to(dtype) if isinstance(loss_fn, nn.Module) else loss_fn
            with _InPlaceOfFloat32(dtype):
                return _outcome(par, raised, args, kwargs, function, dtype)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # an op or a device without it, dtypes that mix
            reason = str(error).partition("\n")[0]
    if torch.float32 not in dtypes:
        return None
    warnings.warn(
        f"verify: the model cannot run in a higher precision ({reason}); both sides are compared with each other, "
        f"tolerance {LAST_TOLERANCE:.0e}",
        stacklevel=3,
    )
    return None


def _reference_step(
    par: Any,
    reference: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_fn: Callable[..., Any] | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Forward and backward of the untouched model; the loss. Buffers end up as they do by the plan's microbatches and replicas.

    `dtype`: what its floating-point inputs are turned into.
    """
    plan: Plan = par.plan
    signature = par._traced.signature
    exact = dtype is not None and dtype not in LOW_PRECISION
    precision = PRECISIONS["fp32"] if exact else par._traced.precision
    device = next((tensor.device for tensor in reference.parameters()), None)

    def run(call: tuple[Any, dict[str, Any]]) -> torch.Tensor:
        with computing(precision, device):
            return _reference_loss(reference, call, loss_fn, dtype)

    updates, felt = _buffer_updates(plan)
    batch = par._traced.flatten(args, kwargs)
    parts = _parts(plan, batch)
    before = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    loss = torch.zeros(())
    if not (updates and felt and len(parts) > 1):
        expected = run(signature.bind(args, kwargs))
        expected.backward()
        if not updates or len(parts) == 1:
            return expected.detach()
        loss = expected.detach()
    weights = [_weight(plan, part, sizes) for _, part, sizes in parts] if felt else []
    after: dict[int, dict[str, torch.Tensor]] = {}  # the buffers of each replica
    for index, (replica, part, _) in enumerate(parts):
        if replica not in after:
            _set_buffers(reference, before)
        again = signature.rebuild(args, kwargs, [part[name] for name in plan.inputs])
        if felt:
            share = weights[index] / sum(weights) if weights[0] is not None else 1.0
            expected = run(again) * share
            expected.backward()
            loss = loss + expected.detach()
        else:
            with torch.no_grad():
                run(again)
        after[replica] = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    means = {
        name: torch.stack([one[name] for one in after.values()]).mean(0) if buffer.is_floating_point() else after[0][name]
        for name, buffer in before.items()
    }
    _set_buffers(reference, means)
    return loss


def _parts(
    plan: Plan, batch: Mapping[str, torch.Tensor]
) -> list[tuple[int, Mapping[str, torch.Tensor], Mapping[str, int]]]:
    """(replica, rows, sizes) of each microbatch of each replica."""
    listed = BatchTypes(plan.inputs, 1).over_replicas(batch, plan.mesh.get("dp", 1))
    rows = [BatchTypes(plan.inputs, 1).layout(part).sizes[0].get("B", plan.microbatches) for part in listed]
    types = BatchTypes(plan.inputs, min(plan.microbatches, *rows, plan.microbatches))
    found: list[tuple[int, Mapping[str, torch.Tensor], Mapping[str, int]]] = []
    for replica, part in enumerate(listed):
        layout = types.layout(part)
        pieces = types.split(part, layout, tuple(plan.inputs))
        found += [(replica, piece, sizes) for piece, sizes in zip(pieces, layout.sizes, strict=True)]
    return found


@torch.no_grad()
def _set_buffers(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in module.named_buffers():
        buffer.copy_(values[name])


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
    """What a microbatch counts in the batch's loss; None if the loss is a sum. BadArgument for terms that weigh differently."""
    loss = next(
        node
        for node in plan.stages[-1].graph_module.graph.nodes
        if node.meta.get("loss") and node.op == "call_function"
    )
    if plan.loss_weights is None:
        return None
    given = {**part, **sizes}
    weights = plan.loss_weights(
        *(given[str(node.target)] for node in plan.loss_weights.graph.nodes if node.op == "placeholder")
    )
    if not every_term_weighed(loss) or any(float(weight) != float(weights[0]) for weight in weights):
        raise BadArgument(
            "the untouched model cannot be run by microbatches",
            why="forward updates buffers, and the loss has several terms that weigh differently",
            use="microbatches=1",
        )  # fmt: skip
    return weights[0]


def _reference_loss(
    reference: nn.Module,
    call: tuple[Any, dict[str, Any]],
    loss_fn: Callable[..., Any] | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    bound, targets = call

    def raised(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    given = (bound.args, bound.kwargs, targets)
    args, kwargs, targets = given if dtype is None else tree_map(raised, given)
    output = inner_model(reference)(*args, **kwargs)
    if loss_fn is not None:
        return loss_fn(output, *targets.values())
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return output.loss if isinstance(getattr(output, "loss", None), torch.Tensor) else output[0]

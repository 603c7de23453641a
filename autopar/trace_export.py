"""Running torch.export: as many symbolic sizes as work, a model that is left as it was, errors that name the line.

`torch.export` is told nothing of arguments or outputs: it gets a thin module that shares the model's parameters under
their own names and takes a flat list of tensors. Some things are switched while it runs, and switched back: attributes
that modules replace (recurrent layers keep their weights in a list too, which would be left holding fake tensors),
`autograd.Function.apply` (export runs a custom function's forward and forgets its backward, so it is refused), the
filter of recorded stacks, and what autopar/trace_modes.py is about. Fake tensors are worked out anew for each op: with symbolic sizes
torch's cache of them takes longer than it saves (a fifth to a quarter of a small model's tracing; nothing either way on 16 layers).
"""

from __future__ import annotations

import io
import linecache
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch._dynamo.config
from torch import nn

from autopar.trace_modes import as_graphs_mean_it, checkpointed
from autopar.trace_precision import with_state
from costmodel.errors import CaptureError
from passes.canonical_import import is_user_file, relative_file

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep


def is_model_file(file: str) -> bool:
    """True for the user's code, which may be a library's, and false for this package."""
    return is_user_file(file) and not file.startswith(_OWN)


def _below_forward(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The user's frames inside the model's forward (and loss function)."""
    own = [index for index, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "forward"]
    return [frame for frame in frames[own[-1] if own else len(frames) :] if is_model_file(frame.filename)]


class _Flat(nn.Module):
    """The model behind a forward that takes a flat list of tensors. It has the model's own tables, so every name is the
    same."""

    run: Callable[[Sequence[torch.Tensor]], tuple[Any, ...]]

    def __init__(self, model: nn.Module, run: Callable[[Sequence[torch.Tensor]], tuple[Any, ...]]) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["training"] = model.training
        self.__dict__["run"] = run

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        return self.run(tensors)


def export(
    model: nn.Module,
    run: Callable[[Sequence[torch.Tensor]], tuple[Any, ...]],
    examples: list[torch.Tensor],
    roles: dict[tuple[int, int], str],
    replacement: Callable[[], Callable[[torch.Tensor], torch.Tensor] | None] = lambda: None,
) -> tuple[torch.export.ExportedProgram, dict[tuple[int, int], str]]:
    """Export with as many symbolic sizes as work: all, the batch, none. Returns the roles that were used.

    `replacement` gives, for an attempt, what stands in for each tensor (None: it does itself).
    """
    attempts = [roles, {place: name for place, name in roles.items() if name == "B"}, {}]
    failure: Exception | None = None
    for attempt, chosen in enumerate(attempts):
        if attempt and chosen == attempts[attempt - 1]:
            continue
        rows = [_two_rows(tensor) if chosen.get((index, 0)) == "B" else tensor for index, tensor in enumerate(examples)]
        shapes = tuple(
            {dim: torch.export.Dim.AUTO for dim in range(tensor.dim()) if (index, dim) in chosen}
            for index, tensor in enumerate(rows)
        )
        replaced = replacement()
        if replaced is not None:
            rows = [replaced(tensor) for tensor in rows]
        try:
            with (
                _left_as_it_was(model), with_state(model, replaced), _no_custom_functions(),
                as_graphs_mean_it(_refusal), _whole_user_stacks(), _quiet(),
                torch.compiler.set_stance("force_eager"), torch.enable_grad(),
                torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
            ):  # fmt: skip
                flat = _Flat(model, run)
                return torch.export.export(flat, tuple(rows), dynamic_shapes={"tensors": shapes}, strict=False), chosen
        except CaptureError:
            raise
        except Exception as error:
            failure = error
    assert failure is not None
    raise _capture_error(failure) from failure


def _two_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor]) if tensor.shape[0] == 1 else tensor


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back every attribute of every module that tracing replaced, also inside lists and dicts."""
    tables: list[tuple[Any, Any]] = []
    for module in model.modules():
        tables.append((module.__dict__, dict(module.__dict__)))
        for value in module.__dict__.values():
            if isinstance(value, (dict, list)):
                tables.append((value, value.copy()))
    try:
        yield
    finally:
        for table, before in tables:
            if isinstance(table, list):
                if len(table) != len(before) or any(new is not old for new, old in zip(table, before, strict=True)):
                    table[:] = before
            elif list(table) != list(before) or any(table[key] is not old for key, old in before.items()):
                table.clear()
                table.update(before)


def _refusal(what: str, why: str, use: str) -> CaptureError:
    """The error for something that forward does right now, with the user's line."""
    frames = _below_forward(traceback.extract_stack())
    where = place(frames[-1].filename, frames[-1].lineno or 0) if frames else None
    return CaptureError(what, where=where, why=why, use=use)


@contextmanager
def _no_custom_functions() -> Iterator[None]:
    """Refuse autograd.Functions of the user's own: export would run their forward and forget their backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch.") and cls.__module__ != "torch.utils.checkpoint":
            return original.__get__(None, cls)(*args, **kwargs)
        if cls.__module__ == "torch.utils.checkpoint":
            return checkpointed(args)
        raise _refusal(
            f"the custom autograd.Function {cls.__name__} cannot be captured",
            "its backward is Python that a graph does not hold",
            "torch.library.custom_op with register_autograd, or plain tensor operations",
        )

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def _whole_user_stacks() -> Iterator[None]:
    """Record every user frame below forward with each op; export keeps only functions that are named forward."""
    original = getattr(torch.fx.proxy.TracerBase, "_filter_traceback_frames", None)
    if original is None:  # a torch that filters elsewhere: names then come from the forward functions alone
        yield
        return

    def user_frames(tracer: torch.fx.proxy.TracerBase, summary: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(_below_forward(summary))

    torch.fx.proxy.TracerBase._filter_traceback_frames = user_frames  # type: ignore[method-assign, assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.fx.proxy.TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the graph that torch prints when it gives up, and its warnings, off the terminal: the error says what is wrong.

    What the model itself prints is shown if the export works.
    """
    before, printed = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(printed):
            yield
    finally:
        logging.disable(before)
    sys.stderr.write(printed.getvalue())


def place(file: str, line: int) -> str:
    return f"{relative_file(file)}:{line}  {linecache.getline(file, line).strip()}".rstrip()


def _capture_error(error: BaseException) -> CaptureError:
    """The user's line and the reason, from whatever export raised."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    stacks = [_below_forward(traceback.extract_tb(link.__traceback__)) for link in chain]
    deepest = max(stacks, key=len)
    where = place(deepest[-1].filename, deepest[-1].lineno or 0) if deepest else None
    text = "\n".join(str(link) for link in chain)
    kinds = " ".join(type(link).__name__ for link in chain)
    reads_values = any(words in text for words in ("data-dependent", "unbacked", "got FakeTensor"))
    if reads_values or "DataDependent" in kinds or "DynamicOutputShape" in kinds:
        return CaptureError(
            "forward cannot be captured as one graph",
            where=where,
            why="values of a tensor are read here, for a branch or a size; they are not known before a step",
            use="a tensor operation such as torch.where, or a decision made outside of forward",
        )
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return CaptureError("forward cannot be captured as one graph", where=where, why=f"{type(error).__name__}: {first}")

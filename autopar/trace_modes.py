"""What Python does besides tensor operations while a model is traced: values that are read for a check only, autograd
called inside of forward, gradients switched off by inference_mode, recomputation.

A graph holds tensor operations. Each of these is either made into what means the same there, or refused with the line:

- A branch on a tensor's values whose only outcome is an error or a warning (`if x.isnan().any(): raise ...`, `assert
  mask.all()`, the argument checks of torch.distributions) takes the way that raises nothing. The check itself is not
  kept: a graph cannot hold it, and no result depends on it.
- `torch.inference_mode` is traced as `torch.no_grad`: export records only the latter, and would let gradients flow.
- A reentrant checkpoint is traced as the call that it wraps; where none of its arguments has a gradient it gives none
  to the parameters either, so that call is then made under no_grad.
- `torch.autograd.grad`, `.backward()` and gradient hooks on tensors are refused: export forgets them without a word.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

Refuse = Callable[[str, str, str], Exception]  # what, why and use -> the error, with the user's line

_INHERITED = object()
_WARNINGS = {"warn", "warning", "warning_once", "warn_once", "info", "debug"}


def passing_answer(frame: FrameType) -> bool | None:
    """The truth value that a tensor must have for the check at this place to pass; None if it is no mere check."""
    positions = list(frame.f_code.co_positions())[: frame.f_lasti // 2 + 1]
    for line, end, column, last in reversed(positions):  # the jump is the statement's own; before it comes the operand
        if line is None or end is None or column is None or last is None:
            continue
        place = (line, column, end, last)
        for statement in _conditions(frame.f_code.co_filename):
            if _within(place, statement.test):
                if isinstance(statement, ast.Assert):
                    return _value_for(statement.test, True, place)
                return _value_for(statement.test, False, place) if all(map(_only_complains, statement.body)) else None
        if not any(_within(place, statement) for statement in _conditions(frame.f_code.co_filename)):
            return None
    return None


def _within(place: tuple[int, int, int, int], node: ast.AST) -> bool:
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return start <= place[:2] and place[2:] <= end


@functools.lru_cache(maxsize=64)
def _conditions(file: str) -> tuple[ast.If | ast.Assert, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.Assert)))


def _only_complains(statement: ast.stmt) -> bool:
    """True for a raise, and for a call that warns."""
    if isinstance(statement, ast.Raise):
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _WARNINGS


def _value_for(test: ast.expr, wanted: bool, place: tuple[int, int, int, int]) -> bool:
    """What the operand at a place must be for the condition to be `wanted`, the others being so too."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _value_for(test.operand, not wanted, place)
    if isinstance(test, ast.BoolOp):
        return next((_value_for(part, wanted, place) for part in test.values if _within(place, part)), wanted)
    return wanted


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """An attribute of a class or module switched for a while."""
    own = vars(owner).get(name, _INHERITED)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def as_graphs_mean_it(refuse: Refuse) -> Iterator[None]:
    """The switches of this file, while a model is traced."""

    def autograd_inside(*args: Any, **kwargs: Any) -> Any:
        raise refuse(
            "gradients are computed inside of forward",
            "a graph of forward operations does not hold a backward within it",
            "the derivative in tensor operations, or a loss that needs none",
        )

    def hook_inside(*args: Any, **kwargs: Any) -> Any:
        raise refuse(
            "forward registers a gradient hook on a tensor",
            "a hook is Python that a graph does not hold",
            "torch.library.custom_op with register_autograd for the changed gradient",
        )

    with ExitStack() as stack:
        inference_mode = torch.autograd.grad_mode.inference_mode
        stack.enter_context(replaced(inference_mode, "__enter__", _enter_no_grad))
        stack.enter_context(replaced(inference_mode, "__exit__", _exit_no_grad))
        stack.enter_context(replaced(torch.autograd, "grad", autograd_inside))
        stack.enter_context(replaced(torch.autograd, "backward", autograd_inside))
        stack.enter_context(replaced(torch.Tensor, "backward", autograd_inside))
        stack.enter_context(replaced(torch.Tensor, "register_hook", hook_inside))
        stack.enter_context(replaced(torch.Tensor, "__bool__", _checked(torch.Tensor.__bool__, lambda tensor: True)))
        stack.enter_context(
            replaced(torch.SymBool, "__bool__", _checked(torch.SymBool.__bool__, free_unbacked_symbols))
        )
        yield


def _checked(original: Callable[[Any], bool], unknown: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """`bool()` of a value, which answers what lets a mere check pass where the value is unknown."""

    def __bool__(value: Any) -> bool:
        answer = passing_answer(sys._getframe(1)) if unknown(value) else None
        return original(value) if answer is None else answer

    return __bool__


def _enter_no_grad(mode: Any) -> None:
    mode.traced_as = torch.no_grad() if mode.mode else torch.enable_grad()
    mode.traced_as.__enter__()


def _exit_no_grad(mode: Any, *error: Any) -> None:
    mode.traced_as.__exit__(*error)


def checkpointed(arguments: tuple[Any, ...]) -> Any:
    """The call that a reentrant checkpoint wraps: `arguments` are those of torch's CheckpointFunction."""
    function, _, *inputs = arguments
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
        return function(*inputs)
    with torch.no_grad():
        return function(*inputs)

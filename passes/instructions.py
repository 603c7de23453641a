"""The instructions of a rank program: what one pipeline stage does in one step, as plain data.

Design note. A schedule is a list of these, nothing else: it can be printed into a program (`repr` is short and
evaluates back to the same value), stored in a plan file (`to_list` and `instruction` are inverse), proved
(passes/order.py), simulated (passes/timeline.py) and executed (the runtime has one branch per class). There is no
control flow, so that whoever reads the list knows what will run.

A transfer instruction moves all tensors of one microbatch that go from this stage to one other. Its peer is a stage,
not a rank: tensor and data parallel ranks of a stage have the same list. `chunk` says which of the rank's stages
computes, sends or receives, counted in the order of the stages, for schedules with several stages per rank; it is 0,
and not printed, for all others. Between two stages of one rank there is no transfer: values are handed over in place.

A backward is one instruction, or two for schedules that fill bubbles with the weight gradients, which no other stage
waits for: BackwardInput, whose result is sent on, and BackwardWeight at any later time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

from costmodel.errors import BadArgument

Json = str | int


class _Printed:
    """The repr and JSON form that all share: the microbatch is positional, the peer is named, chunk 0 is left out."""

    __slots__ = ()

    def _shown(self) -> list[tuple[str, int]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return [(name, value) for name, value in values if not (name == "chunk" and value == 0)]

    def __repr__(self) -> str:
        shown = (str(value) if name == "microbatch" else f"{name}={value}" for name, value in self._shown())
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_list(self) -> list[Json]:
        """The JSON form: `["SendActivation", 0, 1]`. `instruction` reads it back."""
        return [type(self).__name__, *(value for _, value in self._shown())]


@dataclass(frozen=True, slots=True, repr=False)
class Forward(_Printed):
    """Run the stage on one microbatch and keep what its backward needs."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Backward(_Printed):
    """Run the stage's backward on one microbatch, add to the parameters' gradients, free what was kept."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class BackwardInput(_Printed):
    """Run the stage's backward on one microbatch as far as the gradients of what the stage received.

    What the deferred weight gradients need is kept until BackwardWeight; everything else is freed.
    """

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class BackwardWeight(_Printed):
    """Add the weight gradients that BackwardInput deferred for this microbatch, free what was kept for them."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class SendActivation(_Printed):
    """Send the tensors of one microbatch that stage `to` receives from this stage."""

    microbatch: int
    to: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class RecvActivation(_Printed):
    """Receive the tensors of one microbatch that stage `source` sends to this stage."""

    microbatch: int
    source: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class SendGradient(_Printed):
    """Send stage `to` the gradients of the tensors that it had sent here for one microbatch."""

    microbatch: int
    to: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class RecvGradient(_Printed):
    """Receive from stage `source` the gradients of the tensors that this stage had sent there for one microbatch."""

    microbatch: int
    source: int
    chunk: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class SumGradients(_Printed):
    """End of the step: sum the gradients that ranks hold parts of (tied weights over stages, partial ones over tp)."""


Compute = Forward | Backward | BackwardInput | BackwardWeight
Send = SendActivation | SendGradient
Recv = RecvActivation | RecvGradient
Transfer = SendActivation | RecvActivation | SendGradient | RecvGradient
Instruction = Compute | Transfer | SumGradients

_CLASSES: dict[str, type[Instruction]] = {cls.__name__: cls for cls in get_args(Instruction)}


def instruction(values: Sequence[Json]) -> Instruction:
    """The instruction that a JSON list such as `["Forward", 0]` stands for. BadArgument says what is wrong with it."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise BadArgument(f'An instruction is a list such as ["Forward", 0]; got {values!r}.')
    name, *numbers = values
    cls = _CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise BadArgument(f"There is no instruction {name!r}. The instructions are {', '.join(_CLASSES)}.")
    names = [field.name for field in fields(cls)]
    needed = len(names) - ("chunk" in names)
    plain = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    if not plain or not needed <= len(numbers) <= len(names):
        takes = f"({', '.join(names)}), integers from 0; chunk may be left out"
        raise BadArgument(f"Cannot read the instruction {list(values)!r}: {name} takes {takes}.")
    return cls(*numbers)  # type: ignore[arg-type]

"""Every error a user can meet, in one place; the public name of this module is `autopar.errors`.

It lives in the lowest package so that all three can raise from it. A message says what, where in the user's source, why,
and which values would work. Each class's docstring is its manual page.
"""

from __future__ import annotations


class AutoparError(Exception):
    """Base class. `what` is the first line; `where`, `why` and `use` follow on their own lines where known."""

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, use: str | None = None) -> None:
        self.what, self.where, self.why, self.use = what, where, why, use
        lines = [what]
        lines += [f"  in {where}"] if where else []
        lines += [f"  because {why}"] if why else []
        lines += [f"  use {use}"] if use else []
        super().__init__("\n".join(lines))


class BadArgument(AutoparError, ValueError):
    """An argument's value cannot be used: a degree of 0, an unknown schedule or hardware name, rows fewer than microbatches."""


class WorldSizeMismatch(BadArgument):
    """The number of ranks that were launched is not tp * pp * dp."""


class TargetNotFound(AutoparError):
    """A command-line target names a file, module or attribute that does not exist or has the wrong form."""


class CaptureError(AutoparError):
    """The model's forward cannot be captured as one graph (data-dependent control flow, a custom autograd.Function, ...)."""


class UnevenShard(AutoparError):
    """A dim that must be split over a mesh axis is not divisible by the axis size."""


class NoLegalSharding(AutoparError):
    """The overrides contradict each other or the op rules: no assignment satisfies them all."""


class TooManyStages(BadArgument):
    """More pipeline stages were asked for than the graph has places to cut."""


class DoesNotFit(AutoparError):
    """A stage needs more memory than the device has, or a plan needs more ranks than this process can hold."""


class BadPlan(AutoparError):
    """A plan file is inconsistent, was edited into something that cannot run, or belongs to another model."""


class BadSchedule(AutoparError):
    """A schedule misses or repeats work, breaks a dependency, deadlocks or exceeds its memory bound."""


class RankFailed(AutoparError, RuntimeError):
    """A rank died or stalled during a step; the message names the rank and the instruction it was in."""


class NonFinite(AutoparError, RuntimeError):
    """A gradient on some rank is infinite or no number, and `clip_grad_norm_` was asked to say so. Every rank raises it."""


class WeightsMissing(AutoparError):
    """A step was asked for while parameters have no values (a model built on the meta device that was not loaded)."""


class DifferentModel(AutoparError):
    """A state dict, checkpoint or plan does not have the names or shapes of this model."""

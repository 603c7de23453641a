"""What several ranks of one process hold alike is there once: replicas' parameters, whole ones of tensor-parallel ranks, tied ones.

Design note. Each rank keeps a parameter of its own, whose `.grad` its backward adds to, over one memory; they share a version counter too.
One of them, the first, is handed out: an optimizer updates it and so all, and an optimizer that looks at all parameters together (LBFGS,
whatever takes a norm of its own) sees each once, as on one device. Once a step has summed gradients only the first's is kept; after one
that accumulates the others hold parts, which go when the first's is taken away. ZeRO shares out parameters in another way
(`runtime/parameter_shards.py`), to element-wise optimizers alone, and is left alone here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from autopar.plan import Plan
from autopar.runtime.held_gradients import HeldGradients
from autopar.state import split_axis, stage_of_parameter

Parameters = dict[str, nn.Parameter]
_Place = tuple[int, str]  # (rank, name)


def counts_here(plan: Plan, coords: Mapping[str, int], name: str, stage: int) -> bool:
    """True if this rank's piece is the one to count of all copies: one replica's (with ZeRO each one's part), one copy of a whole tensor,
    the first stage's of a tied one. `stage`: that first stage.
    """
    first = plan.stages[stage]
    if plan.stage_ranks[first.index] != coords["pp"] or (coords.get("dp", 0) != 0 and not plan.zero):
        return False
    return split_axis(first.parameters[name], plan) is not None or coords.get("tp", 0) == 0


class SharedCopies:
    """The copies among the parameters of all ranks, `parameters_of` by rank, which are made to share memory."""

    def __init__(self, plan: Plan, parameters_of: Sequence[Parameters]) -> None:
        self._parameters_of = parameters_of
        self._copies = [] if plan.zero else self._find(plan)
        self._found = {copy for _, copy in self._copies}
        self._left: list[tuple[int, int] | None] = [None] * len(self._copies)  # the first's gradient of each, after a step
        self.share()

    def _find(self, plan: Plan) -> list[tuple[_Place, _Place]]:
        """(first, copy) of each copy."""
        same: dict[tuple[str, int | None], list[_Place]] = {}
        stages = stage_of_parameter(plan)
        for rank, parameters in enumerate(self._parameters_of):
            coords, placed = plan.coords(rank), plan.rank_state(rank)[0]
            for name in parameters:
                split = split_axis(placed[name], plan)
                place = same.setdefault((name, None if split is None else coords[split[0]]), [])
                place.insert(0 if counts_here(plan, coords, name, stages[name]) else len(place), (rank, name))
        return [(place[0], each) for place in same.values() for each in place[1:]]

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for (first_rank, name), (rank, _) in self._copies:
            yield self._parameters_of[first_rank][name], self._parameters_of[rank][name]

    def share(self, made: str | None = None) -> None:
        """After parameters (None: all) were made: copies are new ones, over the first's memory."""
        for (first_rank, name), (rank, _) in self._copies:
            first = self._parameters_of[first_rank][name]
            if made in (None, name) and not _share(first, self._parameters_of[rank][name]):
                self._parameters_of[rank][name] = nn.Parameter(first.detach(), requires_grad=first.requires_grad)

    def is_first(self, rank: int, name: str) -> bool:
        """True if a rank's parameter is the one of its copies to hand out."""
        return (rank, name) not in self._found

    def follow(self) -> None:
        """Copies have what was put in place of the first's memory (`p.data = ...`)."""
        for first, copy in self._pairs():
            if not _share(first, copy):
                copy.data = first.data

    @contextmanager
    def step(self, held: Sequence[HeldGradients]) -> Iterator[None]:
        """Around a step of all ranks, which have the gradients `held`."""
        self.follow()
        for (first, copy), left in zip(self._pairs(), self._left, strict=True):
            if first.grad is None:
                copy.grad = None
            elif copy.grad is not None and _state(first.grad) != left and not first.grad.any():
                copy.grad.zero_()  # as the first's was: a part that is 0 by itself has not been changed since
        try:
            yield
        finally:
            unsummed = any(each.unsummed for each in held)
            for index, (first, copy) in enumerate(self._pairs()):
                if not unsummed:
                    copy.grad = None
                self._left[index] = _state(first.grad)


def _state(gradient: torch.Tensor | None) -> tuple[int, int] | None:
    """What is another after a change in place or by another tensor."""
    return None if gradient is None else (gradient.data_ptr(), gradient._version)


def _share(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.device == other.device

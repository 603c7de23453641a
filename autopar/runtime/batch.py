"""From the batch of a step to the rows of each microbatch, checked against the types in the program.

Rows are dim 0 of every input whose dim 0 is the size `B`; an input without it goes whole to each microbatch.
Microbatches are as equal as can be, the larger first (10 rows in 4 are 3, 3, 2, 2), as torch.tensor_split has it. The
sizes are bound anew for every batch; what follows from them is kept per set of shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopar.program import Program, StageModule
from autopar.runtime.axis import Axis
from costmodel.errors import BadArgument
from passes.ir import TensorType, size_symbol
from passes.loss import SHARE, TOTAL
from passes.placement import parse_type

ROWS = "B"
_KEPT_LAYOUTS = 32


@dataclass(frozen=True)
class Layout:
    """The sizes of each microbatch, and which inputs are split over them."""

    sizes: tuple[dict[str, int], ...]
    split: frozenset[str]
    rows: tuple[int, ...]


class BatchTypes:
    """The inputs a program wants, as `{"idx": "i64[B, T]"}`, for a number of microbatches."""

    def __init__(self, types: Mapping[str, str], num_microbatches: int, axes: tuple[str, ...] = ()) -> None:
        self.texts, self.num_microbatches = dict(types), num_microbatches
        self._types: dict[str, TensorType] = {name: parse_type(text, axes)[0] for name, text in types.items()}
        self._split = frozenset(
            name for name, value in self._types.items() if value.shape and value.shape[0] == size_symbol(ROWS)
        )
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def layout(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        """The sizes of this batch. BadArgument names the input that does not fit."""
        try:
            key = tuple((batch[name].shape, batch[name].dtype) for name in self._types)
        except (KeyError, AttributeError):
            key = ()
        layout = self._layouts.get(key)
        if layout is None or len(batch) != len(self._types):
            layout = self._bind(batch)
            if len(self._layouts) >= _KEPT_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    def _bind(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        known = ", ".join(f"{name}: {text}" for name, text in self.texts.items())
        for name in batch:
            if name not in self._types:
                raise BadArgument(f"The model has no input {name!r}.", use=known)
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in self._types.items():
            tensor = batch.get(name)
            if not isinstance(tensor, torch.Tensor):
                what = "is missing" if tensor is None else f"is a {type(tensor).__name__}, not a tensor"
                raise BadArgument(f"The input {name!r} {what}.", use=known)
            given = f"the input {name!r} is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            if tensor.dtype != value.dtype or tensor.ndim != len(value.shape):
                raise BadArgument(f"{given[0].upper()}{given[1:]}, but the plan is for {self.texts[name]}.")
            for dim, (size, wanted) in enumerate(zip(tensor.shape, value.shape, strict=True)):
                if not isinstance(wanted, int) and wanted.is_Symbol:
                    bound, by = sizes.setdefault(str(wanted), (size, name))
                    if bound != size:
                        raise BadArgument(f"The inputs disagree about {wanted}: it is {bound} in {by!r}, and {given}.")
                elif isinstance(wanted, int) and wanted != size:
                    raise BadArgument(
                        f"{given[0].upper()}{given[1:]}, but the plan is for {self.texts[name]} (dim {dim})."
                    )
        numbers = {size_symbol(name): size for name, (size, _) in sizes.items()}
        for name, value in self._types.items():
            for dim, (size, wanted) in enumerate(zip(batch[name].shape, value.shape, strict=True)):
                if not isinstance(wanted, int) and wanted.subs(numbers) != size:
                    bound_sizes = ", ".join(f"{bound}={number}" for bound, (number, _) in sizes.items())
                    raise BadArgument(
                        f"Dim {dim} of the input {name!r} is {size}, but the plan is for {self.texts[name]}.",
                        why=bound_sizes or f"nothing gives the size {wanted}",
                    )
        plain = {name: size for name, (size, _) in sizes.items()}
        count = self.num_microbatches
        if ROWS not in plain:
            if count > 1:
                raise BadArgument(
                    f"No input has rows to split into {count} microbatches ({known}).", use="microbatches=1"
                )
            return Layout((plain,), frozenset(), (1,))
        num_rows = plain[ROWS]
        if num_rows < count:
            raise BadArgument(
                f"{num_rows} row{'s' if num_rows != 1 else ''} cannot be split into {count} microbatches.",
                use=f"a batch of at least {count} rows, or fewer microbatches",
            )
        each, larger = divmod(num_rows, count)
        rows = tuple(each + (index < larger) for index in range(count))
        return Layout(tuple({**plain, ROWS: size} for size in rows), self._split, rows)

    def over_replicas(self, batch: Mapping[str, torch.Tensor], num_replicas: int) -> list[Mapping[str, torch.Tensor]]:
        """Each replica's rows of a batch of all; inputs without rows whole. BadArgument if a replica gets none."""
        if num_replicas == 1:
            return [batch]
        rows = {batch[name].shape[0] for name in self._split if name in batch and batch[name].ndim}
        if not rows or min(rows) < num_replicas:
            raise BadArgument(
                f"the batch has {f'{min(rows)} rows' if rows else 'no input with rows'} to split over dp = {num_replicas} replicas",
                why="each replica needs data" if rows else f"the model's inputs are {', '.join(self.texts.values())}",
                use="a larger batch, or a smaller dp" if rows else "ranks in processes (torchrun or autopar.launch)",
            )
        pieces = {name: batch[name].tensor_split(num_replicas) for name in self._split if name in batch}
        return [
            {name: pieces[name][replica] if name in pieces else tensor for name, tensor in batch.items()}
            for replica in range(num_replicas)
        ]

    def split(
        self, batch: Mapping[str, torch.Tensor], layout: Layout, names: tuple[str, ...]
    ) -> list[dict[str, torch.Tensor]]:
        """The named inputs of each microbatch."""
        parts: list[dict[str, torch.Tensor]] = [{} for _ in layout.rows]
        for name in names:
            tensor = batch[name]
            if name in layout.split and len(parts) > 1:
                for part, piece in zip(parts, tensor.split(layout.rows), strict=True):
                    part[name] = piece
            else:
                for part in parts:
                    part[name] = tensor
        return parts


class Arguments:
    """The keyword arguments of a stage's forward for each microbatch: its inputs, the sizes, and the shares of the
    loss.
    """

    def __init__(self, program: Program, stage: StageModule, types: BatchTypes, device: torch.device) -> None:
        names = _keyword_names(stage.forward)
        self._types, self._device = types, device
        self._share_places = {
            name: (prefix == TOTAL, int(name.removeprefix(prefix).lstrip("_") or 0))
            for name in names
            for prefix in (SHARE, TOTAL)
            if name.startswith(prefix)
        }
        self._double_terms = {self._share_places[name][1] for name, type_text in stage.SHARES.items() if type_text == "f64[]"}
        self._inputs = tuple(name for name in names if name in program.batch)
        self._sizes = tuple(name for name in names if name not in program.batch and name not in self._share_places)
        self._weights = program.loss_weights if self._share_places else None
        wanted = _keyword_names(self._weights) if self._weights else ()
        self._weight_inputs = tuple(name for name in wanted if name in program.batch)
        of_stage = {"p": stage.p, "device": device}
        self._of_stage = {name: of_stage[name] for name in wanted if name in of_stage}
        self._weight_sizes = tuple(name for name in wanted if name not in program.batch and name not in of_stage)

    def of(
        self, batch: Mapping[str, torch.Tensor], layout: Layout, replicas: Axis | None = None
    ) -> list[dict[str, Any]]:
        """One dict per microbatch. `replicas`: of whose batches together each is a part; None: of this one alone."""
        if self._device.type != "cpu":
            wanted = {*self._inputs, *self._weight_inputs}
            batch = {name: batch[name].to(self._device, non_blocking=True) for name in wanted}
        keywords: list[dict[str, Any]] = list(self._types.split(batch, layout, self._inputs))
        if self._sizes:
            for given, sizes in zip(keywords, layout.sizes, strict=True):
                given.update((name, sizes[name]) for name in self._sizes)
        if self._share_places:
            of_terms = self._shares(batch, layout, replicas)
            for place, given in enumerate(keywords):
                for name, (total, term) in self._share_places.items():
                    shares, whole = of_terms[term]
                    given[name] = whole if total else shares[place]
        return keywords

    @torch.no_grad()
    def _shares(
        self, batch: Mapping[str, torch.Tensor], layout: Layout, replicas: Axis | None
    ) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Per loss term: each microbatch's part of the whole batch's loss, and the whole batch's weight. Weights that are all 0 give
        nan, as a mean over nothing.
        """
        weights: list[tuple[Any, ...]] = [(rows,) for rows in layout.rows]
        if self._weights is not None:
            inputs = self._types.split(batch, layout, self._weight_inputs)
            weights = [
                tuple(self._weights(**given, **self._of_stage, **{name: sizes[name] for name in self._weight_sizes}))
                for given, sizes in zip(inputs, layout.sizes, strict=True)
            ]
        terms: list[list[torch.Tensor] | None] = [
            None
            if any(weight is None for weight in term)  # a sum over rows: each microbatch counts in full
            else [torch.as_tensor(weight, device=self._device) for weight in term]
            for term in zip(*weights, strict=True)
        ]
        totals = [sum(counts[1:], counts[0]) for counts in terms if counts is not None]
        dtypes = [total.dtype for total in totals]
        if replicas is not None and replicas.size > 1 and totals:
            # in f64, where the counts of labels are exact
            totals = list(replicas.all_reduce(torch.stack([total.double() for total in totals])).unbind(0))
        found: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        for term, counts in enumerate(terms):
            if counts is None:
                one = torch.ones((), device=self._device)
                found.append(([one] * len(weights), one))
                continue
            total, dtype = totals.pop(0), dtypes.pop(0)
            double = term in self._double_terms
            parts = [(count.double() if double else count) / total for count in counts]
            if total.dtype == torch.float64 and not double:
                parts = [part.float() for part in parts]
            found.append((parts, total.to(dtype)))
        return found


def _keyword_names(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

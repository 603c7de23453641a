"""From the batch of a step to the rows of each microbatch, checked against the types in the program.

Rows are dim 0 of every input whose dim 0 is the size `B`; an input without it goes whole to each microbatch. Microbatches are as
equal as can be, the larger first (10 rows in 4 are 3, 3, 2, 2), as torch.tensor_split has it. The sizes are bound anew for every
batch; what follows from them is kept per set of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from costmodel.errors import BadArgument
from passes.ir import TensorType, size_symbol
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
            for dim, wanted in enumerate(value.shape):
                if (
                    not isinstance(wanted, int)
                    and not wanted.is_Symbol
                    and wanted.subs(numbers) != batch[name].shape[dim]
                ):
                    raise BadArgument(
                        f"Dim {dim} of the input {name!r} is {batch[name].shape[dim]}, "
                        f"but the plan is for {self.texts[name]} with {', '.join(f'{key}={number}' for key, number in numbers.items())}."
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

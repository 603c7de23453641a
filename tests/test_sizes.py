"""Size expressions: shorter, and the same number for every size that there can be."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

import autopar
from passes.ir import size_symbol
from passes.sizes import simplified

B, T = size_symbol("B"), size_symbol("T")
EXPRESSIONS = {
    1 - Max(0, 1 - T): "1",
    T - 1 + Max(0, 1 - T): "T - 1",
    Min(T, 2**63 - 1): "T",
    Max(0, T) + Max(1, T): "2*T",
    Max(0, B * T - 1): "B*T - 1",
    Max(B * T, T): "B*T",
    Max(0, Min(T, 5)): "Min(5, T)",
    Max(1, FloorDiv(T, 2)): "Max(1, (T//2))",
    Max(0, T - 3): "Max(0, T - 3)",
    Min(B, T): "Min(B, T)",
    FloorDiv(2 * Max(1, T) + 1, 3): "((2*T + 1)//3)",
    sympy.Max(2, 3 - T): "2",
}


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_it_is_shorter_and_the_same_number(expr: sympy.Expr) -> None:
    found = simplified(expr)
    assert str(found) == EXPRESSIONS[expr]
    for rows, tokens in itertools.product((1, 2, 3, 7), (1, 2, 3, 4, 8)):
        numbers = {B: sympy.Integer(rows), T: sympy.Integer(tokens)}
        assert sympy.sympify(found).xreplace(numbers) == expr.xreplace(numbers)


class Bounded(torch.nn.Module):
    """Sizes with bounds that never matter, as libraries spell them: at least one token, padded up to one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        missing = torch.sym_max(0, 1 - idx.shape[1])
        hidden = torch.nn.functional.pad(self.embed(idx), (0, 0, 0, missing))
        return torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), idx.flatten())


def test_no_program_bounds_what_has_no_bounds() -> None:
    report = autopar.verify(Bounded(), {"idx": torch.randint(0, 50, (4, 8))}, tp=2)
    assert report.ok, report
    assert "max(" not in report.plan.source(0).lower(), report.plan.source(0)

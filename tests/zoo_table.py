"""`python tests/zoo_table.py [model ...] [--layouts 2x1,1x4] [--bf16]`: every model of the zoo on every layout
(tp x pp) against the untouched model.

Prints the difference of the loss, the worst relative difference of a gradient or buffer and what it may be, how many
parameters are split over tp, and the ops that stayed whole for want of a rule. Exit status 1 if any differs.

In bf16 the differences are errors against the untouched model in float64, and what they may be follows from what the
untouched model in bf16 errs by (autopar/compare.py); `own` is that model's error on the tensor that is worst.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._pytree import tree_map
from zoo import LAYOUTS, ZOO

import autopar
from autopar.verify import Report


@dataclass(frozen=True)
class Row:
    """One model on one layout."""

    model: str
    tp: int
    pp: int
    report: Report

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        texts = self.report.plan.parameter_notation.values()
        found = [re.match(r"torch\.ops\.(\S+) .*stays whole", note) for note in self.report.plan.notes]
        whole = dict.fromkeys(match[1] for match in found if match)
        split = f"{sum('/tp' in text for text in texts)} of {len(texts)}"
        verdict = "equal" if self.report.ok else "DIFFERENT"
        worst = self.report.worst
        numbers = (self.report.loss_difference, worst.relative, worst.untouched, worst.allowed)
        differences = tuple(f"{number:.1e}" for number in numbers)
        return self.model, str(self.tp), str(self.pp), verdict, *differences, split, ", ".join(whole)


HEADERS = ("model", "tp", "pp", "verdict", "loss", "worst", "own", "allowed", "split", "stayed whole (no rule)")


def measure(name: str, tp: int, pp: int, dtype: torch.dtype = torch.float32) -> Row:
    """Verify one model on one layout."""
    torch.manual_seed(0)
    example = ZOO[name]()
    model = example.model.to(dtype)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    inputs = tree_map(cast, example.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = autopar.verify(model, inputs, tp=tp, pp=pp, loss_fn=example.loss_fn)
    return Row(name, tp, pp, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(ZOO), metavar="model")
    parser.add_argument("--layouts", default=",".join(f"{tp}x{pp}" for tp, pp in LAYOUTS), help="tp x pp, as 2x1,1x4")
    parser.add_argument("--bf16", action="store_true", help="parameters and inputs in bfloat16")
    options = parser.parse_args()
    layouts = [tuple(map(int, text.split("x"))) for text in options.layouts.split(",")]
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    rows = [measure(name, tp, pp, dtype) for name in options.models for tp, pp in layouts]
    print(tabulate([row.cells() for row in rows], headers=HEADERS, disable_numparse=True))
    return 0 if all(row.report.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

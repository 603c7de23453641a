"""Fits the constants of hardware profiles to published step times: `python tests/benchmarks/fit_published.py [FILE] [--leave-out SUITE]`.

What is fitted is CONSTANTS: few, each with a meaning and the range that it was seen or can be in; one value for all records on a kind of
device or fabric. Where from: the profiles as they are. The loss of a kind of device is a norm over its suites of mean |log(predicted /
measured)| / ASKED: absolute, so that single odd rows do not bend the fit, and of power POWER, so that no suite is bought with another.
Predictions are taken for log-linear in the constants' logarithms around a point (a finite difference each), the loss of the linear model
is minimised by a pattern search, and both are done again around the point found. Prints each constant, and each suite's error with them.

`--leave-out SUITE` fits without a suite and then prints its error: that of a prediction for measurements that nobody has fitted to. A
device without any other suite takes the efficiencies fitted to the devices that have: what a device new to the planner gets.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from published import HERE, Predictor, Record, layout_of, records_of

from costmodel.hardware import Hardware

POWER = 6
STEP = 0.05  # of a constant's logarithm, for differences
ROUNDS = 2
# Errors that are asked for, by suite; others get EACH.
ASKED = {
    "megatron_sc21_t1": 0.08, "korthikanti_t5": 0.05, "vtrain_multi": 0.10, "llm_foundry_a100": 0.08, "zero_bubble_t4": 0.07,
    "bigscience_a100": 0.10, "bigscience_v100": 0.10, "torchtitan_202412": 0.08, "dgxc_h100": 0.05,
}  # fmt: skip
EACH = 0.08


@dataclass(frozen=True)
class Constant:
    """A field of a profile (dotted for parts), of profiles whose name starts with `profiles`, in the range it may be in."""

    profiles: str
    field: str
    low: float
    high: float

    def of(self, profile: Hardware) -> float:
        found: Any = profile
        for name in self.field.split("."):
            found = found[name] if isinstance(found, Mapping) else getattr(found, name)
        return float(found)

    def applies(self, profile: Hardware) -> bool:
        return profile.name.startswith(self.profiles) or (self.profiles.startswith("-") and profile.name.endswith(self.profiles))

    def changed(self, profile: Hardware, value: float) -> Hardware:
        return _changed(profile, self.field.split("."), value) if self.applies(profile) else profile


def _changed(part: Any, names: Sequence[str], value: float) -> Any:
    if not names:
        return value
    if isinstance(part, Mapping):
        return {**part, names[0]: _changed(part[names[0]], names[1:], value)}
    return replace(part, **{names[0]: _changed(getattr(part, names[0]), names[1:], value)})


# Ranges: of efficiencies, from what whole steps could lose to what kernels alone reach; of links, from a third of the ports' rate to it.
CONSTANTS = (
    Constant("a100", "matmul_efficiency", 0.65, 0.87),
    Constant("a100", "memory_efficiency", 0.65, 0.92),
    Constant("a100", "kernels.attention_forward_efficiency", 0.3, 0.7),
    Constant("a100", "kernels.attention_backward_efficiency", 0.2, 0.6),
    Constant("-omnipath", "across.bandwidth_bytes_per_second", 2e9, 1.15e10),
    Constant("v100", "matmul_efficiency", 0.6, 0.8),
    Constant("v100", "memory_efficiency", 0.65, 0.92),
    Constant("a100-80gb-omnipath", "inside.bandwidth_bytes_per_second", 5e10, 2.35e11),
    Constant("v100-32gb-omnipath", "inside.bandwidth_bytes_per_second", 3e9, 1.2e11),
    Constant("h100-sxm", "matmul_efficiency", 0.55, 0.8),
    Constant("h100-sxm", "memory_efficiency", 0.65, 0.92),
    Constant("h100-sxm", "kernels.dtype_efficiency.fp8", 0.4, 0.75),
    Constant("h100-sxm", "kernels.attention_forward_efficiency", 0.3, 0.75),
    Constant("h100-sxm", "kernels.attention_backward_efficiency", 0.3, 0.65),
    Constant("h100-96gb", "matmul_efficiency", 0.45, 0.8),
    Constant("h100-96gb", "memory_efficiency", 0.65, 0.92),
    Constant("h100-96gb", "kernels.dtype_efficiency.fp8", 0.35, 0.75),
    Constant("h100-96gb", "kernels.attention_forward_efficiency", 0.2, 0.6),
    Constant("h100-96gb", "kernels.attention_backward_efficiency", 0.15, 0.5),
)


class Fit:
    """Records with their evaluators; step times for any values of the constants."""

    def __init__(self, records: Sequence[Record], predictor: Predictor) -> None:
        self.records = list(records)
        self._found = [predictor.evaluator(record) for record in self.records]
        self._layouts = [layout_of(record, found.folded) for record, found in zip(self.records, self._found, strict=True)]
        self.profiles = {found.hardware.name: found.hardware for found in self._found}
        self.constants = [one for one in CONSTANTS if any(map(one.applies, self.profiles.values()))]

    def start(self) -> list[float]:
        """Logarithms of the constants in the profiles as they are."""
        return [
            math.log(next(one.of(profile) for profile in self.profiles.values() if one.applies(profile))) for one in self.constants
        ]

    def logs(self, point: Sequence[float]) -> list[float]:
        """log(predicted / measured) of every record."""
        changed = dict(self.profiles)
        for one, value in zip(self.constants, point, strict=True):
            for name, profile in changed.items():
                changed[name] = one.changed(profile, math.exp(value))
        there: dict[int, Any] = {}
        found = []
        for record, evaluator, layout in zip(self.records, self._found, self._layouts, strict=True):
            if id(evaluator) not in there:
                there[id(evaluator)] = evaluator.on(changed[evaluator.hardware.name])
            found.append(math.log(there[id(evaluator)].predict(layout, exact=True).step_seconds / record["step_time_s"]))
        return found

    def fitted(self, point: Sequence[float]) -> list[float]:
        """The constants with the least loss that a linear model finds from `point` on, rounds of it."""
        bounds = [(math.log(one.low), math.log(one.high)) for one in self.constants]
        here = [min(max(value, low), high) for value, (low, high) in zip(point, bounds, strict=True)]
        for _ in range(ROUNDS):
            base = self.logs(here)
            slopes = []
            for index, (_, high) in enumerate(bounds):
                step = STEP if here[index] + STEP <= high else -STEP
                moved = self.logs([value + step * (k == index) for k, value in enumerate(here)])
                slopes.append([(one - other) / step for one, other in zip(moved, base, strict=True)])

            here = _searched(partial(self._linear, here, base, slopes), here, bounds)
        return here

    def _linear(
        self, here: Sequence[float], base: Sequence[float], slopes: Sequence[Sequence[float]], point: Sequence[float]
    ) -> float:
        """The loss at a point, by the differences found around `here`."""
        away = [one - other for one, other in zip(point, here, strict=True)]
        return self.loss([
            value + sum(slope[k] * distance for slope, distance in zip(slopes, away, strict=True)) for k, value in enumerate(base)
        ])

    def loss(self, logs: Sequence[float]) -> float:
        errors = self.errors(logs)
        return float(sum((errors[suite] / ASKED.get(suite, EACH)) ** POWER for suite in errors) ** (1 / POWER))

    def errors(self, logs: Sequence[float]) -> dict[str, float]:
        """By suite: the mean of |predicted / measured - 1|."""
        rows: dict[str, list[float]] = {}
        for record, value in zip(self.records, logs, strict=True):
            rows.setdefault(record["suite"], []).append(abs(math.expm1(value)))
        return {suite: statistics.fmean(each) for suite, each in rows.items()}


def _searched(loss: Callable[[Sequence[float]], float], start: Sequence[float], bounds: Sequence[tuple[float, float]]) -> list[float]:
    """A pattern search with random directions besides the axes: the loss has edges, where a gradient says nothing."""
    chance = random.Random(0)
    best, least, reach, missed = list(start), loss(start), 0.1, 0
    while reach > 1e-3:
        if chance.random() < 0.5:
            moved = [value + chance.gauss(0, reach) for value in best]
        else:
            index = chance.randrange(len(best))
            moved = [value + (k == index) * chance.choice((-reach, reach)) for k, value in enumerate(best)]
        moved = [min(max(value, low), high) for value, (low, high) in zip(moved, bounds, strict=True)]
        value = loss(moved)
        best, least, missed = (moved, value, 0) if value < least else (best, least, missed + 1)
        if missed > 10 * len(best):
            reach, missed = reach / 2, 0
    return best


def families(records: Sequence[Record], predictor: Predictor) -> dict[str, list[Record]]:
    """Records by kind of device: they share constants."""
    found: dict[str, list[Record]] = {}
    for record in records:
        name = predictor.evaluator(record).hardware.name
        found.setdefault(next((one.profiles for one in CONSTANTS if name.startswith(one.profiles)), name), []).append(record)
    return found


def borrowed(fit: Fit, others: Mapping[str, Sequence[tuple[Constant, float]]]) -> list[float]:
    """Of a device without records: the mean of each constant over the devices that have it; else as it is in the profile."""
    point = fit.start()
    for index, one in enumerate(fit.constants):
        values = [value for pairs in others.values() for other, value in pairs if other.field == one.field]
        if values:
            point[index] = statistics.fmean(values)
    return point


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "published.csv")
    parser.add_argument("--leave-out", metavar="SUITE", action="append", default=[], help="fit without it, then predict it; again for more")
    parser.add_argument("--device", help="only devices whose name starts so")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autopar-published", help="folder of folded graphs")
    options = parser.parse_args(argv)
    predictor = Predictor(options.cache)
    records = [record for record in records_of(options.file) if record.get("step_time_s")]
    kept = families([record for record in records if record["suite"] not in options.leave_out], predictor)
    found: dict[str, list[tuple[Constant, float]]] = {}
    for family, rows in kept.items():
        if options.device and not family.startswith(options.device):
            continue
        fit = Fit(rows, predictor)
        point = fit.fitted(fit.start())
        found[family] = list(zip(fit.constants, point, strict=True))
        for one, value in found[family]:
            print(f"{one.profiles:10} {one.field:42} {math.exp(value):.4g}")
        for suite, error in fit.errors(fit.logs(point)).items():
            print(f"{family:10} {suite:42} {error:.1%} of {ASKED.get(suite, EACH):.0%}", flush=True)
    for family, rows in families([record for record in records if record["suite"] in options.leave_out], predictor).items():
        fit = Fit(rows, predictor)
        known = {(one.profiles, one.field): value for pairs in found.values() for one, value in pairs}
        point = [
            known.get((one.profiles, one.field), value)
            for one, value in zip(fit.constants, fit.start() if family in found else borrowed(fit, found), strict=True)
        ]
        for suite, error in fit.errors(fit.logs(point)).items():
            print(f"held out: {family} {suite} {error:.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

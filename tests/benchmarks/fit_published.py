"""Fits the constants of hardware profiles to published step times: `python tests/benchmarks/fit_published.py [FILE]`.

What is fitted is CONSTANTS: few, each with a meaning and the range that it was seen or can be in; one value for all records on a kind of
device or fabric. Where from: the profiles as they are. The loss of a kind of device is a norm over its suites of mean |predicted /
measured - 1| / ASKED: absolute, so that single odd rows do not bend the fit, and of power POWER, so that no suite is bought with another.
Predictions are taken for log-linear in the constants' logarithms around the profiles (a finite difference each), and the loss of the linear
model is minimised by a pattern search. Prints each constant and each suite's error with them: "as is", fitted, and held out.

Held out is what the suite's error is with constants fitted to the others on its kind of device: a prediction for measurements that nobody
fitted to. A device with no other suite takes each efficiency as the mean of those fitted to the other kinds: what a device new to the
planner gets. A link that only this suite used keeps its present value; it is fitted to the suite, and the figure says so by "link kept".
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
from pathlib import Path
from typing import Any

from published import HERE, Predictor, Record, layout_of, records_of

from costmodel.hardware import Hardware

POWER = 6
STEP = 0.05  # of a constant's logarithm, for differences
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
        self.bounds = [(math.log(one.low), math.log(one.high)) for one in self.constants]

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

    def around(self, point: Sequence[float]) -> Linear:
        """The linear model around a point."""
        here = [min(max(value, low), high) for value, (low, high) in zip(point, self.bounds, strict=True)]
        base, slopes = self.logs(here), []
        for index, (_, high) in enumerate(self.bounds):
            step = STEP if here[index] + STEP <= high else -STEP
            moved = self.logs([value + step * (k == index) for k, value in enumerate(here)])
            slopes.append([(one - other) / step for one, other in zip(moved, base, strict=True)])
        return Linear(self, here, base, slopes)

    def errors(self, logs: Sequence[float]) -> dict[str, float]:
        """By suite: the mean of |predicted / measured - 1|."""
        rows: dict[str, list[float]] = {}
        for record, value in zip(self.records, logs, strict=True):
            rows.setdefault(record["suite"], []).append(abs(math.expm1(value)))
        return {suite: statistics.fmean(each) for suite, each in rows.items()}


@dataclass(frozen=True)
class Linear:
    """log(predicted / measured) of a fit's records as linear in the constants' logarithms."""

    fit: Fit
    here: Sequence[float]
    base: Sequence[float]
    slopes: Sequence[Sequence[float]]  # by constant

    def errors(self, point: Sequence[float]) -> dict[str, float]:
        """By suite."""
        away = [one - other for one, other in zip(point, self.here, strict=True)]
        return self.fit.errors([
            value + sum(slope[k] * distance for slope, distance in zip(self.slopes, away, strict=True))
            for k, value in enumerate(self.base)
        ])

    def fitted(self, without: str | None = None) -> list[float]:
        """The point of the least loss over all suites but one. Constants that no other suite depends on stay where they are."""
        used = [k for k, record in enumerate(self.fit.records) if record["suite"] != without]
        bounds = [
            pair if any(slope[k] for k in used) else (value, value)
            for pair, slope, value in zip(self.fit.bounds, self.slopes, self.here, strict=True)
        ]

        def loss(point: Sequence[float]) -> float:
            errors = self.errors(point)
            return sum((each / ASKED.get(suite, EACH)) ** POWER for suite, each in errors.items() if suite != without)

        return _searched(loss, self.here, bounds)


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


def borrowed(fit: Fit, others: Sequence[tuple[Constant, float]]) -> list[float]:
    """Of a device without other suites: the mean of each efficiency over the devices that have it; else as it is in the profile."""
    point = fit.start()
    for index, one in enumerate(fit.constants):
        values = [value for other, value in others if other.field == one.field and "efficiency" in one.field]
        if values:
            point[index] = statistics.fmean(values)
    return point


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "published.csv")
    parser.add_argument("--leave-out", metavar="SUITE", help="hold out only this suite, not each in turn")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autopar-published", help="folder of folded graphs")
    options = parser.parse_args(argv)
    predictor = Predictor(options.cache)
    records = [record for record in records_of(options.file) if record.get("step_time_s")]
    models = {}
    found: dict[str, list[tuple[Constant, float]]] = {}
    for family, rows in families(records, predictor).items():
        fit = Fit(rows, predictor)
        models[family] = linear = fit.around(fit.start())
        found[family] = list(zip(fit.constants, linear.fitted(), strict=True))
        for (one, value), now in zip(found[family], linear.here, strict=True):
            print(f"{one.profiles:19} {one.field:44} {math.exp(value):.4g} (now {math.exp(now):.4g})", flush=True)
    print(f"{'suite':20} asked  as is  fitted  held out")
    for family, linear in models.items():
        as_is, fitted = linear.errors(linear.here), linear.errors([value for _, value in found[family]])
        for suite in as_is:
            if options.leave_out in (None, suite):
                text = _held_out(linear, suite, [pair for other, pairs in found.items() if other != family for pair in pairs])
                print(f"{suite:20} {ASKED.get(suite, EACH):5.1%} {as_is[suite]:6.1%} {fitted[suite]:7.1%} {text}", flush=True)
    return 0


def _held_out(linear: Linear, suite: str, others: Sequence[tuple[Constant, float]]) -> str:
    if len(linear.errors(linear.here)) == 1:
        point = borrowed(linear.fit, others)
        kept = ", link kept" if any("bandwidth" in one.field for one in linear.fit.constants) else ""
        return f"{linear.fit.errors(linear.fit.logs(point))[suite]:8.1%} (other devices' efficiencies{kept})"
    return f"{linear.errors(linear.fitted(without=suite))[suite]:8.1%}"


if __name__ == "__main__":
    sys.exit(main())

"""What a hardware profile is: one device, its links, and how its kernels fill it, with the check that every number is possible.

`peak_flops` are dense datasheet rates by dtype; what the best matmul reaches of them is `matmul_efficiency`, what a streaming kernel
reaches of the memory bandwidth is `memory_efficiency`. Links carry what collectives were seen to reach, per direction and rank, not the
figure on the datasheet, because ring time is linear in it. How kernels of a given shape fall short of the best one is `Kernels`; a
profile without it (the default) has no tiles and no waves. float32 matmuls on the NVIDIA profiles run at the "f32" rate, not "tf32":
torch's default is `torch.backends.cuda.matmul.allow_tf32 = False`; price with dtype "tf32" for a job that turns it on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from costmodel.errors import BadArgument

DTYPES = ("f32", "tf32", "bf16", "f16", "fp8", "f64")
BASES = ("datasheet", "calibrated", "measured")
DEVICE_TYPES = ("cuda", "cpu")
# Relative error of a step time by basis, one standard deviation, of published step times held out of the fit of the constants
# (tests/benchmarks/fit_published.py). "calibrated": the six A100 suites, each predicted with constants fitted to the others: mean absolute
# errors of 4.7 to 9.6%, and the odd row up to a factor of 2. "datasheet": three suites on devices that have no other, with the mean of
# other devices' efficiencies: 3.5, 19 and 34%, the last on an H100 held to 500 W. Nothing is known of profiles said to be measured.
UNCERTAINTY: dict[str, float] = {"datasheet": 0.22, "calibrated": 0.12}

# What a number may be before it is taken for a mistake (a unit slip, mostly): far wider than any device there is or
# will soon be.
LIMITS: dict[str, tuple[float, float]] = {
    "peak_flops": (1e8, 1e18),
    "memory_bytes": (2**20, 2**50),
    "memory_bandwidth_bytes_per_second": (1e7, 1e15),
    "launch_seconds": (0.0, 0.1),
    "matmul_efficiency": (0.001, 1.0),
    "memory_efficiency": (0.001, 1.0),
    "latency_seconds": (0.0, 1.0),
    "bandwidth_bytes_per_second": (1e5, 1e14),
    "devices_per_node": (1, 100_000),
    "shared_rate": (0.001, 1.0),
    "sharing_ranks": (1, 100_000),
    "multiprocessors": (1, 100_000),
    "dtype_efficiency": (0.001, 1.0),
    "fill_k": (0.0, 1e5),
    "misaligned_efficiency": (0.001, 1.0),
    "misaligned_batched_efficiency": (0.001, 1.0),
    "attention_fill": (0.0, 1e5),
    "attention_forward_efficiency": (0.001, 1.0),
    "attention_backward_efficiency": (0.001, 1.0),
    "overlap_slowdown": (1.0, 10.0),
}
COUNTS = ("devices_per_node", "sharing_ranks", "multiprocessors")


def _check_number(value: Any, name: str, owner: str) -> None:
    low, high = LIMITS[name.split("[")[0].rsplit(".", 1)[-1]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadArgument(
            f"{name} of {owner} is {value!r}", why="it is not a number", use=f"a number from {low:g} to {high:g}"
        )
    if not low <= value <= high:
        raise BadArgument(
            f"{name} of {owner} is {value:g}", why="no device is like that", use=f"a number from {low:g} to {high:g}"
        )


def _check_count(value: Any, name: str, owner: str) -> None:
    _check_number(value, name, owner)
    if not isinstance(value, int):
        raise BadArgument(f"{name} of {owner} is {value:g}", why="it counts something", use="a whole number")


def _check_rates(rates: Any, name: str, owner: str) -> None:
    """Numbers by dtype."""
    if not isinstance(rates, Mapping):
        raise BadArgument(f"{name} of {owner} is {rates!r}", use='an object such as {"bf16": ...}')
    for dtype, value in rates.items():
        if dtype not in DTYPES:
            raise BadArgument(f"{name} of {owner} has an unknown dtype {dtype!r}", use=", ".join(DTYPES))
        _check_number(value, f"{name}[{dtype}]", owner)


@dataclass(frozen=True)
class Link:
    """One rank's link to the next: seconds before the first byte arrives, and bytes per second in one direction after
    that.
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True)
class AxisLink:
    """The links that the ranks of one mesh axis use: `ranks_per_node` of them share a node, over `inside`; the axis spans `num_nodes`
    nodes, over `across` (the network share of one device, all devices of a node sending at once).
    """

    inside: Link
    across: Link
    ranks_per_node: int
    num_nodes: int

    @property
    def latency_seconds(self) -> float:
        """Of the slowest hop."""
        return self.inside.latency_seconds if self.num_nodes == 1 else self.across.latency_seconds

    @property
    def bandwidth_bytes_per_second(self) -> float:
        """Of a ring through all ranks: a node's ranks use all of their network shares for the one ring that passes through it."""
        if self.num_nodes == 1:
            return self.inside.bandwidth_bytes_per_second
        shares = self.ranks_per_node * self.across.bandwidth_bytes_per_second
        return min(shares, self.inside.bandwidth_bytes_per_second) if self.ranks_per_node > 1 else shares


@dataclass(frozen=True)
class Kernels:
    """How a device's kernels fill it; the defaults say that any shape runs like the best one.

    `multiprocessors`: output tiles computed at once (a wave). `fill_k`: steps of the contracted dim that filling and draining a tile's
    pipeline cost. `dtype_efficiency`: matmul efficiency where a dtype differs from `matmul_efficiency`.
    `misaligned_efficiency`, `misaligned_batched_efficiency`: what is left of the rate where 16 bytes do not divide the rows of an operand.
    `attention_forward_efficiency`, `attention_backward_efficiency`: of fused attention, of the peak (None: as a matmul);
    `attention_fill`: keys (queries in backward) whose time a block's start and end take.
    `overlap_slowdown`: how much longer compute takes while a collective runs beside it.
    """

    multiprocessors: int = 1
    fill_k: float = 0.0
    dtype_efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    misaligned_efficiency: float = 1.0
    misaligned_batched_efficiency: float = 1.0
    attention_fill: float = 0.0
    attention_forward_efficiency: float | None = None
    attention_backward_efficiency: float | None = None
    overlap_slowdown: float = 1.0

    def check(self, owner: str) -> None:
        """BadArgument if a number is beyond anything a device could be."""
        _check_rates(self.dtype_efficiency, "kernels.dtype_efficiency", owner)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "dtype_efficiency" and not (value is None and item.default is None):
                check = _check_count if item.name in COUNTS else _check_number
                check(value, f"kernels.{item.name}", owner)


def basis_text(basis: str, uncertainty: float | None) -> str:
    """What a prediction rests on, in words: `predicted from a calibrated profile, +-12%`."""
    return f"predicted from a {basis} profile" + (f", +-{uncertainty:.0%}" if uncertainty is not None else "")


@dataclass(frozen=True)
class Hardware:
    """A device in its node. `inside` links devices of one node, `across` links nodes (the share of one device).

    `basis`: where the efficiencies come from: "datasheet" (estimates beside datasheet numbers), "calibrated" (fitted to measured steps or
    to this machine). BadArgument if a number is missing, not a number, or beyond anything a device could be.
    """

    name: str
    peak_flops: Mapping[str, float] = field(hash=False)  # by dtype (a name in DTYPES): dense FLOPs per second
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    launch_seconds: float  # what each kernel costs besides its work
    matmul_efficiency: float  # reached / peak FLOPs of the best matmul
    memory_efficiency: float  # reached / peak bytes per second of a streaming kernel
    inside: Link
    across: Link
    devices_per_node: int
    kernels: Kernels = field(default_factory=Kernels)
    shared_rate: float = 1.0  # what a rank keeps of its rates while `sharing_ranks` of a node compute: ranks of a CPU share its cores
    sharing_ranks: int = 1
    basis: str = "datasheet"
    device_type: str = "cuda"  # torch's word, of DEVICE_TYPES: a driver and a caching allocator hold memory of their own on "cuda"
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)  # field name -> where its number comes from

    @property
    def uncertainty(self) -> float | None:
        """The relative error to expect of a step time predicted from this profile, one standard deviation; None if nothing is known."""
        return UNCERTAINTY.get(self.basis)

    def __post_init__(self) -> None:
        owner = f"hardware {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise BadArgument(f"a hardware profile's name is {self.name!r}", use="a non-empty string")
        if not isinstance(self.peak_flops, Mapping) or "f32" not in self.peak_flops:
            raise BadArgument(
                f"peak_flops of {owner} has no f32", why="f32 is torch's default dtype", use='{"f32": ..., "bf16": ...}'
            )
        _check_rates(self.peak_flops, "peak_flops", owner)
        for item in fields(self):
            if item.name in LIMITS and item.name != "peak_flops":
                check = _check_count if item.name in COUNTS else _check_number
                check(getattr(self, item.name), item.name, owner)
        for side, link in (("inside", self.inside), ("across", self.across)):
            if not isinstance(link, Link):
                raise BadArgument(
                    f"{side} of {owner} is {link!r}", use="a Link(latency_seconds, bandwidth_bytes_per_second)"
                )
            _check_number(link.latency_seconds, f"{side}.latency_seconds", owner)
            _check_number(link.bandwidth_bytes_per_second, f"{side}.bandwidth_bytes_per_second", owner)
        if not isinstance(self.kernels, Kernels):
            raise BadArgument(f"kernels of {owner} is {self.kernels!r}", use="a Kernels(...), or leave it out")
        self.kernels.check(owner)
        if self.basis not in BASES:
            raise BadArgument(f"basis of {owner} is {self.basis!r}", use="one of " + ", ".join(BASES))
        if self.device_type not in DEVICE_TYPES:
            raise BadArgument(f"device_type of {owner} is {self.device_type!r}", use="one of " + ", ".join(DEVICE_TYPES))

    def link(self, num_devices: int) -> Link:
        """The slowest link of a mesh axis that spans `num_devices` neighbouring devices: across nodes once it outgrows
        one node.
        """
        return self.inside if num_devices <= self.devices_per_node else self.across

    def axis_link(self, axis_size: int, stride: int = 1) -> AxisLink:
        """The links of a mesh axis of `axis_size` ranks that are `stride` ranks apart (the sizes of all faster axes multiplied).

        Ranks lie in nodes in order, `devices_per_node` a node. An axis that does not divide evenly over nodes is taken for one that
        does, with as many ranks a node as fit.
        """
        together = max(1, min(axis_size, self.devices_per_node // stride))
        return AxisLink(self.inside, self.across, together, -(-axis_size // together))

    def on_nodes(self, num_ranks: int, num_nodes: int | None) -> Hardware:
        """The profile with `num_ranks` devices spread evenly over `num_nodes` nodes, and named so; the profile itself for None. BadArgument
        if they cannot be.
        """
        if num_nodes is None:
            return self
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1 or num_ranks % num_nodes:
            raise BadArgument(
                f"{num_ranks} ranks cannot be spread evenly over {num_nodes!r} nodes", use=f"a divisor of {num_ranks}"
            )
        name = f"{self.name} on {num_nodes} node{'s' if num_nodes > 1 else ''}"
        return replace(self, name=name, devices_per_node=num_ranks // num_nodes)

    def for_ranks(self, num_ranks: int) -> Hardware:
        """The profile of one of `num_ranks` that compute at the same time, as many in a node as it has devices: its rates where they share
        what they compute with. From one rank to `sharing_ranks` the share falls linearly to `shared_rate`, beyond it what those reach
        together is dealt out.
        """
        together, most = min(num_ranks, self.devices_per_node), self.sharing_ranks
        if self.shared_rate == 1.0 or together == 1 or most == 1:
            return self
        share = 1 - (1 - self.shared_rate) * (together - 1) / (most - 1) if together <= most else self.shared_rate * most / together
        return replace(
            self,
            peak_flops={dtype: rate * share for dtype, rate in self.peak_flops.items()},
            memory_bandwidth_bytes_per_second=self.memory_bandwidth_bytes_per_second * share,
            launch_seconds=self.launch_seconds / share,
            shared_rate=1.0,
        )

    def to_json(self) -> str:
        """The profile as JSON text that `from_json` reads back; keys sorted, so one profile is always the same text."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("peak_flops", "sources"):
            values[name] = dict(values[name])
        for name in ("inside", "across", "kernels"):
            values[name] = {item.name: getattr(values[name], item.name) for item in fields(values[name])}
        values["kernels"]["dtype_efficiency"] = dict(self.kernels.dtype_efficiency)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """The profile that `to_json` wrote, or a user's own; the fields of Hardware that have a default may be left out. BadArgument
        naming the field that is missing, unknown or absurd.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadArgument("the hardware profile is not JSON", why=str(error)) from None
        _check_keys(values, cls, "the hardware profile", optional=OPTIONAL)
        for side in ("inside", "across"):
            _check_keys(values[side], Link, f"{side} of the hardware profile")
            values[side] = Link(**values[side])
        if "kernels" in values:
            optional = tuple(item.name for item in fields(Kernels))
            _check_keys(values["kernels"], Kernels, "kernels of the hardware profile", optional)
            values["kernels"] = Kernels(**values["kernels"])
        if not isinstance(values.get("sources", {}), Mapping):
            raise BadArgument(
                "sources of the hardware profile is not an object",
                use='{"memory_bytes": "where the number is from", ...}',
            )
        return cls(**values)


OPTIONAL = tuple(item.name for item in fields(Hardware) if item.default is not MISSING or item.default_factory is not MISSING)


def _check_keys(values: Any, kind: type, owner: str, optional: tuple[str, ...] = ()) -> None:
    names = [item.name for item in fields(kind)]
    if not isinstance(values, dict):
        raise BadArgument(f"{owner} is not a JSON object", use="an object with the keys " + ", ".join(names))
    if missing := [name for name in names if name not in values and name not in optional]:
        raise BadArgument(f"{owner} has no {', '.join(missing)}", use="an object with the keys " + ", ".join(names))
    if unknown := [name for name in values if name not in names]:
        raise BadArgument(f"{owner} has unknown keys {', '.join(unknown)}", use="only the keys " + ", ".join(names))

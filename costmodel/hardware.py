"""Hardware profiles: what one device and its links can do, each number with its source.

`peak_flops` are dense datasheet rates by dtype; what a large matmul reaches of them is `matmul_efficiency`, what a
streaming kernel reaches of the memory bandwidth is `memory_efficiency`. Links carry what collectives were seen to
reach, per direction and rank, not the figure on the datasheet, because ring time is linear in it. float32 matmuls on
the NVIDIA profiles run at the "f32" rate, not "tf32": torch's default is `torch.backends.cuda.matmul.allow_tf32 =
False`; price with dtype "tf32" for a job that turns it on.

Add a profile as a row of HARDWARE with a source for every number, or pass a `Hardware` (say `Hardware.from_json(text)`)
wherever a name goes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from costmodel.errors import BadArgument

DTYPES = ("f32", "tf32", "bf16", "f16", "fp8", "f64")

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
}


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


@dataclass(frozen=True)
class Link:
    """One rank's link to the next: seconds before the first byte arrives, and bytes per second in one direction after
    that.
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True)
class Hardware:
    """A device in its node. `inside` links devices of one node, `across` links nodes (the share of one device).

    BadArgument if a number is missing, not a number, or beyond anything a device could be.
    """

    name: str
    peak_flops: Mapping[str, float] = field(hash=False)  # by dtype (a name in DTYPES): dense FLOPs per second
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    launch_seconds: float  # what each kernel costs besides its work
    matmul_efficiency: float  # reached / peak FLOPs of a large matmul
    memory_efficiency: float  # reached / peak bytes per second of a streaming kernel
    inside: Link
    across: Link
    devices_per_node: int
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)  # field name -> where its number comes from

    def __post_init__(self) -> None:
        owner = f"hardware {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise BadArgument(f"a hardware profile's name is {self.name!r}", use="a non-empty string")
        if not isinstance(self.peak_flops, Mapping) or "f32" not in self.peak_flops:
            raise BadArgument(
                f"peak_flops of {owner} has no f32", why="f32 is torch's default dtype", use='{"f32": ..., "bf16": ...}'
            )
        for dtype, flops in self.peak_flops.items():
            if dtype not in DTYPES:
                raise BadArgument(f"peak_flops of {owner} has an unknown dtype {dtype!r}", use=", ".join(DTYPES))
            _check_number(flops, f"peak_flops[{dtype}]", owner)
        for item in fields(self):
            if item.name in LIMITS and item.name != "peak_flops":
                _check_number(getattr(self, item.name), item.name, owner)
        for side, link in (("inside", self.inside), ("across", self.across)):
            if not isinstance(link, Link):
                raise BadArgument(
                    f"{side} of {owner} is {link!r}", use="a Link(latency_seconds, bandwidth_bytes_per_second)"
                )
            _check_number(link.latency_seconds, f"{side}.latency_seconds", owner)
            _check_number(link.bandwidth_bytes_per_second, f"{side}.bandwidth_bytes_per_second", owner)

    def link(self, num_devices: int) -> Link:
        """The slowest link of a mesh axis that spans `num_devices` neighbouring devices: across nodes once it outgrows
        one node.
        """
        return self.inside if num_devices <= self.devices_per_node else self.across

    def to_json(self) -> str:
        """The profile as JSON text that `from_json` reads back; keys sorted, so one profile is always the same text."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("peak_flops", "sources"):
            values[name] = dict(values[name])
        for name in ("inside", "across"):
            values[name] = {item.name: getattr(values[name], item.name) for item in fields(Link)}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """The profile that `to_json` wrote, or a user's own. BadArgument naming the field that is missing, unknown or
        absurd.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadArgument("the hardware profile is not JSON", why=str(error)) from None
        _check_keys(values, cls, "the hardware profile", optional=("sources",))
        for side in ("inside", "across"):
            _check_keys(values[side], Link, f"{side} of the hardware profile")
            values[side] = Link(**values[side])
        if not isinstance(values.get("sources", {}), Mapping):
            raise BadArgument(
                "sources of the hardware profile is not an object",
                use='{"memory_bytes": "where the number is from", ...}',
            )
        return cls(**values)


def _check_keys(values: Any, kind: type, owner: str, optional: tuple[str, ...] = ()) -> None:
    names = [item.name for item in fields(kind)]
    if not isinstance(values, dict):
        raise BadArgument(f"{owner} is not a JSON object", use="an object with the keys " + ", ".join(names))
    if missing := [name for name in names if name not in values and name not in optional]:
        raise BadArgument(f"{owner} has no {', '.join(missing)}", use="an object with the keys " + ", ".join(names))
    if unknown := [name for name in values if name not in names]:
        raise BadArgument(f"{owner} has unknown keys {', '.join(unknown)}", use="only the keys " + ", ".join(names))


_A100_SHEET = "NVIDIA A100 datasheet (nvidia-a100-datasheet-us, 2021), SXM column"
_H100_SHEET = "NVIDIA H100 datasheet (2023), SXM column; dense rates, half of those printed 'with sparsity'"
_H200_SHEET = "NVIDIA H200 datasheet (2024), SXM column; dense rates, half of those printed 'with sparsity'"
_NVLINK_LATENCY = "NCCL src/graph/tuning.cc, hwLat: ring, Simple protocol, NVLink 3.4 us a step"
_NET_LATENCY = "NCCL src/graph/tuning.cc, hwLat: ring, Simple protocol, network 9.6 us a step"
_LAUNCH = (
    "estimate: 4 us for an eager kernel issued while the queue is full "
    "(NVIDIA, 'Getting Started with CUDA Graphs', 2019: 3.8 us per short kernel when launches overlap)"
)
_MEMORY_EFFICIENCY = "estimate: streaming kernels reach about 0.9 of the datasheet bandwidth"

_AMPERE: dict[str, Any] = dict(
    peak_flops={"f64": 9.7e12, "f32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "f16": 312e12},
    launch_seconds=4e-6,
    matmul_efficiency=0.80,
    memory_efficiency=0.9,
    inside=Link(3.4e-6, 235e9),
    across=Link(9.6e-6, 23.5e9),
    devices_per_node=8,
)
_AMPERE_SOURCES = {
    "peak_flops": _A100_SHEET + "; f64 and f32 without tensor cores",
    "launch_seconds": _LAUNCH,
    "matmul_efficiency": "estimate for everyday shapes; the best shape reaches 0.87 "
    "(271.2 of 312 TFLOP/s bf16: Bekman, Machine Learning Engineering, table of maximum achievable matmul FLOPS)",
    "memory_efficiency": _MEMORY_EFFICIENCY,
    "inside": _NVLINK_LATENCY
    + "; 235 GB/s is the bus bandwidth the same file allows an A100 (datasheet: 300 GB/s per direction)",
    "across": _NET_LATENCY
    + "; one HDR200 InfiniBand port per GPU (DGX A100 datasheet): 25 GB/s, 23.5 reached (SimAI, calbusbw.h)",
    "devices_per_node": "DGX A100 datasheet",
}
_HOPPER: dict[str, Any] = dict(
    peak_flops={"f64": 33.5e12, "f32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "f16": 989.4e12, "fp8": 1978.9e12},
    launch_seconds=4e-6,
    matmul_efficiency=0.70,
    memory_efficiency=0.9,
    inside=Link(3.4e-6, 370.8e9),
    across=Link(9.6e-6, 48.5e9),
    devices_per_node=8,
)
_HOPPER_SOURCES = {
    "launch_seconds": _LAUNCH,
    "matmul_efficiency": "estimate for everyday shapes; the best shape reaches 0.80 "
    "(794.5 of 989 TFLOP/s bf16: Bekman, Machine Learning Engineering, table of maximum achievable matmul FLOPS)",
    "memory_efficiency": _MEMORY_EFFICIENCY,
    "inside": _NVLINK_LATENCY
    + "; 18 NVLinks of 20.6 GB/s as NCCL src/graph/topo.h counts them (datasheet: 450 GB/s per direction)",
    "across": _NET_LATENCY
    + "; one NDR400 InfiniBand port per GPU (DGX H100 datasheet): 50 GB/s, 48.5 reached (SimAI, calbusbw.h)",
    "devices_per_node": "DGX H100 datasheet; HGX H200 has as many",
}

HARDWARE: dict[str, Hardware] = {
    profile.name: profile
    for profile in (
        Hardware(
            name="a100-40gb",
            memory_bytes=40_536 * 2**20,
            memory_bandwidth_bytes_per_second=1.555e12,
            sources={
                **_AMPERE_SOURCES,
                "memory_bytes": "nvidia-smi of an A100-SXM4-40GB: 40536 MiB",
                "memory_bandwidth_bytes_per_second": _A100_SHEET + " (40 GB)",
            },
            **_AMPERE,
        ),
        Hardware(
            name="a100-80gb",
            memory_bytes=81_920 * 2**20,
            memory_bandwidth_bytes_per_second=2.039e12,
            sources={
                **_AMPERE_SOURCES,
                "memory_bytes": "nvidia-smi of an A100-SXM4-80GB: 81920 MiB",
                "memory_bandwidth_bytes_per_second": _A100_SHEET + " (80 GB)",
            },
            **_AMPERE,
        ),
        Hardware(
            name="h100-sxm",
            memory_bytes=81_559 * 2**20,
            memory_bandwidth_bytes_per_second=3.35e12,
            sources={
                **_HOPPER_SOURCES,
                "peak_flops": _H100_SHEET + "; f64 and f32 without tensor cores",
                "memory_bytes": "nvidia-smi of an H100 80GB HBM3: 81559 MiB",
                "memory_bandwidth_bytes_per_second": _H100_SHEET,
            },
            **_HOPPER,
        ),
        Hardware(
            name="h200",
            memory_bytes=143_771 * 2**20,
            memory_bandwidth_bytes_per_second=4.8e12,
            sources={
                **_HOPPER_SOURCES,
                "peak_flops": _H200_SHEET + "; f64 and f32 without tensor cores",
                "memory_bytes": "nvidia-smi of an H200: 143771 MiB",
                "memory_bandwidth_bytes_per_second": _H200_SHEET,
            },
            **_HOPPER,
        ),
        Hardware(
            name="cpu",
            peak_flops={"f64": 57e9, "f32": 107e9, "bf16": 470e9, "f16": 1e9},
            memory_bytes=8 * 2**30,
            memory_bandwidth_bytes_per_second=41e9,
            launch_seconds=3e-6,
            matmul_efficiency=0.85,
            memory_efficiency=0.6,
            inside=Link(8e-5, 3.5e9),
            across=Link(8e-5, 1.1e9),
            devices_per_node=64,
            sources={
                "peak_flops": "measured as the best of 7 square matmuls of 1024 or 2048, torch 2.13, one thread "
                "of an AMD EPYC (AVX-512) virtual machine; one, because ranks share the cores; f16 has no fast kernel",
                "memory_bytes": "assumed: what a rank may use on a laptop with 16 GB",
                "memory_bandwidth_bytes_per_second": "measured as torch.add(x, y, out=z) on 3 x 128 MB, same thread",
                "launch_seconds": "measured as a loop of 16-element additions (2.6 us) and linears (3.4 us) "
                "with gradients on, same machine",
                "matmul_efficiency": "measured as the 512 matmul's median over the peak, same machine",
                "memory_efficiency": "estimate: ranks share the measured bandwidth, and new results page-fault",
                "inside": "measured as gloo between two threads over loopback, same machine: send and all_reduce "
                "of 1 KB (28 and 200 us) and of 16 MB (2.97 and 7.5 ms), the constants halfway between",
                "across": "assumed: 10 Gbit/s Ethernet, latency as inside",
                "devices_per_node": "assumed: as many ranks as anyone starts on one machine",
            },
        ),
    )
}


def hardware(name_or_profile: str | Hardware) -> Hardware:
    """The profile of that name, or the profile itself. BadArgument listing the names if there is none."""
    if isinstance(name_or_profile, Hardware):
        return name_or_profile
    if isinstance(name_or_profile, str) and name_or_profile in HARDWARE:
        return HARDWARE[name_or_profile]
    raise BadArgument(f"no hardware profile {name_or_profile!r}", use=f"one of {', '.join(HARDWARE)}, or a Hardware")

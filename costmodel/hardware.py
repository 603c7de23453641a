"""HARDWARE: profiles by name, each a device in a node on a fabric.

A plain name ("a100-80gb") is the device in the node and on the fabric that its maker ships it with; other combinations are rows with the
fabric behind it ("a100-80gb-omnipath"). Add one as a row, or pass a `Hardware` (say `Hardware.from_json(text)`) wherever a name goes.
"""

from __future__ import annotations

from pathlib import Path

from costmodel.errors import BadArgument
from costmodel.machine import DTYPES, AxisLink, Hardware, Kernels, Link
from costmodel.profiles import DEVICES, FABRICS, NODES

__all__ = ["COMBINATIONS", "DTYPES", "HARDWARE", "AxisLink", "Hardware", "Kernels", "Link", "combined", "hardware", "nearest"]

# name: device, node, fabric
COMBINATIONS: dict[str, tuple[str, str, str]] = {
    "v100-16gb": ("v100-16gb", "dgx-1", "4x-edr100"),
    "v100-32gb": ("v100-32gb", "dgx-1", "4x-edr100"),
    "v100-32gb-omnipath": ("v100-32gb", "quad-v100", "4x-opa100"),
    "a100-40gb": ("a100-40gb", "dgx-a100", "8x-hdr200"),
    "a100-40gb-roce": ("a100-40gb", "dgx-a100", "8x-roce200"),
    "a100-80gb": ("a100-80gb", "dgx-a100", "8x-hdr200"),
    "a100-80gb-roce": ("a100-80gb", "dgx-a100", "8x-roce200"),
    "a100-80gb-4nic": ("a100-80gb", "dgx-a100", "4x-hdr200"),
    "a100-80gb-omnipath": ("a100-80gb", "octo-a100", "4x-opa100"),
    "h100-sxm": ("h100-sxm", "dgx-h100", "8x-ndr400"),
    "h100-96gb": ("h100-96gb", "dgx-h100", "8x-ndr400"),
    "h200": ("h200", "dgx-h100", "8x-ndr400"),
    "b200": ("b200", "hgx-b200", "8x-ndr400"),
    "gb200": ("gb200", "nvl72", "72x-ndr400"),
    "gh200": ("gh200", "gh200-nvl32", "32x-ndr400"),
    "l40s": ("l40s", "pcie-8", "1x-100gbe"),
    "rtx-4090": ("rtx-4090", "pcie-8", "1x-100gbe"),
    "cpu": ("cpu", "threads", "10gbe-per-rank"),
}


_SHARED = "each rank is taken to have a device of its own; `autopar calibrate` measures what ranks of a CPU share"


def combined(name: str, device: str, node: str, fabric: str) -> Hardware:
    """The profile of a device of DEVICES in a node of NODES on a fabric of FABRICS. The ports of a node are shared by its devices: each
    has ports / devices of a port's bandwidth. BadArgument listing the rows if one is unknown.
    """
    for kind, row, rows in (("device", device, DEVICES), ("node", node, NODES), ("fabric", fabric, FABRICS)):
        if row not in rows:
            raise BadArgument(f"no {kind} {row!r}", use=f"one of {', '.join(rows)}")
    one, place, net = DEVICES[device], NODES[node], FABRICS[fabric]
    share = net.port.bandwidth_bytes_per_second * net.ports / place.devices
    return Hardware(
        name=name,
        inside=place.inside,
        across=Link(net.port.latency_seconds, share),
        devices_per_node=place.devices,
        sources={**one.sources, **place.sources, "across": net.source, "shared_rate": _SHARED, "sharing_ranks": _SHARED},
        peak_flops=one.peak_flops,
        memory_bytes=one.memory_bytes,
        memory_bandwidth_bytes_per_second=one.memory_bandwidth_bytes_per_second,
        launch_seconds=one.launch_seconds,
        matmul_efficiency=one.matmul_efficiency,
        memory_efficiency=one.memory_efficiency,
        kernels=one.kernels,
        basis=one.basis,
        device_type=one.device_type,
    )


HARDWARE: dict[str, Hardware] = {name: combined(name, *rows) for name, rows in COMBINATIONS.items()}


def hardware(name_or_profile: str | Path | Hardware) -> Hardware:
    """The profile of that name, the one in the JSON file of that path, or the profile itself. BadArgument listing the names if there is
    none, or saying why the file cannot be read.
    """
    if isinstance(name_or_profile, Hardware):
        return name_or_profile
    if isinstance(name_or_profile, str) and name_or_profile in HARDWARE:
        return HARDWARE[name_or_profile]
    if isinstance(name_or_profile, (str, Path)) and ((path := Path(name_or_profile)).suffix == ".json" or path.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadArgument(f"cannot read the hardware profile {path}", why=str(error)) from error
        try:
            return Hardware.from_json(text)
        except BadArgument as error:
            raise BadArgument(error.what, where=str(path), why=error.why, use=error.use) from error
    raise BadArgument(f"no hardware profile {name_or_profile!r}", use=f"one of {', '.join(HARDWARE)}, a JSON file, or a Hardware")


def nearest(device_name: str, memory_bytes: float) -> Hardware | None:
    """The profile of the device that its driver calls so ("NVIDIA A100-SXM4-80GB"): the one with most words in common, then with the
    memory nearest. None if no word is.
    """
    words = set(device_name.lower().replace("-", " ").split())
    shared = {name: len(words.intersection(name.split("-"))) for name in HARDWARE if name.split("-")[0] in words}
    found = [HARDWARE[name] for name, count in shared.items() if count == max(shared.values())]
    return min(found, key=lambda row: abs(row.memory_bytes - memory_bytes), default=None)

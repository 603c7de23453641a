"""The rows that hardware profiles are made of: devices, nodes that hold them, fabrics that join nodes, each number with its source.

A profile is one of each (`costmodel.hardware.HARDWARE`). Bandwidths of links are what collectives were seen to reach, per direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from costmodel.machine import Kernels, Link


@dataclass(frozen=True)
class Device:
    """One device: the fields of `Hardware` that do not depend on where it is plugged in, and their sources."""

    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    matmul_efficiency: float
    sources: Mapping[str, str]
    memory_efficiency: float = 0.9
    launch_seconds: float = 4e-6
    kernels: Kernels = field(default_factory=Kernels)
    basis: str = "datasheet"
    device_type: str = "cuda"


@dataclass(frozen=True)
class Node:
    """Devices that share the fast link."""

    devices: int
    inside: Link
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Fabric:
    """What joins nodes: `ports` network ports a node, which its devices share."""

    ports: int
    port: Link
    source: str


_LAUNCH = (
    "estimate: 4 us for an eager kernel issued while the queue is full "
    "(NVIDIA, 'Getting Started with CUDA Graphs', 2019: 3.8 us per short kernel when launches overlap)"
)
_COMMON = {
    "launch_seconds": _LAUNCH,
    "memory_efficiency": "estimate: streaming kernels reach about 0.9 of the datasheet bandwidth",
    "basis": "what the efficiencies are: see their sources",
}
_FIT = (
    "fitted to the published step times of tests/benchmarks/published.csv on this kind of device or fabric "
    "(tests/benchmarks/fit_published.py: the suite farthest from what is asked of it decides), within the range that kernels alone "
    "were seen to reach"
)
_VOLTA = _COMMON | {
    "peak_flops": "NVIDIA V100 datasheet (2020), SXM2 column; f16 with tensor cores, no bf16",
    "memory_bandwidth_bytes_per_second": "NVIDIA V100 datasheet (2020), SXM2 column",
    "matmul_efficiency": _FIT + "; cuBLAS alone reaches 90 to 100 of 125 TFLOP/s (Jia et al., 'Dissecting Volta', 2018, chapter 4)",
    "kernels": "NVIDIA V100 whitepaper: 80 multiprocessors; the rest " + _FIT,
    "memory_efficiency": _FIT,
    "launch_seconds": _FIT,
    "basis": "fitted to whole training steps",
}
_AMPERE = _COMMON | {
    "peak_flops": "NVIDIA A100 datasheet (nvidia-a100-datasheet-us, 2021), SXM column; f64 and f32 without tensor cores",
    "memory_bandwidth_bytes_per_second": "NVIDIA A100 datasheet (nvidia-a100-datasheet-us, 2021), SXM column",
    "matmul_efficiency": _FIT + "; the best shape alone reaches 0.87 "
    "(271.2 of 312 TFLOP/s bf16: Bekman, Machine Learning Engineering, table of maximum achievable matmul FLOPS)",
    "memory_efficiency": _FIT + "; between what copies (0.9) and kernels of several passes reach",
    "kernels": "NVIDIA A100 whitepaper: 108 multiprocessors; attention and overlap, rounded: " + _FIT + "; fill: of the size of a stage "
    "of the loop; misaligned batched products: near the rate without tensor cores (19.5 of 312 TFLOP/s), as rows with such heads show",
    "basis": "fitted to whole training steps",
}
_HOPPER = _COMMON | {
    "peak_flops": "NVIDIA H100 and H200 datasheets (2023, 2024), SXM column; dense rates, half of those printed 'with sparsity'",
    "memory_bandwidth_bytes_per_second": "NVIDIA H100, H200 and GH200 datasheets (2023, 2024), SXM column",
    "matmul_efficiency": "of the H100 SXM " + _FIT + "; the best shape alone reaches 0.80 "
    "(794.5 of 989 TFLOP/s bf16: Bekman, Machine Learning Engineering, table of maximum achievable matmul FLOPS)",
    "kernels": "NVIDIA H100 whitepaper: 132 multiprocessors; the rest, of the H100 SXM, " + _FIT,
    "memory_efficiency": "of the H100 SXM " + _FIT,
}
_BLACKWELL = _COMMON | {
    "peak_flops": "NVIDIA Blackwell (HGX B200, GB200 NVL72) datasheets, 2024; dense rates of one GPU",
    "memory_bandwidth_bytes_per_second": "NVIDIA Blackwell (HGX B200, GB200 NVL72) datasheets, 2024",
    "matmul_efficiency": "estimate: as the H100 profile",
    "kernels": "NVIDIA Blackwell B200: 148 multiprocessors",
}
_ADA = _COMMON | {
    "matmul_efficiency": "estimate: the rate is held back by the power limit, not by the shape",
}
_VOLTA_PEAK = {"f64": 7.8e12, "f32": 15.7e12, "f16": 125e12}
_AMPERE_PEAK = {"f64": 9.7e12, "f32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "f16": 312e12}
_HOPPER_PEAK = {"f64": 33.5e12, "f32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "f16": 989.4e12, "fp8": 1978.9e12}
_VOLTA_KERNELS = Kernels(multiprocessors=80, fill_k=58.0)
_AMPERE_KERNELS = Kernels(
    multiprocessors=108, fill_k=40.0, misaligned_batched_efficiency=0.045, attention_forward_efficiency=0.44,
    attention_backward_efficiency=0.24, overlap_slowdown=1.3,
)  # fmt: skip
_HOPPER_KERNELS = Kernels(
    multiprocessors=132, fill_k=60.0, dtype_efficiency={"fp8": 0.55}, attention_forward_efficiency=0.52, attention_backward_efficiency=0.50,
    overlap_slowdown=1.3,
)  # fmt: skip
_HOPPER_500W_KERNELS = Kernels(
    multiprocessors=132, fill_k=60.0, dtype_efficiency={"fp8": 0.48}, attention_forward_efficiency=0.255,
    attention_backward_efficiency=0.175, overlap_slowdown=1.3,
)  # fmt: skip
_BLACKWELL_KERNELS = Kernels(multiprocessors=148)

DEVICES: dict[str, Device] = {
    "v100-16gb": Device(
        _VOLTA_PEAK, 16_160 * 2**20, 0.9e12, 0.655, kernels=_VOLTA_KERNELS, memory_efficiency=0.92, launch_seconds=6.1e-6,
        basis="calibrated",
        sources=_VOLTA | {"memory_bytes": "nvidia-smi of a Tesla V100-SXM2-16GB: 16160 MiB"},
    ),
    "v100-32gb": Device(
        _VOLTA_PEAK, 32_510 * 2**20, 0.9e12, 0.655, kernels=_VOLTA_KERNELS, memory_efficiency=0.92, launch_seconds=6.1e-6,
        basis="calibrated",
        sources=_VOLTA | {"memory_bytes": "nvidia-smi of a Tesla V100-SXM2-32GB: 32510 MiB"},
    ),
    "a100-40gb": Device(
        _AMPERE_PEAK, 40_536 * 2**20, 1.555e12, 0.76, memory_efficiency=0.76, kernels=_AMPERE_KERNELS, basis="calibrated",
        sources=_AMPERE | {"memory_bytes": "nvidia-smi of an A100-SXM4-40GB: 40536 MiB"},
    ),
    "a100-80gb": Device(
        _AMPERE_PEAK, 81_920 * 2**20, 2.039e12, 0.76, memory_efficiency=0.76, kernels=_AMPERE_KERNELS, basis="calibrated",
        sources=_AMPERE | {"memory_bytes": "nvidia-smi of an A100-SXM4-80GB: 81920 MiB"},
    ),
    "h100-sxm": Device(
        _HOPPER_PEAK, 81_559 * 2**20, 3.35e12, 0.695, kernels=_HOPPER_KERNELS, memory_efficiency=0.92, basis="calibrated",
        sources=_HOPPER | {"memory_bytes": "nvidia-smi of an H100 80GB HBM3: 81559 MiB", "basis": "fitted to whole training steps"},
    ),
    "h100-96gb": Device(
        _HOPPER_PEAK, 97_871 * 2**20, 2.4e12, 0.56, kernels=_HOPPER_500W_KERNELS, memory_efficiency=0.80, basis="calibrated",
        sources=_HOPPER | {
            "memory_bytes": "nvidia-smi of an H100 with 96 GB of HBM2e: 97871 MiB",
            "memory_bandwidth_bytes_per_second": "pytorch/torchtitan, benchmarks of December 2024: HBM2e, 2.4 TB/s, limited to 500 W",
            "matmul_efficiency": _FIT + "; torch's FlashAttention-2 and what 500 W instead of 700 W leave of the clock",
            "kernels": "NVIDIA H100 whitepaper: 132 multiprocessors; the rest " + _FIT,
            "memory_efficiency": _FIT,
            "basis": "fitted to whole training steps",
        },
    ),
    "h200": Device(
        _HOPPER_PEAK, 143_771 * 2**20, 4.8e12, 0.695, kernels=_HOPPER_KERNELS, memory_efficiency=0.92,
        sources=_HOPPER | {"memory_bytes": "nvidia-smi of an H200: 143771 MiB"},
    ),
    "gh200": Device(
        _HOPPER_PEAK, 97_871 * 2**20, 4.0e12, 0.695, kernels=_HOPPER_KERNELS, memory_efficiency=0.92,
        sources=_HOPPER | {"memory_bytes": "nvidia-smi of a GH200 with 96 GB of HBM3: 97871 MiB"},
    ),
    "b200": Device(
        {"f64": 37e12, "f32": 75e12, "tf32": 1.1e15, "bf16": 2.25e15, "f16": 2.25e15, "fp8": 4.5e15},
        183_359 * 2**20, 7.7e12, 0.70, kernels=_BLACKWELL_KERNELS,
        sources=_BLACKWELL | {"memory_bytes": "nvidia-smi of a B200: 183359 MiB"},
    ),
    "gb200": Device(
        {"f64": 40e12, "f32": 80e12, "tf32": 1.25e15, "bf16": 2.5e15, "f16": 2.5e15, "fp8": 5e15},
        189_471 * 2**20, 8e12, 0.70, kernels=_BLACKWELL_KERNELS,
        sources=_BLACKWELL | {"memory_bytes": "nvidia-smi of a GB200: 189471 MiB"},
    ),
    "l40s": Device(
        {"f64": 1.4e12, "f32": 91.6e12, "tf32": 183e12, "bf16": 362e12, "f16": 362e12, "fp8": 733e12},
        46_068 * 2**20, 0.864e12, 0.60, kernels=Kernels(multiprocessors=142),
        sources=_ADA | {
            "peak_flops": "NVIDIA L40S datasheet (2023); dense rates, half of those printed 'with sparsity'",
            "memory_bytes": "nvidia-smi of an L40S: 46068 MiB",
            "memory_bandwidth_bytes_per_second": "NVIDIA L40S datasheet (2023)",
            "kernels": "NVIDIA L40S product brief: 142 multiprocessors",
        },
    ),
    "rtx-4090": Device(
        {"f64": 1.29e12, "f32": 82.6e12, "tf32": 82.6e12, "bf16": 165.2e12, "f16": 165.2e12, "fp8": 330.3e12},
        24_564 * 2**20, 1.008e12, 0.85, kernels=Kernels(multiprocessors=128),
        sources=_ADA | {
            "peak_flops": "NVIDIA Ada GPU architecture whitepaper, appendix A; dense rates with f32 accumulation",
            "memory_bytes": "nvidia-smi of a GeForce RTX 4090: 24564 MiB",
            "memory_bandwidth_bytes_per_second": "NVIDIA Ada GPU architecture whitepaper, appendix A",
            "matmul_efficiency": "estimate: the f32-accumulating rate is half of what the tensor cores can do, and is nearly reached",
            "kernels": "NVIDIA Ada GPU architecture whitepaper: 128 multiprocessors",
        },
    ),
    "cpu": Device(
        {"f64": 57e9, "f32": 107e9, "bf16": 470e9, "f16": 1e9}, 8 * 2**30, 41e9, 0.85, memory_efficiency=0.6, launch_seconds=3e-6,
        device_type="cpu",
        sources={
            "peak_flops": "measured as the best of 7 square matmuls of 1024 or 2048, torch 2.13, one thread "
            "of an AMD EPYC (AVX-512) virtual machine; one, because ranks share the cores; f16 has no fast kernel",
            "memory_bytes": "assumed: what a rank may use on a laptop with 16 GB",
            "memory_bandwidth_bytes_per_second": "measured as torch.add(x, y, out=z) on 3 x 128 MB, same thread",
            "launch_seconds": "measured as a loop of 16-element additions (2.6 us) and linears (3.4 us) "
            "with gradients on, same machine",
            "matmul_efficiency": "measured as the 512 matmul's median over the peak, same machine",
            "memory_efficiency": "estimate: ranks share the measured bandwidth, and new results page-fault",
            "kernels": "none: any shape runs like the best one",
            "basis": "a few measurements on another machine than the user's: no better than a datasheet",
        },
    ),
}  # fmt: skip

_NVLINK_LATENCY = "NCCL src/graph/tuning.cc, hwLat: ring, Simple protocol, NVLink 3.4 us a step"
_PCIE = "estimate: PCIe 4.0 x16 without peer access, through host memory; latency as NCCL's hwLat for PCI, 5.7 us a step"

NODES: dict[str, Node] = {
    "quad-v100": Node(
        4, Link(3.4e-6, 6.7e9),
        {"inside": _NVLINK_LATENCY + "; 6.7 GB/s " + _FIT + ": tensor-parallel jobs there were as slow as without NVLink "
         "(datasheet: 150 GB/s per direction)",
         "devices_per_node": "four V100 SXM2 fully connected, two links a pair (Jean Zay, IDRIS)"},
    ),
    "dgx-1": Node(
        8, Link(3.4e-6, 120e9),
        {"inside": _NVLINK_LATENCY + "; 6 NVLinks of 20 GB/s as NCCL src/graph/topo.h counts them (datasheet: 150 GB/s per direction)",
         "devices_per_node": "DGX-1 datasheet"},
    ),
    "dgx-a100": Node(
        8, Link(3.4e-6, 235e9),
        {"inside": _NVLINK_LATENCY
         + "; 235 GB/s is the bus bandwidth the same file allows an A100 (datasheet: 300 GB/s per direction)",
         "devices_per_node": "DGX A100 datasheet"},
    ),
    "octo-a100": Node(
        8, Link(3.4e-6, 95e9),
        {"inside": _NVLINK_LATENCY + "; 95 of the 235 GB/s that NCCL src/graph/tuning.cc allows an A100 " + _FIT,
         "devices_per_node": "eight A100 SXM4 with four Omni-Path ports (Jean Zay, IDRIS)"},
    ),
    "dgx-h100": Node(
        8, Link(3.4e-6, 300e9),
        {"inside": _NVLINK_LATENCY
         + "; 18 NVLinks of 20.6 GB/s as NCCL src/graph/topo.h counts them (datasheet: 450 GB/s per direction)"
         "; 300 of their 371 GB/s " + _FIT,
         "devices_per_node": "DGX H100 datasheet; HGX H200 has as many"},
    ),
    "hgx-b200": Node(
        8, Link(3.4e-6, 720e9),
        {"inside": _NVLINK_LATENCY + "; 18 NVLinks of 40 GB/s, twice the H100's (datasheet: 900 GB/s per direction)",
         "devices_per_node": "HGX B200 datasheet"},
    ),
    "nvl72": Node(
        72, Link(3.4e-6, 720e9),
        {"inside": _NVLINK_LATENCY + "; 18 NVLinks of 40 GB/s, twice the H100's (datasheet: 900 GB/s per direction)",
         "devices_per_node": "GB200 NVL72 datasheet: one NVLink domain of 72"},
    ),
    "gh200-nvl32": Node(
        32, Link(3.4e-6, 370.8e9),
        {"inside": _NVLINK_LATENCY
         + "; 18 NVLinks of 20.6 GB/s as NCCL src/graph/topo.h counts them (datasheet: 450 GB/s per direction)",
         "devices_per_node": "GH200 NVL32 datasheet: one NVLink domain of 32"},
    ),
    "pcie-8": Node(8, Link(5.7e-6, 20e9), {"inside": _PCIE, "devices_per_node": "a server with eight PCIe slots"}),
    "threads": Node(
        64, Link(8e-5, 3.5e9),
        {"inside": "measured as gloo between two threads over loopback, same machine: send and all_reduce "
         "of 1 KB (28 and 200 us) and of 16 MB (2.97 and 7.5 ms), the constants halfway between",
         "devices_per_node": "assumed: as many ranks as anyone starts on one machine"},
    ),
}  # fmt: skip

_NET_LATENCY = "NCCL src/graph/tuning.cc, hwLat: ring, Simple protocol, network 9.6 us a step"

FABRICS: dict[str, Fabric] = {
    "8x-hdr200": Fabric(
        8, Link(9.6e-6, 23.5e9),
        _NET_LATENCY + "; one HDR200 InfiniBand port per GPU (DGX A100 datasheet): 25 GB/s, 23.5 reached (SimAI, calbusbw.h)",
    ),
    "4x-hdr200": Fabric(4, Link(9.6e-6, 23.5e9), _NET_LATENCY + "; four HDR200 ports a node (800 Gbit/s), 23.5 of 25 GB/s reached each"),
    "8x-roce200": Fabric(8, Link(9.6e-6, 21e9), _NET_LATENCY + "; RoCE at 1600 Gbit/s a node; 21 of 25 GB/s reached: estimate"),
    "8x-ndr400": Fabric(
        8, Link(9.6e-6, 48.5e9),
        _NET_LATENCY + "; one NDR400 InfiniBand port per GPU (DGX H100 datasheet): 50 GB/s, 48.5 reached (SimAI, calbusbw.h)",
    ),
    "72x-ndr400": Fabric(
        72, Link(9.6e-6, 48.5e9),
        _NET_LATENCY + "; one NDR400 InfiniBand port per GPU (GB200 NVL72 datasheet): 50 GB/s, 48.5 reached (SimAI, calbusbw.h)",
    ),
    "32x-ndr400": Fabric(
        32, Link(9.6e-6, 48.5e9),
        _NET_LATENCY + "; one NDR400 InfiniBand port per GPU: 50 GB/s, 48.5 reached (SimAI, calbusbw.h)",
    ),
    "4x-opa100": Fabric(
        4, Link(9.6e-6, 4.6e9), _NET_LATENCY + "; four Omni-Path 100 ports a node (Jean Zay, IDRIS): 12.5 GB/s, of it 4.6 " + _FIT
    ),
    "4x-edr100": Fabric(
        4, Link(9.6e-6, 11.5e9), _NET_LATENCY + "; four EDR InfiniBand ports a node (DGX-1 datasheet): 12.5 GB/s, 11.5 reached"
    ),
    "1x-100gbe": Fabric(1, Link(2e-5, 11e9), "estimate: one 100 Gbit/s Ethernet port a node, 11 of 12.5 GB/s reached"),
    "10gbe-per-rank": Fabric(64, Link(8e-5, 1.1e9), "assumed: 10 Gbit/s Ethernet, latency as inside"),
}  # fmt: skip

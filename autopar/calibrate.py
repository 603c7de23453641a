"""`calibrate`: measures this machine into a hardware profile.

What a profile's fields mean decides what is measured (`costmodel.machine`). Matrix products of several shapes per dtype give the peak (the
best) and the efficiency (the typical one over it); streams over more memory than any cache give the bandwidth, and the same ops with fresh
results, as a model's are, the efficiency; tiny ops with gradients give what a call costs besides its work. Collectives over gloo
between threads of this process (NCCL between GPUs) at several sizes and axis sizes give each link's latency and bandwidth, by least squares
in the formula that prices them.

On a CPU the ranks of a job share the cores, caches and memory. So everything is measured on one thread alone, and the compute again
beside as many others at the same work as there are cores: `Hardware.shared_rate` is the geometric mean of the ratios.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.board import Board
from autopar.runtime.world import World
from costmodel.hardware import HARDWARE, Hardware, Kernels, Link, nearest
from costmodel.hardware import hardware as hardware_named
from costmodel.ops import TensorShape, op_cost

Progress = Callable[[str], None]
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64, "f16": torch.float16}
# rows, columns, contracted dim of matrix products: what layers of small and of large models do
_SHAPES = {
    "cpu": ((512, 480, 160), (2048, 640, 160), (2048, 160, 640), (1024, 1024, 256), (1024, 1024, 1024), (2048, 2048, 512)),
    "cuda": ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (4096, 12288, 4096), (8192, 28672, 8192), (2048, 512, 8192)),
}
_STREAM_BYTES = {"cpu": 2**25, "cuda": 2**30}
_COLLECTIVE_BYTES = {"cpu": (2**10, 2**16, 2**20, 2**23), "cuda": (2**12, 2**16, 2**20, 2**24, 2**28)}
_SECONDS = {"cpu": 0.15, "cuda": 0.1}  # a measurement goes on for about so long
_LEAST_RUNS = 5
_COPIES = 12  # of what an op works on, in turns: in a model no op finds its operands where it left them, in the nearest cache
_TIMEOUT_SECONDS = 30.0  # of a collective


def calibrate(device: torch.device | str | None = None, *, name: str | None = None, progress: Progress = lambda text: None) -> Hardware:
    """This machine's profile. Under a minute on a CPU. `device`: None for CUDA where there is one, else the CPU."""
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _calibrated(place, name, progress)
    finally:
        torch.set_num_threads(threads_before)


def _calibrated(place: torch.device, name: str | None, progress: Progress) -> Hardware:
    kind = place.type
    cores = max(os.cpu_count() or 1, 1) if kind == "cpu" else 1
    meter = Meter(place, cores)
    peaks: dict[str, float] = {}
    efficiencies: dict[str, float] = {}
    for dtype, torch_dtype in _DTYPES.items():
        progress(f"matrix products in {dtype}")
        shapes = _SHAPES[kind] if dtype in ("f32", "bf16") else _SHAPES[kind][3:5]
        rates = _matmul_rates(torch_dtype, meter, shapes, shared=dtype == "f32")
        if rates:
            peaks[dtype], efficiencies[dtype] = max(rates), statistics.median(rates) / max(rates)
    progress("attention")
    attention = _attention_efficiencies(meter, peaks["f32"])
    progress("memory")
    bandwidth, layers = _bandwidths(meter)
    progress("launches")
    launch = _launch_seconds(meter)
    ranks = 2 if kind == "cpu" else torch.cuda.device_count()
    progress("collectives")
    inside, how = _link(place, ranks)
    today, where = date.today().isoformat(), _machine(place)
    base = hardware_named("cpu") if kind == "cpu" else _nearest(place)
    devices = base.devices_per_node if kind == "cpu" else max(ranks, 1)
    across = base.across
    measured = f"measured {today} on {where}, torch {torch.__version__}"
    main = efficiencies["f32"]
    return Hardware(
        name=name or f"{kind} calibrated {today}",
        peak_flops=peaks,
        memory_bytes=_memory_bytes(place, cores),
        memory_bandwidth_bytes_per_second=bandwidth,
        launch_seconds=launch,
        matmul_efficiency=main,
        memory_efficiency=min(layers / bandwidth, 1.0),
        inside=inside,
        across=across,
        devices_per_node=devices,
        kernels=replace(
            base.kernels if kind == "cuda" else Kernels(),
            attention_forward_efficiency=attention[0],
            attention_backward_efficiency=attention[1],
            dtype_efficiency={dtype: value for dtype, value in efficiencies.items() if dtype != "f32"},
        ),
        shared_rate=meter.shared_rate,
        sharing_ranks=cores,
        basis="calibrated",
        device_type=kind,
        sources={
            "peak_flops": f"{measured}: the best of {len(_SHAPES[kind])} matrix products by dtype, forward and backward",
            "matmul_efficiency": f"{measured}: the median of the same products over the best",
            "kernels": f"{measured}: dtype_efficiency as matmul_efficiency"
            + (f", the rest as the {base.name} profile" if kind == "cuda" else ", attention on 16 x 4 heads of 128 x 40; no tiles"),
            "shared_rate": f"{measured}: the same work alone and beside {cores - 1} other threads, geometric mean of the ratios",
            "sharing_ranks": "the cores" if kind == "cpu" else "a rank has a GPU of its own",
            "memory_bytes": f"{today}: " + ("torch.cuda.mem_get_info" if kind == "cuda" else "the machine's memory over its cores"),
            "memory_bandwidth_bytes_per_second": f"{measured}: add(x, y, out=z), {_STREAM_BYTES[kind] >> 20} MiB each",
            "memory_efficiency": f"{measured}: layer_norm, gelu and add with backward, as costmodel.ops counts bytes",
            "launch_seconds": f"{measured}: additions and linears of 16 elements with their backward, a call",
            "inside": f"{measured}: {how}",
            "across": f"not measured: as the {base.name} profile",
            "devices_per_node": f"as the {base.name} profile" if kind == "cpu" else f"{today}: torch.cuda.device_count()",
            "basis": measured,
        },
    )  # fmt: skip


def _machine(place: torch.device) -> str:
    if place.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(place)}"
    model = next((line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {model or platform.machine()}"


def _cpu_lines() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _memory_bytes(place: torch.device, cores: int) -> int:
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // cores
    except (ValueError, OSError):
        return HARDWARE["cpu"].memory_bytes


def _nearest(place: torch.device) -> Hardware:
    """The profile whose fabric and tiles a GPU is taken to have: the one that names it, else an A100's."""
    return nearest(torch.cuda.get_device_name(place), _memory_bytes(place, 1)) or HARDWARE["a100-80gb"]


# ---- one thread's work ------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], place: torch.device) -> float:
    """The median time of a call, after some to warm up."""
    for _ in range(3):
        work()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _LEAST_RUNS or time.perf_counter() - begin < _SECONDS[place.type]:
        if place.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(place)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            work()
            times.append(time.perf_counter() - before)
    return statistics.median(times)


class Meter:
    """Times work on one thread; on a CPU also beside others at the same work, for `shared_rate`."""

    def __init__(self, place: torch.device, cores: int) -> None:
        self.place, self.cores = place, cores
        self._ratios: list[float] = []

    @property
    def shared_rate(self) -> float:
        """What a thread keeps of its rate beside the others; 1 where nothing is shared."""
        return min(statistics.geometric_mean(self._ratios), 1.0) if self._ratios else 1.0

    def __call__(self, make: Callable[[], Callable[[], Any]], shared: bool = True) -> float:
        """Seconds of a call of the work that `make` gives, alone."""
        alone = seconds_of(_in_turns(make), self.place)
        if shared and self.cores > 1:
            self._ratios.append(alone / self._beside(make))
        return alone

    def _beside(self, make: Callable[[], Callable[[], Any]]) -> float:
        stop = threading.Event()

        def others() -> None:
            torch.set_num_threads(1)
            work = _in_turns(make)
            while not stop.is_set():
                work()

        threads = [threading.Thread(target=others, daemon=True) for _ in range(self.cores - 1)]
        for thread in threads:
            thread.start()
        try:
            return seconds_of(_in_turns(make), self.place)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _in_turns(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """The work on several copies of its data, one a call."""
    each = itertools.cycle([make() for _ in range(_COPIES)])
    return lambda: next(each)()


def _trained(result: torch.Tensor, gradient: torch.Tensor, *leaves: torch.Tensor) -> None:
    result.backward(gradient)
    for leaf in leaves:
        leaf.grad = None


def _matmul_rates(dtype: torch.dtype, meter: Meter, shapes: Sequence[tuple[int, int, int]], *, shared: bool) -> list[float]:
    """FLOPs a second of a linear's forward and backward by shape; none where the device has no such product."""
    rates = []
    for m, n, k in shapes:

        def make(m: int = m, n: int = n, k: int = k) -> Callable[[], Any]:
            x, weight = (torch.randn(rows, k, device=meter.place).to(dtype).requires_grad_() for rows in (m, n))
            gradient = torch.randn(m, n, device=meter.place).to(dtype)
            return lambda: _trained(torch.nn.functional.linear(x, weight), gradient, x, weight)

        try:
            rates.append(6.0 * m * n * k / meter(make, shared))
        except RuntimeError:
            return []
    return rates


def _attention_efficiencies(meter: Meter, peak: float) -> tuple[float, float]:
    """FLOPs a second of causal fused attention over the peak, forward and backward: two products of half a square, and five (Dao 2023)."""
    batch, heads, tokens, width = 16, 4, 128, 40
    product = 2.0 * batch * heads * tokens * tokens * width / 2

    def make(backward: bool) -> Callable[[], Callable[[], Any]]:
        def inner() -> Callable[[], Any]:
            q, k, v = (torch.randn(batch, heads, tokens, width, device=meter.place, requires_grad=True) for _ in range(3))
            gradient = torch.randn(batch, heads, tokens, width, device=meter.place)

            def work() -> None:
                result = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                if backward:
                    _trained(result, gradient, q, k, v)

            return work

        return inner

    forward = meter(make(False))
    back = max(meter(make(True)) - forward, forward)
    return min(2 * product / forward / peak, 1.0), min(5 * product / back / peak, 1.0)


def _bandwidths(meter: Meter) -> tuple[float, float]:
    """Bytes a second of a stream into given memory, and of layers that do little but read and write."""
    large = _STREAM_BYTES[meter.place.type] // 4

    def stream() -> Callable[[], Any]:
        x, y, z = (torch.ones(large, device=meter.place) for _ in range(3))
        return lambda: torch.add(x, y, out=z)

    rows, width = (2048, 640) if meter.place.type == "cpu" else (16384, 8192)

    def layers() -> Callable[[], Any]:
        x = torch.randn(rows, width, device=meter.place, requires_grad=True)
        scale, shift = (torch.ones(width, device=meter.place, requires_grad=True) for _ in range(2))
        gradient = torch.randn(rows, width, device=meter.place)

        def work() -> None:
            normed = torch.nn.functional.layer_norm(x, (width,), scale, shift)
            _trained(x + torch.nn.functional.gelu(normed), gradient, x, scale, shift)

        return work

    value, weight = TensorShape((rows, width), 4), TensorShape((width,), 4, parameter=True)
    costs = (
        op_cost("aten.layer_norm", (value, weight, weight), (value,), (True, True, True)),
        op_cost("aten.gelu", (value,), (value,), (True,)),
        op_cost("aten.add", (value, value), (value,), (True, True)),
    )
    moved = sum(float(c.read_bytes + c.written_bytes + c.backward_read_bytes + c.backward_written_bytes) for c in costs)
    return 12.0 * large / meter(stream), moved / meter(layers)


def _launch_seconds(meter: Meter) -> float:
    """Seconds of a call besides its work: a chain of tiny ops forward and backward, over the number of calls."""
    depth = 20

    def make() -> Callable[[], Any]:
        weight, x = torch.ones(16, 16, device=meter.place, requires_grad=True), torch.ones(1, 16, device=meter.place)

        def work() -> None:
            h = x
            for _ in range(depth):
                h = torch.nn.functional.linear(h, weight) + x
            h.sum().backward()
            weight.grad = None

        return work

    # forward: linear and add; backward: a linear's two products and the sum into the gradient
    return meter(make, shared=False) / (depth * 5)


# ---- collectives --------------------------------------------------------------------------------------------------------


def _link(place: torch.device, ranks: int) -> tuple[Link, str]:
    """The link between ranks of this machine, and how it was measured."""
    if place.type == "cuda" and ranks < 2:
        base = _nearest(place)
        return base.inside, f"not measured, there is one GPU: as the {base.name} profile"
    points: list[tuple[float, float, float]] = []  # latency steps, bytes that pass one rank's link, seconds
    axis_sizes = sorted({2, ranks}) if place.type == "cuda" else [2, 4]
    for size in axis_sizes:
        for num_bytes in _COLLECTIVE_BYTES[place.type]:
            seconds = _nccl_seconds(size, num_bytes) if place.type == "cuda" else _gloo_seconds(size, num_bytes)
            steps = 2.0 * (size - 1)
            points.append((steps, steps * num_bytes / size, seconds))
    latency, per_byte = fitted(points)
    kind = "NCCL between GPUs" if place.type == "cuda" else "gloo between threads over loopback"
    sizes = ", ".join(f"{size >> 10} KiB" for size in _COLLECTIVE_BYTES[place.type])
    axes = " and ".join(map(str, axis_sizes))
    return Link(latency, 1 / per_byte), f"all_reduce of {sizes} over {axes} ranks, {kind}; relative least squares"


def fitted(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds a step, seconds a byte) that fit (steps, bytes, seconds) best, relative errors squared; both positive."""
    rows = torch.tensor([[steps / seconds, num_bytes / seconds] for steps, num_bytes, seconds in points], dtype=torch.float64)
    scale = rows.amax(0)
    found = torch.linalg.lstsq(rows / scale, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0] / scale
    latency, per_byte = (float(value) for value in found)
    if latency <= 0 or per_byte <= 0:  # one of the terms is below the noise: take each from where it matters most
        smallest, largest = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        latency, per_byte = smallest[2] / smallest[0], largest[2] / largest[1]
    return latency, per_byte


def _gloo_seconds(size: int, num_bytes: int) -> float:
    """Seconds of an all_reduce between `size` threads, as programs do it: the median over calls of the slowest rank's time."""
    store, memory = dist.HashStore(), Board.memory(size)
    runs = 20 if num_bytes <= 2**20 else 6
    times: list[list[float]] = [[] for _ in range(size)]
    errors: list[BaseException] = []

    def rank(index: int) -> None:
        try:
            torch.set_num_threads(1)
            world = World.in_thread({"tp": size}, index, store, memory, timeout_seconds=_TIMEOUT_SECONDS)
            axis, tensor = world.axis("tp"), torch.ones(num_bytes // 4)
            for _ in range(runs + 2):
                before = time.perf_counter()
                axis.all_reduce(tensor)
                times[index].append(time.perf_counter() - before)
            world.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return statistics.median(max(each) for each in list(zip(*times, strict=True))[2:])


def _nccl_seconds(size: int, num_bytes: int) -> float:
    """Seconds of an all_reduce between `size` GPUs, one process each."""
    from autopar.launch import launch

    return statistics.median(launch(_nccl_rank, size, num_bytes))


def _nccl_rank(num_bytes: int) -> float:
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(place)
    dist.init_process_group("nccl")
    tensor = torch.ones(math.ceil(num_bytes / 2), dtype=torch.bfloat16, device=place)
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        dist.all_reduce(tensor)
        end.record()
        torch.cuda.synchronize(place)
        times.append(start.elapsed_time(end) / 1e3)
    dist.destroy_process_group()
    return statistics.median(times[5:])

"""What a call costs: the least it could, the memory it takes, the work it starts, the time it takes."""

import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

MOST_SETS = 1000  # of inputs
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace


@dataclass(frozen=True)
class Cost:
    """The least that a call can do: each input read once, each output written once."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Floor:
    seconds: float
    bound: str  # "bytes" or "flops"


def floor(cost: Cost, bandwidth: float, flop_rate: float) -> Floor:
    """``bandwidth`` in bytes read plus bytes written per second, ``flop_rate`` in FLOP per second."""
    memory, matrix = cost.bytes / bandwidth, cost.flops / flop_rate
    return Floor(memory, "bytes") if memory >= matrix else Floor(matrix, "flops")


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs to rotate so that a set has left the cache when its turn comes again.

    No more than ``MOST_SETS``: where inputs are that small, reading them is no part of the time.
    """
    return min(2 + 2 * cache_bytes // max(set_bytes, 1), MOST_SETS)


def images_that_fit(images: int, bytes_per_image: int, memory: int) -> int:
    """The row's batch, halved until eager's intermediates and a float64 run fit in half of the memory."""
    footprint = 16 * bytes_per_image  # eager holds several full-size maps, float64 doubles each
    while images > 1 and images * footprint > memory // 2:
        images //= 2
    return images


def peak_of(changes: Iterable[int]) -> int:
    """Highest running sum of allocations (positive) and frees (negative), 0 at the start."""
    peak = held = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def trace(call: Call, device: torch.device) -> list[Mapping[str, Any]]:
    """The profiler's events of one call, in order of time. The result is freed after the last of them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
        synchronize(device)
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: float(event["ts"]))


def peak_extra_bytes(call: Call, device: torch.device, events: Iterable[Mapping[str, Any]]) -> int:
    """Peak of what torch's allocator hands out during the call, above what was held before it.

    On a GPU as the allocator counts it. On the CPU from the profiler's record of each allocation, in
    ``events``; scratch that C++ kernels hold for each thread is not in it.
    """
    if device.type != "cuda":
        return peak_of(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def launches(events: Iterable[Mapping[str, Any]], device: torch.device) -> int | None:
    """On a GPU the kernels, copies and fills that ran there; on the CPU the operators dispatched.

    None where the profiler may not look at the GPU (no permission, in some containers).
    """
    if device.type == "cuda":
        return sum(event.get("cat") in DEVICE_WORK for event in events) or None
    return sum(event.get("cat") == "cpu_op" and "::" in event["name"] for event in events)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(calls: Sequence[Call], device: torch.device, count: int = 30) -> list[float]:
    """Median time of each until it returns, the device not waited for, in turns of ten calls. At most a few
    calls are in the device's queue."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(3):
            call()
    while len(times[-1]) < count:
        for call, mine in zip(calls, times, strict=True):
            for _ in range(min(10, count)):
                synchronize(device)
                start = time.perf_counter()
                result = call()
                mine.append(time.perf_counter() - start)
                del result
    synchronize(device)
    return [statistics.median(mine) for mine in times]


def last_level_cache(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=32 << 20)


def memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Copy:
    """A copy far larger than the last-level cache: what the memory can do."""

    def __init__(self, device: torch.device) -> None:
        size = max(8 * last_level_cache(device), 256 << 20)
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * size  # read and written

    def __call__(self) -> None:
        self.target.copy_(self.source)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product, the best of a few."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = clock(device)
        torch.mm(a, b)
        best = min(best, clock(device) - start)
    return 2 * side**3 / best


class DeviceInstant:
    """A point in the device's own time. The difference of two is in seconds and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "DeviceInstant") -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def clock(device: torch.device) -> Any:
    return DeviceInstant() if device.type == "cuda" else time.perf_counter()


class FreedMemory:
    """Lets glibc keep what is freed, for the process to use again, instead of handing it to the system.

    Otherwise each large result is paid for with page faults, a cost of the system that no kernel can save
    and that PyTorch's tuning guide advises to avoid by another allocator.
    """

    def __init__(self, keep: bool) -> None:
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
        self.libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
        self.kept = keep and hasattr(self.libc, "mallopt")
        if self.kept:
            self.kept = bool(self.libc.mallopt(mmap_max, 0) and self.libc.mallopt(trim_threshold, -1))

    def give_back(self) -> None:
        if self.kept:
            self.libc.malloc_trim(0)


def forget_compiled(device: torch.device) -> None:
    gc.collect()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Everything that differs between measuring on a CPU and on a GPU."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.arguments import UsageError, known

Call = Callable[[], object]
MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: of the work, on the device's clock; and until the call returned, on the host's."""

    seconds: float
    host: float


class Device:
    """What both have; the rest is each one's own."""

    name: str
    torch_device: torch.device
    _other: torch.Tensor | None = None

    def problem(self) -> str | None:
        """Why it cannot be measured here."""
        return None

    def describe(self) -> dict[str, object]:
        """Its part of the environment."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """The size of the largest cache."""
        raise NotImplementedError

    def memory_free(self) -> int:
        raise NotImplementedError

    def timed(self, call: Call) -> Sample:
        raise NotImplementedError

    def evict(self) -> None:
        """Fills the caches with other data."""
        if self._other is None:
            self._other = torch.zeros(4 * self.cache_bytes(), dtype=torch.uint8, device=self.torch_device)
        self._other.add_(1)

    def release(self) -> None:
        """Gives unused memory back, also that of optimizers in reference cycles."""
        gc.collect()

    def details(self, call: Call) -> dict[str, int | str]:
        """What else can be said about a call here; it is made a few times."""
        return {}

    def graph(self, call: Call) -> Call | None:
        """Captures the call; what is returned replays it. None where there is no such thing. Raises if it fails."""
        return None


class Cpu(Device):
    name = "cpu"
    torch_device = torch.device("cpu")

    def describe(self) -> dict[str, object]:
        return {"openmp_runtimes": openmp_runtimes()}

    def cache_bytes(self) -> int:
        sizes = [_bytes(p.read_text()) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(sizes, default=32 * MIB)

    def memory_free(self) -> int:
        """What can be had without swapping; a container's own limit counts."""
        text = _read("/proc/meminfo")
        match = re.search(r"MemAvailable:\s+(\d+) kB", text)
        free = int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
        return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free

    def evict(self) -> None:
        """By all threads, so that each core's own caches are covered, and the threads are awake as after a backward
        pass. A second OpenMP runtime in the process would now compete with spinning threads: then they may fall asleep.
        """
        super().evict()
        if openmp_runtimes() > 1:
            time.sleep(0.02)

    def timed(self, call: Call) -> Sample:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return Sample(seconds, seconds)


class Cuda(Device):
    name = "cuda"
    torch_device = torch.device("cuda", 0)

    def problem(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; python -m fusedoptim says more. --device cpu measures the CPU"
        return None

    def describe(self) -> dict[str, object]:
        p = torch.cuda.get_device_properties(0)
        return {
            "gpu": p.name,
            "gpu_memory": p.total_memory,
            "compute_capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }

    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def memory_free(self) -> int:
        free, _ = torch.cuda.mem_get_info(0)
        unused = torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0)
        return free + unused

    def timed(self, call: Call) -> Sample:
        """From an idle device, so that host time that the device has to wait for is part of the step."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end) * 1e-3, host)

    def release(self) -> None:
        super().release()
        torch.cuda.empty_cache()

    def details(self, call: Call) -> dict[str, int | str]:
        """Kernels launched by one call, copies and fills that it made besides, and the memory that it used for the
        time of the call."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(0)
        torch.cuda.reset_peak_memory_stats(0)
        call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated(0) - before
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return {"peak_extra_bytes": extra, **device_events(profile.events() or [])}

    def graph(self, call: Call) -> Call | None:
        torch.cuda.synchronize()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda}


def device_named(name: str) -> Device:
    """Raises UsageError if it is unknown or cannot be measured here."""
    device = DEVICES[known("--device", [name], DEVICES)[0]]()
    problem = device.problem()
    if problem is not None:
        raise UsageError(f"--device {name} cannot be measured: {problem}")
    return device


def driver() -> str:
    """The version of NVIDIA's."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def device_events(events: Any) -> dict[str, int | str]:
    """Counts what a profiler saw on the device, where it also notes the host's annotations, such as a step's name."""
    cuda = torch._C._autograd.DeviceType.CUDA
    names = [e.name for e in events if e.device_type == cuda and not e.is_user_annotation]
    copies = [n for n in names if n.startswith(("Memcpy", "Memset"))]
    return {"launches": len(names) - len(copies), "copies": len(copies)}


def openmp_runtimes() -> int:
    """How many OpenMP runtimes are in the process, each with threads of its own."""
    files = {line.split()[-1] for line in _read("/proc/self/maps").splitlines() if "/" in line}
    return len({f for f in files if re.search(r"lib(gomp|iomp5|omp)[-.][^/]*$", f)})


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _bytes(text: str) -> int:
    """What the kernel writes, as in 32768K."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0

"""What the check of a machine with a GPU runs: plans of bash commands, most telling first, each with a time limit.

The second plan is for after the mends of what the first one found, the last for parameters and states in fewer bits.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from .toolkit import tool

PYTHON = f"{shlex.quote(sys.executable)} -m"
CHECKS, TESTS, BENCH = "checks.log", "tests.log", "bench.log"
GPU_TESTS = "tests/test_cuda_gpu.py tests/test_composition_gpu.py tests/test_low_gpu.py"
QUOTIENTS, LOW = "tests/test_quotients.py", "tests/test_low_gpu.py"
MORE_TESTS = "tests/test_{amp,profiling,gradient_release,readme,lightning}.py"
#: Without those whose tables fill a log.
SECTIONS = "{SpeedOfLight,SchedulerStats,WarpStateStats,MemoryWorkloadAnalysis,LaunchStats}"
BYTES = "dram__bytes_read.sum,dram__bytes_write.sum"


@dataclass(frozen=True)
class Step:
    """``says`` is a pattern that its output has to have. ``partly`` if what it has done by its limit is enough."""

    name: str
    log: str
    limit: float
    command: str
    says: str = ""
    partly: bool = False


def tests(name: str, limit: float, device: str, chosen: str, processes: int, files: str = GPU_TESTS) -> Step:
    """Without a GPU all are collected, counted and skipped; with one, some have to run. Plugins are named, since those
    of other packages take seconds to load; a line per test, for when it is cut; warnings of another torch are shown."""
    command = (
        f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive {PYTHON} pytest -p xdist "
        f"-n {processes} -p no:cacheprovider --continue-on-collection-errors -vv -W default --tb=short -m gpu "
        f"-k '{chosen}' {files}"
    )
    return Step(name, TESTS, limit, command, rf"\b[1-9]\d* {'passed' if device == 'cuda' else 'skipped'}")


def watched(name: str, limit: float, device: str, says: str, command: str, options: str = "") -> Step:
    """Steps under a tool. Every tensor gets memory of its own: an access beyond its end is one beyond an allocation."""
    program, _, how = command.partition(" ")
    command = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {shlex.quote(tool(program))} {how} {PYTHON} benchmarks.gpu.steps"
    return Step(name, CHECKS, limit, f"{command} --device {device} {options}", says)


def benchmark(name: str, limit: float, device: str, out: str, options: str) -> Step:
    chosen = options if device == "cuda" else "--case 465-groups"  # which does without a GPU
    command = f"{PYTHON} benchmarks.run --quick --goals --device {device} {chosen} --out {out}"
    return Step(name, BENCH, limit, command, r"\b[1-9]\d* of \d+ rows", partly=True)


def plans(device: str, folder: Path, prebuilt: str) -> dict[str, list[Step]]:
    """Triton's tests come last: its compiler takes seconds for each of their kernels."""
    out, huge, right = shlex.quote(str(folder)), "two_to_the_32", r"(?s) 0 wrong.*SUMMARY: 0 "
    peers = "--peer 'torch fused' --peer 'torch foreach'"
    both = f"{peers} --peer 'Triton backend'"
    few = "" if device == "cuda" else "--elements 65536"
    launched, switches = ("cuda", "") if device == "cuda" else ("none", "--case gpt2-small")
    # The clocks stay as they are, as everywhere; and our kernels alone, by name: those of torch would take the time.
    ncu = f"ncu --clock-control none -k regex:step_kernel --print-details all --section={SECTIONS} --metrics {BYTES}"
    sanitizer = "compute-sanitizer --kernel-name kns=fusedoptim --error-exitcode 86"
    library = f"{PYTHON} benchmarks.prebuild --install {shlex.quote(prebuilt)}"
    compared = f"{PYTHON} benchmarks.ab --device {device} --out {out}/ab.json {switches}"
    host = f"{PYTHON} benchmarks.host --device {launched} --out {out}/host.json"
    begin = [
        Step("device", CHECKS, 15, "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"),
        Step("libraries", CHECKS, 150, library, "libraries "),
        Step("self-check", CHECKS, 30, f"{PYTHON} fusedoptim", f"self-check: {device}, .* bits"),
    ]
    return {
        "first": [
            *begin,
            tests("GPU tests", 60, device, f"not triton and not {huge}", 6),
            tests("quotients", 15, device, "not skipped", 0, QUOTIENTS),
            tests("beyond 2^32", 25, device, f"not triton and {huge}", 0),
            benchmark("benchmarks", 65, device, f"{out}/first.json", peers),
            Step("host", BENCH, 20, host),
            watched("ncu", 30, device, "DRAM Throughput", ncu, "--profiled"),
            watched("memcheck", 30, device, right, sanitizer),
            watched("racecheck", 30, device, right, f"{sanitizer} --tool racecheck"),
            tests("Triton tests", 90, device, f"triton and not {huge} and not torch.float16 and not torch.float64", 8),
        ],
        "second": [
            *begin,
            tests("GPU tests", 60, device, f"not triton and not {huge}", 6),
            tests("quotients", 20, device, "not skipped", 0, QUOTIENTS),
            Step("A against B", BENCH, 60, compared, "built in", partly=True),
            watched("ncu", 30, device, "DRAM Throughput", ncu, "--profiled"),
            Step("launches", BENCH, 12, f"{PYTHON} benchmarks.launch_cost", "on the device"),
            benchmark("benchmarks", 85, device, f"{out}/second.json", both),
            tests("more tests", 40, device, "not triton", 6, MORE_TESTS),
            tests("Triton tests", 90, device, f"triton and not {huge}", 8),
        ],
        "low": [
            *begin,
            tests("CUDA tests", 75, device, "not triton", 6, LOW),
            Step("storages", BENCH, 40, f"{PYTHON} benchmarks.storages --device {device} {few} --out {out}/low.json"),
            watched("memcheck", 40, device, right, sanitizer, "--low"),
            tests("Triton tests", 90, device, "triton", 8, LOW),
        ],
    }

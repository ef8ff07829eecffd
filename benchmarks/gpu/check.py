"""``bash benchmarks/gpu_check.sh OUTDIR --plan first``: what a GPU is needed for, most telling first, for a machine
that is at hand for minutes. ``--plan second`` is for after the mends of what the first one found.

A step is a command with a time limit; what happens to one is nothing to the others. OUTDIR gets summary.txt, renewed
before and after every step, results as they come, and the ends of the logs: at most 8 files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import arguments
from ..common.commit import commit
from ..common.files import make_folder, write_atomically
from .toolkit import tool

ROOT = Path(__file__).parents[2]
#: For a plan, and how many of them are for ending; for a step that is told to end; less is not worth starting one.
SECONDS, RESERVE, GRACE, LEAST = 330.0, 6.0, 4.0, 3.0
KEPT, SMALL = 200_000, "465-groups"  # bytes of what a step says; a case that does without a GPU
PASSED, FAILED, TRITON = "passed", "FAILED", ("--peer", "Triton backend")
CHECKS, TESTS, BENCH = "checks.log", "tests.log", "bench.log"
GPU_TESTS, QUOTIENTS = ("tests/test_cuda_gpu.py", "tests/test_composition_gpu.py"), ("tests/test_quotients.py",)
MORE_TESTS = tuple(f"tests/test_{name}.py" for name in ("amp", "profiling", "gradient_release", "readme", "lightning"))
SECTIONS = "SpeedOfLight SchedulerStats WarpStateStats MemoryWorkloadAnalysis LaunchStats Occupancy"


@dataclass(frozen=True)
class Step:
    """``says`` is a pattern that its output has to have. ``partly`` if what it has done by its limit is enough."""

    name: str
    log: str
    limit: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    partly: bool = False


def python(module: str, *options: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, options)]


def tests(name: str, limit: float, device: str, chosen: str, processes: int, files: Sequence[str] = GPU_TESTS) -> Step:
    """Without a GPU all are collected, counted and skipped; with one, some have to run. Plugins are named, since those
    of other packages take seconds to load; a line per test, for when it is cut; warnings of another torch are shown."""
    options = ["-p", "xdist", "-n", processes, "-p", "no:cacheprovider", "--continue-on-collection-errors", "-vv"]
    command = python("pytest", *options, "-W", "default", "--tb=short", "-m", "gpu", "-k", chosen, *files)
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return Step(name, TESTS, limit, command, environment, rf"\b[1-9]\d* {'passed' if device == 'cuda' else 'skipped'}")


def watched(name: str, limit: float, device: str, says: str, command: Sequence[str], *options: str) -> Step:
    """Steps under a tool. Every tensor gets memory of its own: an access beyond its end is one beyond an allocation."""
    command = [tool(command[0]), *command[1:], *python("benchmarks.gpu.steps", "--device", device, *options)]
    return Step(name, CHECKS, limit, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, says)


def benchmark(name: str, limit: float, device: str, out: Path, *options: str) -> Step:
    chosen = options if device == "cuda" else ("--case", SMALL)
    command = python("benchmarks.run", "--quick", "--goals", "--device", device, *chosen, "--out", out)
    return Step(name, BENCH, limit, command, says=r"\b[1-9]\d* of \d+ rows", partly=True)


def plans(device: str, out: Path, prebuilt: str) -> dict[str, list[Step]]:
    """Triton's tests come last: its compiler takes seconds for each of their kernels."""
    peers = ["--peer", "torch fused", "--peer", "torch foreach"]
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    compared = ["--device", device, "--out", out / "ab.json", *([] if device == "cuda" else ["--switch", "overlap"])]
    begin = [
        Step("device", CHECKS, 15, smi),
        Step("libraries", CHECKS, 150, python("benchmarks.prebuild", "--install", prebuilt), says="libraries "),
        Step("self-check", CHECKS, 40, python("fusedoptim"), says=f"self-check: {device}, .* bits"),
    ]
    # The clocks stay as they are, as everywhere; and our kernels alone, by name: those of torch would take the time.
    ncu = ["ncu", "--clock-control", "none", "-k", "regex:step_kernel", "--print-details", "all"]
    ncu += [f"--section={name}" for name in SECTIONS.split()]
    sanitizer = ["compute-sanitizer", "--kernel-name", "kns=fusedoptim", "--error-exitcode", "86"]
    right, huge, launched = r"(?s) 0 wrong.*SUMMARY: 0 ", "two_to_the_32", device.replace("cpu", "none")
    return {
        "first": [
            *begin,
            tests("GPU tests", 60, device, f"not triton and not {huge}", 6),
            tests("quotients", 15, device, "not skipped", 0, QUOTIENTS),
            tests("beyond 2^32", 25, device, f"not triton and {huge}", 0),
            benchmark("benchmarks", 65, device, out / "first.json", *peers),
            Step("host", BENCH, 20, python("benchmarks.host", "--device", launched, "--out", out / "host.json")),
            watched("ncu", 25, device, "DRAM Throughput", ncu, "--large"),
            watched("memcheck", 35, device, right, sanitizer),
            watched("racecheck", 30, device, right, [*sanitizer, "--tool", "racecheck"]),
            tests("Triton tests", 90, device, f"triton and not {huge} and not torch.float16 and not torch.float64", 8),
        ],
        "second": [
            *begin,
            tests("GPU tests", 45, device, f"not triton and not {huge}", 6),
            Step("A against B", BENCH, 60, python("benchmarks.ab", *compared), says="built in", partly=True),
            Step("launches", BENCH, 12, python("benchmarks.launch_cost"), says="on the device"),
            benchmark("benchmarks", 90, device, out / "second.json", *peers, *TRITON),
            benchmark("last goals", 45, device, out / "left.json", *peers, *TRITON, "--reverse"),
            tests("Triton tests", 60, device, f"triton and not {huge}", 8),
            tests("more tests", 30, device, "not triton", 6, MORE_TESTS),
        ],
    }


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """As Ctrl-C does, which is the moment to write down what there is; then with all that the step has started."""
    for number in (signal.SIGINT, signal.SIGKILL)[0 if grace else 1 :]:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(grace or None)


def run(step: Step, out: Path, limit: float) -> tuple[str, str]:
    """Whether it passed, and what there is to say about it."""
    log, cut = out / step.log, ""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("ab") as f:
        f.write(f"==== {step.name}: {shlex.join(step.command)}\n".encode())
        f.flush()
        start = f.tell()
        how: Any = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": f, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(step.command, env=environment, start_new_session=True, **how)
        except OSError as error:
            return FAILED, f"cannot be started: {error}"
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        cut = f"cut after {limit:.0f} s: "
        end(process, GRACE)
    finally:
        end(process, 0)  # also what it has left behind, and if this process is told to end
        content = log.read_bytes()
        text = content[start:].rstrip() + b"\n"
        text = text if len(text) <= KEPT else b"[...] " + text[-KEPT:]
        log.write_bytes(content[:start] + text)
    words = text.decode(errors="replace")
    found = re.search(step.says, words) is not None
    right = found and (step.partly if cut else process.returncode == 0)
    why = cut or ("" if right else f"exit code {process.returncode}: ") + ("" if found else f"no {step.says!r}: ")
    return PASSED if right else FAILED, (why + words.rstrip(" =\n").rpartition("\n")[2].strip(" =")[:160]).rstrip()


def check(plan: str, steps: Sequence[Step], head: str, out: Path, seconds: float = SECONDS) -> int:
    """Runs the steps within the time. How many failed, or were not run."""
    begun = time.monotonic()
    rows = {s.name: ("", 0.0, "not run") for s in steps}

    def write() -> str:
        passed = sum(state == PASSED for state, _, _ in rows.values())
        lines = [f"{name:<14}{state:<8}{spent:>6.1f} s  {note}" for name, (state, spent, note) in rows.items()]
        said = f"{passed} passed, {len(rows) - passed} failed, {time.monotonic() - begun:.0f} s"
        lines.append(f"GPU CHECK, {plan} plan: {said}")
        text = "\n".join([head, *lines, ""])
        write_atomically(out / "summary.txt", lambda f: f.write(text.encode()))
        return text

    try:
        for step in steps:
            start = time.monotonic()
            left = begun + seconds - RESERVE - start
            rows[step.name] = ("", 0.0, "running, or interrupted")
            write()
            state, note = run(step, out, min(step.limit, left)) if left > LEAST else (FAILED, "no time was left")
            rows[step.name] = (state, time.monotonic() - start, note)
            print(f"{step.name}: {state} {note}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    for partial in out.glob(".*.partial"):  # of a step that was killed while it wrote
        partial.unlink()
    print(f"\n{write()}", end="", flush=True)
    return sum(state != PASSED for state, _, _ in rows.values())


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="bash benchmarks/gpu_check.sh", description=__doc__)
    p.add_argument("out", metavar="OUTDIR", type=Path, help="results come here, beside what is there")
    p.add_argument("--plan", default="first", choices=("first", "second"))
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu tries the plan where no GPU is")
    p.add_argument("--prebuilt", metavar="DIR", default="none", help="libraries made by benchmarks.prebuild")
    p.add_argument("--commit", help="which one this is, where there is no history")
    p.add_argument("--only", metavar="STEP", action="append", help="only these steps; can be repeated")
    args = p.parse_args(argv)
    os.environ["FUSEDOPTIM_COMMIT"] = args.commit or commit()
    make_folder(args.out, "OUTDIR")
    steps = plans(args.device, args.out.resolve(), args.prebuilt)[args.plan]
    chosen = arguments.known("--only", args.only, [s.name for s in steps])
    for number in (signal.SIGINT, signal.SIGTERM):  # also where they were ignored, which steps would inherit
        signal.signal(number, signal.default_int_handler)
    now = datetime.datetime.now(datetime.timezone.utc)
    head = f"fusedoptim, commit {commit()}, {now:%Y-%m-%dT%H:%M:%SZ}, device {args.device}"
    return min(1, check(args.plan, [s for s in steps if s.name in chosen], head, args.out.resolve()))


if __name__ == "__main__":
    arguments.run(main)

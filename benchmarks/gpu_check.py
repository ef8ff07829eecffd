"""``bash benchmarks/gpu_check.sh OUTDIR``: everything that a GPU is needed for, most important first, within 9 minutes.

Builds, runs the GPU tests, measures the goals' rows, runs small steps under compute-sanitizer and large ones under ncu,
and measures more rows in the time left. OUTDIR gets summary.txt, which is renewed after every part, logs cut to their
ends, and the measurements. The exit code is 0 if no part failed; a goal that is missed is shown, and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from . import arguments, parts, verdicts
from .commit import commit
from .errors import UsageError
from .files import make_folder, temporary, write_atomically
from .goals import GOALS, key
from .parts import ABSENT, FAILED, PASSED, ROOT, Finding, Interrupted, Part, Verdict
from .results import Result, load

#: Seconds for everything, and how many of them are for ending and writing.
TOTAL, RESERVE = 540.0, 14.0
SUMMARY, BENCH, WIDER = "summary.txt", "bench.json", "wider.json"
BUILD_LOG, TESTS_LOG, TOOLS_LOG, BENCH_LOG = "build.log", "tests.log", "tools.log", "bench.log"
FILES = (SUMMARY, BUILD_LOG, TESTS_LOG, TOOLS_LOG, BENCH_LOG, BENCH, WIDER, parts.RUNNING)
#: What a part leaves that is killed while it writes.
HALF_WRITTEN = tuple(temporary(Path(name)).name for name in FILES)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: What compute-sanitizer exits with if it found something; no program's own exit code.
FOUND = 86
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    "launch__registers_per_thread",
)


def tool(name: str) -> str | None:
    """On the PATH or in the CUDA toolkit, whose folder is that of nvcc if no variable names it."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    folders = [f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which(name) or next((found for f in folders if (found := shutil.which(name, path=f))), None)


def python(module: str, *options: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, options)]


def all_parts(device: str, out: Path, scratch: Path, tests: list[str] | None = None) -> list[Part]:
    """Most important first. The limits add up to more than there is: what a part leaves over, the next ones have."""
    gpu = device == "cuda"
    quick = ["--device", device, "--quick", "--no-scaling"]
    goals: list[object] = ["--goals", "--peer", "torch fused", "--peer", "torch foreach"]
    goals += ["--peer", "Triton backend"]
    wider: list[object] = ["--device", device, "--quick"]
    if not gpu:
        goals = ["--case", "2000x64", "--dtype", "fp32", "--optimizer", "AdamW", "--peer", "torch fused"]
        wider += ["--case", "465-groups", "--dtype", "fp32", "--optimizer", "SGD", "--peer", "none"]
    # Triton compiles for every test; the CUDA kernels and the goals come first.
    marked, first, later = marked_tests(), [], []
    if tests is None and gpu:
        first, later = [*marked, "-k", "not triton"], [*marked, "-k", "triton"]
    return [
        Part(
            "build",
            BUILD_LOG,
            180,
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            functools.partial(verdicts.build, cuda=gpu),
            # For this machine's GPU, whatever an image was set up for; and not without CUDA.
            {"TORCH_CUDA_ARCH_LIST": "", "FUSEDOPTIM_BUILD_CUDA": "1"} if gpu else {},
        ),
        Part("self-check", BUILD_LOG, 60, python("fusedoptim"), functools.partial(verdicts.self_check, backend=device)),
        # Without a GPU, tests that take a moment stand for those that need one.
        pytest("tests", 120, first or tests or ["tests/test_rounding.py"], scratch),
        Part(
            "benchmarks",
            BENCH_LOG,
            170,
            python("benchmarks.run", *quick, *goals, "--out", out / BENCH),
            functools.partial(verdicts.benchmarks, path=out / BENCH, whole=True),
        ),
        *([pytest("Triton tests", 120, later, scratch)] if later else []),
        *(sanitizer(name, device) for name in TOOLS),
        ncu(device),
        Part(
            "more benchmarks",
            BENCH_LOG,
            TOTAL,
            python("benchmarks.run", *wider, "--out", out / WIDER),
            functools.partial(verdicts.benchmarks, path=out / WIDER, whole=False),
            least=20.0,
        ),
    ]


def pytest(name: str, limit: float, selection: list[str], scratch: Path) -> Part:
    report = scratch / f"{name}.xml"
    # The repository's settings make warnings errors; the lack of NumPy, which torch warns of, is none.
    numpy = "ignore:Failed to initialize NumPy:UserWarning"
    options = ["-p", "no:cacheprovider", "--tb=short", "-rfEs", "-W", numpy, f"--junitxml={report}"]
    judge = functools.partial(verdicts.tests, report=report)
    command = python("pytest", *options, *selection)
    return Part(name, TESTS_LOG, limit, command, judge, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


def sanitizer(name: str, device: str) -> Part:
    program = tool("compute-sanitizer")
    absent = None
    if program is None:
        absent = Verdict(FAILED if device == "cuda" else ABSENT, "compute-sanitizer was not found")
    options = ["--tool", name, "--target-processes", "all", "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command = [str(program), *options, *python("benchmarks.gpu_steps", "--device", device)]
    if device == "cuda" and name != "memcheck":
        command += ["--backend", "cuda"]  # Triton's compiler places the barriers of its kernels
    # Every tensor gets memory of its own, so that an access beyond its end is one beyond an allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    judge = functools.partial(verdicts.sanitizer, found=FOUND)
    return Part(name, TOOLS_LOG, 50, command, judge, environment, absent, least=15.0 if device == "cuda" else 5.0)


def ncu(device: str) -> Part:
    program = tool("ncu")
    absent = Verdict(ABSENT, "ncu was not found") if program is None else None
    # The clocks stay as they are.
    options = ["--target-processes", "all", "--clock-control", "none", "-k", "regex:step_kernel", "--csv"]
    command = [str(program), *options, "--metrics", ",".join(METRICS)]
    command += python("benchmarks.gpu_steps", "--device", device, "--large")
    return Part("ncu", TOOLS_LOG, 45, command, verdicts.ncu, absent=absent)


def marked_tests() -> list[str]:
    """Those files alone: others may need what is not installed."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return ["-m", "gpu", *(str(f.relative_to(ROOT)) for f in files if "pytest.mark.gpu" in f.read_text())]


def machine(device: str) -> str:
    """What the parts run on and with, as far as it can be told without torch."""
    versions = []
    for name in ("torch", "triton", "pytest"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    found = f"{os.cpu_count()} cores"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            shown = subprocess.run(query, capture_output=True, text=True, timeout=20)
            found += f"; {'; '.join(shown.stdout.split(chr(10))).rstrip('; ') or 'nvidia-smi shows no GPU'}"
        except (OSError, subprocess.TimeoutExpired) as error:
            found += f"; nvidia-smi cannot be run ({type(error).__name__})"
    return f"{found}; Python {sys.version.split()[0]}, {', '.join(versions)}"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def goal_lines(device: str, out: Path) -> list[str]:
    """Every goal, whether it was measured or not."""
    try:
        rows = {key(r): r for r in load(out / BENCH).rows}
    except UsageError:
        rows = {}
    table: list[tuple[str, ...]] = [("row", "goal", "found", "")]
    for name, goals in GOALS[device].items():
        for goal in goals:
            row = rows.get(name, {})
            reached = goal.reached_in(row)
            word = {True: "reached", False: "MISSED", None: "not measured"}[reached]
            reason = row.get("skipped") or row.get("failed") or _problem(row, goal.of)
            found = "" if reached is None else f"{goal.found_in(row):.3g}"
            table.append((" ".join(name), str(goal), found, f"{word}: {reason}" if reason else word))
    return columns(table)


def _problem(row: Result, contender: str) -> str | None:
    found: dict[str, str] = row.get("contenders", {}).get(contender, {})
    return found.get("failed") or found.get("skipped")


class Check:
    """What has been found so far, and the file that says so."""

    def __init__(self, device: str, out: Path, plan: list[Part]) -> None:
        self.device, self.out, self.plan = device, out, plan
        self.findings: list[Finding] = []
        self.interrupted = False
        self.begun = time.monotonic()
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.head = [f"fusedoptim, commit {commit()}, {date}, device {device}", machine(device)]

    def count(self, state: str) -> int:
        return sum(f.verdict.state == state for f in self.findings)

    @property
    def failed(self) -> int:
        """What has not been run counts as failed."""
        return len(self.plan) - self.count(PASSED) - self.count(ABSENT)

    def summary(self) -> str:
        found = {f.part.name: f for f in self.findings}
        table: list[tuple[str, ...]] = [("part", "result", "seconds", "")]
        for part in self.plan:
            finding = found.get(part.name)
            if finding is None:
                table.append((part.name, FAILED, "", "not run: interrupted" if self.interrupted else "not run yet"))
            else:
                table.append((part.name, finding.verdict.state, f"{finding.seconds:.1f}", finding.verdict.note))
        spent = f"{time.monotonic() - self.begun:.0f} s in all"
        last = f"GPU CHECK: {self.count(PASSED)} passed, {self.failed} failed"
        goals = ["", *goal_lines(self.device, self.out)] if any(p.name == "benchmarks" for p in self.plan) else []
        return "\n".join([*self.head, *goals, "", *columns(table), "", spent, last]) + "\n"

    def write(self) -> None:
        write_atomically(self.out / SUMMARY, lambda f: f.write(self.summary().encode()))

    def run(self, seconds: float) -> None:
        end = self.begun + seconds - RESERVE
        self.write()
        for number, part in enumerate(self.plan, 1):
            print(f"[{number}/{len(self.plan)}] {part.name} ...", flush=True)
            finding = parts.run(part, self.out, end)
            self.add(finding)
            print(f"    {finding.verdict.state} {finding.verdict.note}".rstrip(), flush=True)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.write()


def remove(out: Path, names: Iterable[str]) -> None:
    for name in names:
        (out / name).unlink(missing_ok=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = arguments.Parser(prog="bash benchmarks/gpu_check.sh", description=__doc__)
    p.add_argument("out", metavar="OUTDIR", type=Path, help="the folder for at most 8 small files; its earlier ones go")
    default = os.environ.get("FUSEDOPTIM_CHECK_DEVICE", "cuda")
    p.add_argument("--device", default=default, help="cpu tries what can be tried without a GPU (default: cuda)")
    p.add_argument("--seconds", type=float, default=TOTAL, help=f"for everything (default: {TOTAL:.0f})")
    p.add_argument("--part", action="append", help="only these parts; can be repeated")
    p.add_argument("--tests", nargs="+", help="tests to run instead of those marked gpu")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = arguments.known("--device", [args.device], GOALS)[0]
    make_folder(args.out, "OUTDIR")
    out = args.out.resolve()
    remove(out, (*FILES, *HALF_WRITTEN))
    with tempfile.TemporaryDirectory() as scratch:
        plan = all_parts(device, out, Path(scratch), args.tests)
        chosen = arguments.known("--part", args.part, [p.name for p in plan])
        check = Check(device, out, [p for p in plan if p.name in chosen])
        parts.interruptible()
        try:
            check.run(args.seconds)
        except Interrupted as interrupt:
            check.interrupted = True
            if interrupt.args and isinstance(interrupt.args[0], Finding):
                check.add(interrupt.args[0])
        check.write()
    remove(out, (parts.RUNNING, *HALF_WRITTEN))
    print(f"\n{check.summary()}", end="", flush=True)
    return 1 if check.failed else 0


if __name__ == "__main__":
    arguments.run(main)

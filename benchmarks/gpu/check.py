"""``bash benchmarks/gpu_check.sh OUTDIR --plan first``: what a GPU is needed for, where one is at hand for minutes.

A step is a command with a time limit; what happens to one is nothing to the others. OUTDIR gets summary.txt, renewed
before and after every step, results as they come, and the ends of the logs: at most 8 files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import arguments
from ..common.commit import commit
from ..common.files import make_folder, write_atomically
from .plans import Step, plans

ROOT = Path(__file__).parents[2]
#: For a plan, and how many of them are for ending; for a step that is told to end; less is not worth starting one.
SECONDS, RESERVE, GRACE, LEAST = 330.0, 6.0, 4.0, 3.0
KEPT = 200_000  # bytes of what a step says
PASSED, FAILED = "passed", "FAILED"


def end(process: subprocess.Popen[bytes], *signals: signal.Signals) -> None:
    """Of the step and all that it has started, which has some time after each signal."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


def run(step: Step, out: Path, limit: float) -> tuple[str, str]:
    """Whether it passed, and what there is to say about it."""
    log, cut = out / step.log, ""
    with log.open("ab") as f:
        f.write(f"==== {step.name}: {step.command}\n".encode())
        start = f.tell()
        f.flush()
        how: Any = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(["bash", "-c", step.command], cwd=ROOT, **how)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        cut = f"cut after {limit:.0f} s: "
        end(process, signal.SIGINT)  # as Ctrl-C does: the moment to write down what there is
    finally:
        end(process, signal.SIGKILL)  # also what it has left behind, and if this process is told to end
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
        text = "\n".join([head, *lines, f"GPU CHECK, {plan} plan: {said}", ""])
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
    p.add_argument("--plan", default="first", choices=("first", "second", "low"))
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu tries the plan where no GPU is")
    p.add_argument("--prebuilt", metavar="DIR", default="none", help="libraries made by benchmarks.prebuild")
    p.add_argument("--commit", help="which one this is, where there is no history")
    p.add_argument("--only", metavar="STEP", action="append", help="only these steps; can be repeated")
    args = p.parse_args(argv)
    os.environ |= {"FUSEDOPTIM_COMMIT": args.commit or commit(), "PYTHONUNBUFFERED": "1"}
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

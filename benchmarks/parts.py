"""Runs commands one after another, each within a time limit and all within one, and keeps what they said.

Without torch, so that a broken installation is a finding like any other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
PASSED, FAILED, ABSENT = "passed", "failed", "not available"
#: Seconds that a command gets to write down what it has once it was interrupted.
GRACE = 8.0
#: Bytes that are kept of what one command says, and of a log that several share.
KEPT, LOG = 60_000, 250_000
#: What the running command says, until it has ended.
RUNNING = "running.log"


class Interrupted(BaseException):
    """The process was asked to end."""


def interruptible() -> None:
    """Makes the first signal that asks to end an exception, and ignores further ones. Signals that are caught have
    their default effect in children, also where they were ignored before."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for s in signals:
            signal.signal(s, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    for s in signals:
        signal.signal(s, interrupt)


@dataclass(frozen=True)
class Outcome:
    """``code`` is None if the command could not be started; ``cut`` says why it was ended from outside."""

    code: int | None
    output: str
    cut: str | None = None

    @property
    def last_line(self) -> str:
        lines = [text for text in self.output.splitlines() if text.strip()]
        return lines[-1].strip()[:200] if lines else "it said nothing"


@dataclass(frozen=True)
class Verdict:
    state: str
    note: str = ""


Judge = Callable[[Outcome], Verdict]


def exit_code(outcome: Outcome) -> Verdict:
    if outcome.cut is not None:
        return Verdict(FAILED, outcome.cut)
    if outcome.code != 0:
        return Verdict(FAILED, f"exit code {outcome.code}: {outcome.last_line}")
    return Verdict(PASSED)


@dataclass(frozen=True)
class Part:
    """``judge`` says what counts as passed. ``absent`` is a verdict that was clear from the start, without a run."""

    name: str
    log: str
    limit: float
    command: Sequence[str] = ()
    judge: Judge = exit_code
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: Verdict | None = None
    #: Not worth starting with fewer seconds.
    least: float = 5.0


@dataclass(frozen=True)
class Finding:
    part: Part
    verdict: Verdict
    seconds: float = 0.0


def run(part: Part, folder: Path, end: float) -> Finding:
    """Runs a part before ``end``, a time of time.monotonic. Raises Interrupted only after the part is no more, with a
    finding as its argument."""
    if part.absent is not None:
        return Finding(part, part.absent)
    begun = time.monotonic()
    limit = min(part.limit, end - begun)
    if limit < part.least:
        return Finding(part, Verdict(FAILED, f"not run: {max(limit, 0):.0f} s were left, it takes {part.least:.0f}"))
    try:
        outcome = _outcome(part, folder, limit)
    except Interrupted as interrupt:
        verdict = Verdict(FAILED, f"ended by {interrupt}")
        raise Interrupted(Finding(part, verdict, time.monotonic() - begun)) from interrupt
    try:
        verdict = part.judge(outcome)
    except Exception as error:  # what a command left behind is anyone's guess
        verdict = Verdict(FAILED, f"its result cannot be read: {type(error).__name__}: {error}"[:200])
    return Finding(part, verdict, time.monotonic() - begun)


def _outcome(part: Part, folder: Path, limit: float) -> Outcome:
    running = folder / RUNNING
    code, cut, interrupt = None, None, None
    try:
        with running.open("wb") as output:
            try:
                process = subprocess.Popen(
                    part.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome(None, "", f"cannot be started: {error}")
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                cut = f"cut after {limit:.0f} s"
                code = _end(process, GRACE)
            except Interrupted as error:
                interrupt = error
                code = _end(process, GRACE / 4)
            finally:
                _kill(process)
        return Outcome(code, end_of(running, KEPT), cut)
    finally:
        _keep(running, folder / part.log, f"==== {part.name}: {' '.join(part.command)}\n", cut)
        if interrupt is not None:
            raise interrupt


def _end(process: subprocess.Popen[bytes], grace: float) -> int:
    """As Ctrl-C does, which Python programs take as the moment to write down what they have."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _kill(process)
    return process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_of(path: Path, most: int) -> str:
    """The last bytes of a file, from the beginning of a line on."""
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - most))
        text = f.read().decode(errors="replace")
    return text if size <= most else f"[the first {size - most} bytes are left out]\n{text.partition(chr(10))[2]}"


def _keep(running: Path, log: Path, header: str, cut: str | None) -> None:
    text = end_of(running, KEPT)
    with log.open("a") as f:
        f.write(header + text + ("" if text.endswith("\n") else "\n") + (f"[{cut}]\n" if cut else ""))
    running.unlink()
    if log.stat().st_size > LOG:
        log.write_text(end_of(log, LOG))

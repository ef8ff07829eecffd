"""Functions that run on N processes of a gloo group, on the CPU.

``run`` keeps one set of processes per world size while pytest runs, because a start takes longer than most tests.
``run_apart`` starts processes of their own, for ranks that die or hang. Functions are found by name in a module of
tests; what they take and give must be what ``torch.save`` can write, so shards instead of DTensors.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import gc
import importlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: torch's optimizers import torch._dynamo at their first use, which takes every process a second.
PRELOADED = [
    "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "fusedoptim", "pytest",
]  # fmt: skip
#: Those of them that tests of this run have imported, which would take every process seconds.
LIBRARIES = ["lightning.pytorch", "accelerate", "transformers.trainer"]
TIMEOUT, GRACE = 120.0, 3.0  # seconds: of a function; of the others, once one rank has raised or died


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


@dataclass
class Outcome:
    """What became of one rank: the exception's type and text, or the code with which its process ended."""

    result: Any = None
    error: str | None = None
    trace: str = ""
    exit_code: int | None = None

    @property
    def bad(self) -> bool:
        return self.error is not None or self.exit_code is not None


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What the function gives on every rank."""
    ranks = _kept.pop(world, None) or Ranks(world, TIMEOUT)
    try:
        outcomes = ranks.call(function, args, timeout)
        if any(o.bad for o in outcomes):
            told = [_tell(rank, o, ranks.written(rank, "out")) for rank, o in enumerate(outcomes) if o.bad]
            raise RankFailure("\n".join(told))
    except BaseException:
        ranks.stop()  # who knows where they stand
        raise
    _kept[world] = ranks
    return [o.result for o in outcomes]


def run_apart(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, group_timeout: float = TIMEOUT
) -> list[Outcome]:
    """What became of every rank. One that has not ended after ``timeout`` seconds is a failure; collectives end after
    ``group_timeout``."""
    ranks = Ranks(world, group_timeout)
    try:
        return ranks.call(function, args, timeout, grace=timeout)
    finally:
        ranks.stop()


class Ranks:
    """The processes of one group."""

    def __init__(self, world: int, group_timeout: float) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = multiprocessing.Pipe()
            args = (rank, world, self.folder.name, group_timeout, theirs)
            process = context().Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)
        for connection in self.connections:  # however long a start takes, it counts for no function's time
            with contextlib.suppress(EOFError, ConnectionResetError):  # call() says what became of it
                if connection.poll(TIMEOUT):
                    connection.recv_bytes()

    def call(
        self, function: Callable[..., Any], args: Any, timeout: float, grace: float | None = None
    ) -> list[Outcome]:
        grace = GRACE if grace is None else grace
        task = _pack((function.__module__, function.__qualname__, args))
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # a rank that died at its start
                connection.send_bytes(task)
        outcomes: dict[int, Outcome] = {}
        end = time.monotonic() + timeout
        while len(outcomes) < len(self.connections):
            silent = {c: rank for rank, c in enumerate(self.connections) if rank not in outcomes}
            ready = wait(list(silent), max(0.0, end - time.monotonic()))
            if not ready:
                raise RankFailure(self._who_waits(list(silent.values()), outcomes))
            for connection in ready:
                outcomes[silent[connection]] = outcome = self._receive(silent[connection], connection)
                end = min(end, time.monotonic() + grace) if outcome.bad else end
        return [outcomes[rank] for rank in range(len(outcomes))]

    def _receive(self, rank: int, connection: Any) -> Outcome:
        try:
            return _unpack(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE)
            return Outcome(exit_code=self.processes[rank].exitcode)

    def _who_waits(self, silent: list[int], outcomes: dict[int, Outcome]) -> str:
        """With the stack of every rank that did not answer."""
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        parts = [_tell(rank, o, self.written(rank, "out")) for rank, o in sorted(outcomes.items())]
        return "\n".join(parts + [f"rank {r} did not answer; it stands at\n{self.written(r, 'stack')}" for r in silent])

    def written(self, rank: int, kind: str) -> str:
        path = Path(self.folder.name, f"{rank}.{kind}")
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def stop(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        self.folder.cleanup()


_kept: dict[int, Ranks] = {}


@atexit.register
def _stop_all() -> None:
    for ranks in _kept.values():
        ranks.stop()


def context() -> Any:
    """Processes come from one that has imported torch and started no thread: 0.1 s instead of 3."""
    context = multiprocessing.get_context("forkserver")
    libraries = [name for name in LIBRARIES if name.partition(".")[0] in sys.modules]
    context.set_forkserver_preload(PRELOADED + libraries)
    return context


def _tell(rank: int, outcome: Outcome, output: str) -> str:
    ended = f"ended with exit code {outcome.exit_code}: {output}" if outcome.bad else "returned"
    return f"rank {rank} " + (ended if outcome.error is None else f"raised {outcome.trace}")


def _pack(x: object) -> bytes:
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, world: int, folder: str, timeout: float, connection: Connection) -> None:
    """One rank: answers until nobody asks. It leaves at once, as gloo's threads end a process that runs down with an
    abort now and then."""
    stack, out = (os.open(f"{folder}/{rank}.{kind}", os.O_CREAT | os.O_WRONLY) for kind in ("stack", "out"))
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported, no collection of this process has to look at
    group = {"init_method": f"file://{folder}/rendezvous", "timeout": datetime.timedelta(seconds=timeout)}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, **group)
        connection.send_bytes(b"ready")
        with contextlib.suppress(EOFError):
            while True:
                connection.send_bytes(_answer(*_unpack(connection.recv_bytes())))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _answer(module: str, name: str, args: tuple[Any, ...]) -> bytes:
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return _pack(Outcome(function(*args)))
    except BaseException as error:
        return _pack(Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc()))

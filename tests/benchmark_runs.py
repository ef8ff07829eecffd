"""Runs of the benchmarks that take a moment, for the tests of them."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.measure import devices, limits, plan, rough
from benchmarks.measure.cases import CASES, Case
from benchmarks.measure.devices import Cpu
from benchmarks.measure.optimizers import DTYPES, SETTINGS, Work
from benchmarks.measure.peers import PEERS, Peer
from benchmarks.measure.timing import Budget

MIB = 1 << 20
TINY = Case("tiny", ((64,), (3, 5), (1,)))
#: All arguments of a run that takes a moment.
ARGUMENTS = ["--case", "tiny", "--optimizer", "AdamW", "--dtype", "fp32"]
Options = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Garbage is collected before every row; what torch and pytest hold need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, small caches and limits, a moment per row."""
    torch.set_num_threads(1)
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setattr(Cpu, "cache_bytes", lambda self: MIB)
    monkeypatch.setattr(devices, "openmp_runtimes", lambda: 1)  # spares the pauses that several of them need
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", MIB)
    monkeypatch.setitem(limits.STREAM_ELEMENTS, "cpu", 1 << 12)
    for module, name in ((run, "FULL"), (run, "QUICK"), (rough, "BUDGET")):
        monkeypatch.setattr(module, name, Budget(0.01, at_most=7))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def measured(tmp_path: Path) -> Options:
    """Runs the program; gives its exit code and its results file."""

    def start(*options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        code = run.main(["--device", "cpu", *options, "--out", str(out)])
        return code, json.loads(out.read_text())

    return start


def add_peer(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[..., Any], **more: Any) -> None:
    monkeypatch.setitem(PEERS, name, Peer(name, make, {"AdamW": tuple(DTYPES)}, **more))


def torch_adamw(work: Work, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **work.setting.options)


def row_of(case: Case, condition: str = "kept") -> plan.Row:
    return plan.Row(Work(SETTINGS["AdamW"], DTYPES["fp32"]), case, plan.CONDITIONS[condition])

"""The benchmark of a step's time on the host: what it says, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import fusedoptim
from benchmarks import host
from benchmarks.common.arguments import UsageError
from benchmarks.measure import no_launch
from fusedoptim import _native

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or _native._C is None, reason="needs g++ and the library")
QUICK = ["--seconds", "0", "--optimizer", "sgd", "--case", "1x8"]


def test_a_run_says_which_goals_are_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(host.GOALS, "1x8", 1e9)
    monkeypatch.setitem(host.GOALS, "465-groups", 0.0)
    out, threads = tmp_path / "host.json", torch.get_num_threads()
    assert host.main([*QUICK, "--case", "465-groups", "--pause", "0", "--pause", "0.001", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["environment"]["torch"] == torch.__version__
    found = {(r["case"], r["pause"]): (r["what"], r["goal"], r["reached"]) for r in content["rows"]}
    assert found == {
        ("1x8", 0): ("host, no launch", 1e9, True),
        ("465-groups", 0): ("host, no launch", 0.0, False),
        ("1x8", 0.001): ("host, no launch", None, None),
        ("465-groups", 0.001): ("host, no launch", None, None),
    }
    for row in content["rows"]:
        assert 0 < row["us"]["min"] <= row["us"]["median"] and row["us"]["n"] == (3 if row["pause"] else 3 * host.STEPS)
        assert row["threads"] == threads
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| host, no launch")]
    assert len(lines) == 4
    assert lines[0].endswith("| <= 1e+09 |") and lines[1].endswith("| <= 0 (missed) |") and lines[2].endswith("|  |")
    assert torch.get_num_threads() == threads


def test_nothing_is_launched_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(no_launch.VARIABLE, "another")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with no_launch.no_launch():
        optimizer = fusedoptim.AdamW([p], backend="cuda")
        for _ in range(2):
            optimizer.step()
        assert (p == 1).all() and optimizer.state[p]["step"] == 0
        assert p._version == 2  # autograd is told all the same
    assert os.environ[no_launch.VARIABLE] == "another"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot be used"):
        fusedoptim.AdamW([p], backend="cuda")
    _native.cuda_problem.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux, to count threads")
def test_a_step_on_a_gpu_waits_for_no_other_thread() -> None:
    """Threads of OpenMP, which start with the first work that a thread shares, sleep while a GPU works."""

    def started_by_steps(backend: str) -> int:
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(300)]
        for p in params:
            p.grad = torch.ones(3)
        optimizer = fusedoptim.SGD(params, backend=backend)
        optimizer.step()
        started = []

        def steps() -> None:
            torch.set_num_threads(2)
            before = len(os.listdir("/proc/self/task"))
            for _ in range(3):
                optimizer.step()
            started.append(len(os.listdir("/proc/self/task")) - before)

        thread = threading.Thread(target=steps)
        thread.start()
        thread.join()
        return started[0]

    assert started_by_steps("cpu") == 1
    with no_launch.no_launch():
        assert started_by_steps("cuda") == 0


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_launch, "COMPILE", ["no-such-compiler"])
    with pytest.raises(UsageError, match=r"cannot be compiled: .*no-such-compiler"):
        host.main(QUICK)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: torch finds no CUDA device"):
            host.main([*QUICK, "--device", "cuda"])
    with pytest.raises(UsageError, match="--case 'tiny' is unknown: choose from '1x8'"):
        host.main(["--case", "tiny"])

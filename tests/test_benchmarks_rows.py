"""What a row, a curve and their environment say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from benchmark_runs import ARGUMENTS, MIB, TINY, Options, _quick_collections, _small, measured, row_of  # noqa: F401

import fusedoptim
from benchmarks import tables
from benchmarks.measure import devices, limits, rows, scaling
from benchmarks.measure.cases import evenly
from benchmarks.measure.devices import Cpu, Sample
from benchmarks.measure.peers import PEERS
from benchmarks.measure.results import COPY, OURS, STREAM, Results
from benchmarks.measure.timing import Budget


def test_a_row_and_its_environment(measured: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/run.py", "--peer", "torch fused"])
    runtimes = itertools.count(1)
    monkeypatch.setattr(devices, "openmp_runtimes", lambda: next(runtimes))
    code, content = measured(*ARGUMENTS, "--peer", "torch fused")
    assert code == 0 and content["finished"] is True and content["planned"] == 1
    [row] = content["rows"]
    assert (row["optimizer"], row["dtype"], row["case"], row["condition"]) == ("AdamW", "fp32", "tiny", "kept")
    assert (row["tensors"], row["groups"], row["elements"], row["bytes"]) == (3, 1, 80, 80 * 28)
    contenders = row["contenders"]
    assert list(contenders) == [OURS, "torch fused", COPY, STREAM]
    mine, theirs = contenders[OURS], contenders["torch fused"]
    for c in contenders.values():
        assert c["ms"]["n"] >= 5 and c["ms"]["q20"] <= c["ms"]["median"] <= c["ms"]["q80"]
    assert mine["gb_s"] == pytest.approx(80 * 28 / mine["ms"]["median"] * 1e-6, rel=1e-3)
    assert 0 < mine["share_of_copy"] and 0 < mine["share_of_stream"] and 0 < mine["first_step_s"]
    assert "ratio" not in mine and 0 < theirs["ratio"]["median"] and 0 <= theirs["difference"] < 0.01
    environment = content["environment"]
    assert environment.keys() >= {
        *("device", "fusedoptim", "commit", "date", "command", "python", "torch", "cpu", "cores", "threads"),
        *("capability", "system", "cache_bytes", "load", "packages", "backend", "openmp_runtimes"),
    }
    assert environment["command"] == "python -m benchmarks.run --peer 'torch fused'"
    assert environment["openmp_runtimes"] > 1, "before the limits had loaded theirs"
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1
    assert environment["backend"] == ("cpu" if fusedoptim._native._C else "reference")


class FakeGpu(Cpu):
    """Takes the ways through the program that a GPU does, with the CPU's tensors."""

    name = "cuda"

    def timed(self, call: Callable[[], object]) -> Sample:
        return dataclasses.replace(super().timed(call), host=2e-5)

    def details(self, call: Callable[[], object]) -> dict[str, int | str]:
        call()
        return {"launches": 1, "copies": 0, "peak_extra_bytes": 3 * MIB}

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        if len(FakeGpu.captured) == 1:
            FakeGpu.captured.append(call)
            raise RuntimeError("operation not permitted when stream is capturing")
        FakeGpu.captured.append(call)
        return call

    captured: ClassVar[list[object]] = []


def test_what_only_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "captured", [])
    monkeypatch.setitem(limits.COPY_BYTES, "cuda", MIB)
    monkeypatch.setitem(limits.STREAM_ELEMENTS, "cuda", 1 << 12)
    monkeypatch.setitem(limits._PASSES, "cuda", limits._in_c)
    peers = [PEERS[name] for name in ("torch foreach", "torch fused")]
    result = rows.measure(row_of(TINY), FakeGpu(), peers, Budget(0.01, at_most=5))
    contenders = result["contenders"]
    for name in (OURS, "torch foreach", "torch fused"):
        assert contenders[name]["host_ms"] == pytest.approx(0.02)
        assert contenders[name]["launches"] == 1 and contenders[name]["peak_extra_bytes"] == 3 * MIB
    assert 0 < contenders[OURS]["graph_ms"]
    assert contenders["torch fused"]["graph_problem"].startswith("RuntimeError: operation not permitted")
    assert not {"graph_ms", "graph_problem"} & contenders["torch foreach"].keys(), "its capture might leave one behind"
    assert len(FakeGpu.captured) == 2
    results = Results({"device": "cuda"}, 1)
    results.rows.append(result)
    table = tables.device_details(results.rows)
    assert table.count("\n") == 4 and "| AdamW fp32 | tiny | torch foreach | 1 | 0 | 0.02 |  | 3 |" in table


def test_the_commit_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.common.commit import commit

    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("FUSEDOPTIM_COMMIT", "0123456789abcdef")
    assert commit() == "0123456789ab"
    monkeypatch.setenv("FUSEDOPTIM_COMMIT", "0123456789abcdef+changes")
    assert commit() == "0123456789ab+changes"
    monkeypatch.delenv("FUSEDOPTIM_COMMIT")
    assert commit() == "unknown"


def test_a_curve_is_measured_and_saved(monkeypatch: pytest.MonkeyPatch, measured: Options) -> None:
    sizes = {"tensors": [(1, 64), (2, 64), (4, 64)], "elements": [(2, 32), (2, 64), (2, 128)]}
    cases = {name: tuple(evenly(*size) for size in of_curve) for name, of_curve in sizes.items()}
    curves = [dataclasses.replace(c, cases=cases[c.name]) for c in scaling.curves("cpu")]
    monkeypatch.setattr(scaling, "curves", lambda device: curves)
    code, content = measured(*ARGUMENTS, "--scaling", "--peer", "torch fused")
    assert code == 0 and content["planned"] == 7 and len(content["scaling"]) == 6
    assert [r["curve"] for r in content["scaling"]] == ["tensors"] * 3 + ["elements"] * 3
    assert all("ms" in r["contenders"]["torch fused"] for r in content["scaling"])
    assert [r["elements"] for r in content["scaling"]] == [64, 64, 64, 32, 64, 128]
    found = scaling.slopes(content["scaling"])
    assert {(curve, name) for curve, name, _, _ in found} == {(c, n) for c in cases for n in (OURS, "torch fused")}

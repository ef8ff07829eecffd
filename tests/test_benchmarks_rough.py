"""``python -m benchmarks.run --quick``: a rough look that is soon over and says what it leaves out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_runs import Options, _small, measured  # noqa: F401

from benchmarks import run
from benchmarks.measure import contest, plan, rough, rows, scaling
from benchmarks.measure import timing as measure_module
from benchmarks.measure.cases import CASES
from benchmarks.measure.contest import WARM_UP
from benchmarks.measure.devices import Cpu
from benchmarks.measure.optimizers import SETTINGS, Work
from benchmarks.measure.peers import PEERS, Peer
from benchmarks.measure.results import OURS, Results

QUICK = run.parse(["--quick"])
BUDGET = rough.BUDGET  # which a fixture makes smaller


def test_its_work_is_bounded() -> None:
    """By the clock, and by the elements that contenders step through when the clock leaves off: a CPU steps 0.3 to 2
    G elements in a second."""
    rows, peers = run.selected_rows(QUICK), run.selected_peers(QUICK)
    points = [row for curve in run.selected_curves(QUICK) for row in curve.rows()]
    assert rough.BUDGET.seconds * (len(rows) + len(points)) <= 12 and rough.SECONDS <= 45
    elements = 0
    for row in [*rows, *points]:
        able = sum(p.has.get(row.work.setting.name) is not None and "cpu" in p.devices for p in peers)
        elements += row.case.elements * (1 + able) * (WARM_UP + rough.BUDGET.at_least)
    assert elements < 16e9
    assert not any(p.most_tensors or p.most_shapes for p in peers), "these compile for every row"


def test_its_rows_are_some_of_a_full_run_and_of_every_optimizer() -> None:
    rows, full = ([r.key for r in run.selected_rows(run.parse(o))] for o in (["--quick"], []))
    assert set(rows) < set(full) and [key[0] for key in rows[: len(SETTINGS)]] == list(SETTINGS), "each comes early"
    points, all_points = (
        {(c.name, case.name) for c in run.selected_curves(run.parse(o)) for case in c.cases} for o in (["--quick"], [])
    )
    assert points < all_points
    assert all(sum(name == c.name for name, _ in points) >= 3 for c in scaling.curves("cpu")), "too few for a slope"


def test_a_slow_row_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time no further peer is made, and each that was takes part in one round."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(contest, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(measure_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(work: Work, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        clock.now += 3.0
        return torch.optim.AdamW(groups, **work.setting.options)

    for name in ("first", "second"):
        monkeypatch.setitem(PEERS, name, Peer(name, slow, {"AdamW": ("fp32",)}))
    row, peers = plan.row(("AdamW", "fp32", "tiny", "kept")), [PEERS["first"], PEERS["second"]]
    budget = dataclasses.replace(BUDGET, seconds=1000.0, at_most=4)
    assert budget.row_seconds == 3
    got = rows.measure(row, Cpu(), peers, budget)["contenders"]
    assert got["second"] == {"skipped": "the row's 3 s were up"}
    assert [got[name]["ms"]["n"] for name in (OURS, "first")] == [1, 1] and got["first"]["ratio"]["n"] == 1
    clock.now = 0.0
    got = rows.measure(row, Cpu(), peers, dataclasses.replace(budget, row_seconds=math.inf))["contenders"]
    assert [got[name]["ms"]["n"] for name in (OURS, "first", "second")] == [4, 4, 4]


def test_a_selection_is_no_rough_look() -> None:
    for options in (["--case", "64M"], ["--goals"]):
        args = run.parse(["--quick", *options])
        assert run.selected_rows(args) and run.selected_peers(args) == [p for p in PEERS.values() if not p.asked_only]
    assert [p.name for p in run.selected_peers(run.parse(["--quick", "--peer", "optimi"]))] == ["optimi"]


def test_it_says_what_it_leaves_out() -> None:
    rows, results = run.selected_rows(QUICK), Results({"device": "cpu"}, 0)
    results.rows = [{**row.describe(), "contenders": {}} for row in rows]
    results.scaling = [{"contenders": {}}] * 7
    text = rough.says(results, run.selected_peers(QUICK))
    assert text.startswith(f"A rough look: {len(rows)} of the {len(plan.chosen())} rows of a full run and 7 of its ")
    left = dict(line.removeprefix("- ").split(": ") for line in text.splitlines()[1:-1])
    assert left.keys() == {"dtypes", "cases", "conditions", "peers"}
    assert (
        left["dtypes"] == "bf16+fp32, stochastic, remainder, remainder+int8" and left["conditions"] == "recreated, warm"
    )
    assert set(left["cases"].split(", ")) == set(CASES) - {row.case.name for row in rows}
    assert {"torch compiled", "bitsandbytes"} <= set(left["peers"].split(", "))
    assert "apex" not in left["peers"], "it is for GPUs alone"
    for i, row in enumerate(rows):
        if row.work.setting.name == "SGD":
            results.rows[i] = {**row.describe(), "skipped": rough.TIME_IS_UP}
    assert "- optimizers: SGD\n" in rough.says(results, [])


def test_a_run_ends_in_time_and_with_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch,
    measured: Options,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = [(name, "fp32", "tiny", "kept") for name in ("AdamW", "SGD", "Adagrad")]
    monkeypatch.setattr(rough, "chosen", lambda: keys)
    clock = iter([0.0, 0.0, rough.SECONDS - 1, *[rough.SECONDS + 1] * 9])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    code, content = measured("--quick", "--peer", "none")
    assert code == 0 and content["finished"] is True
    assert ["skipped" in row for row in content["rows"]] == [False, False, True]
    assert all("were up" in row["skipped"] for row in [content["rows"][-1], *content["scaling"]])
    shown = capsys.readouterr().out
    assert "| Adagrad fp32 | tiny | not measured: 45 s, the time of a rough look, were up |" in shown
    assert "A rough look: 2 of the " in shown and shown.endswith("2 of 3 rows measured\n")


def test_the_committed_results_are_no_rough_look() -> None:
    content = json.loads((Path(run.__file__).parent / "results" / "cpu.json").read_text())
    assert "--quick" not in content["environment"]["command"]

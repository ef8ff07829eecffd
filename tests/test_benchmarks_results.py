"""What is made of the benchmarks' results: files, tables, goals, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, report, tables
from benchmarks.common.arguments import UsageError
from benchmarks.measure.goals import GOALS, HOST, Goal
from benchmarks.measure.results import COPY, OURS, STREAM, Result, Results, load

ENVIRONMENT = {
    **{"device": "cpu", "cpu": "A CPU", "threads": 2, "capability": "avx2", "torch": "2.12.3", "packages": {}},
    **{"python": "3.12.1", "system": "Linux x86_64", "commit": "0123456789ab", "date": "2031-02-03T04:05:06+00:00"},
    **{"command": "python -m benchmarks.run --out x.json"},
}


def times(median: float, noise: float = 0.01) -> dict[str, float]:
    return {"median": median, "q20": median * (1 - noise), "q80": median * (1 + noise), "n": 9}


def a_row(
    ms: float = 2.0,
    peers: dict[str, float] | None = None,
    key: tuple[str, str, str, str] = ("AdamW", "fp32", "64M", "kept"),
    noise: float = 0.01,
    copy: float = 1.0,
) -> Result:
    """fusedoptim in so many milliseconds, peers in others; the copy takes ``copy``."""
    mine = {"ms": times(ms, noise), "gb_s": 100.0 / ms, "share_of_copy": 0.875, "share_of_stream": 0.9375}
    contenders: dict[str, Result] = {OURS: mine}
    for name, value in (peers or {}).items():
        contenders[name] = {"ms": times(value, noise), "gb_s": 100.0 / value, "ratio": times(value / ms, noise)}
    contenders[COPY] = {"ms": times(copy, noise), "gb_s": 110.0}
    contenders[STREAM] = {"ms": times(copy, noise), "gb_s": 105.0}
    labels = dict(zip(("optimizer", "dtype", "case", "condition"), key, strict=True))
    return {**labels, "tensors": 1, "groups": 1, "elements": 1, "bytes": 28, "contenders": contenders}


def results(*rows: Result, scaling: list[Result] | None = None, **environment: Any) -> Results:
    made = Results({**ENVIRONMENT, **environment}, len(rows))
    made.rows, made.scaling, made.finished = list(rows), scaling or [], True
    return made


def curve(name: str = "tensors") -> list[Result]:
    labels = {"curve": name, "says": f"number of {name}", "over": name}
    points = []
    for n in (1, 10, 100):
        row = a_row(1 + 0.01 * n, {"torch fused": 1 + 0.02 * n}, ("AdamW", "fp32", f"{n} of {name}", "kept"))
        points.append({**labels, **row, name: n})
    return points


def saved(path: Path, content: Results) -> Path:
    content.path = path
    content.save()
    return path


# ---- files ----


def test_results_are_the_same_after_saving(tmp_path: Path) -> None:
    path = saved(tmp_path / "r.json", results(a_row(1.2345678), a_row(), scaling=curve()))
    again = load(path)
    assert again.rows[0]["contenders"][OURS]["ms"]["median"] == 1.2346
    assert (len(again.rows), len(again.scaling), again.finished, again.planned) == (2, 3, True, 2)
    assert again.environment == ENVIRONMENT
    assert again.text() == path.read_text() and json.loads(again.text())["format"] == 2
    assert len(path.read_text().splitlines()) < 20, "a line per row"


@pytest.mark.parametrize(
    "text,says",
    [
        (None, "cannot be read: No such file"),
        ("nonsense", "is no JSON"),
        ("[1]", "is not a results file of format 2"),
        ('{"format": 1}', "is not a results file of format 2"),
        ('{"format": 2, "environment": {}, "planned": 1}', "is damaged: it has no 'rows'"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    for program in (compare.main, report.main):
        with pytest.raises(UsageError, match=says):
            program([str(path)] * (2 if program is compare.main else 1))


# ---- goals and tables ----


def test_a_goal_is_reached_or_missed() -> None:
    row = a_row(2.0, {"torch fused": 3.0})
    row["contenders"][OURS]["host_ms"] = 0.05
    cases = [
        (Goal("torch fused", 1.5), 1.5, True),
        (Goal("torch fused", 1.51), 1.5, False),
        (Goal(COPY, 0.87), 0.875, True),
        (Goal(COPY, 0.88), 0.875, False),
        (Goal(HOST, 0.05), 0.05, True),
        (Goal(HOST, 0.049), 0.05, False),
        (Goal("apex", 1.0), None, None),
    ]
    for goal, found, reached in cases:
        assert (goal.found_in(row), goal.reached_in(row)) == (found, reached), goal
        assert goal.reached_in({}) is None
    assert [str(g) for g, _, _ in cases[:5:2]] == ["torch fused 1.5x", "0.87 of copy", "host <= 50 us"]


def test_every_goal_is_of_a_row_and_a_contender_that_exist() -> None:
    from benchmarks.measure import plan
    from benchmarks.measure.peers import PEERS

    for device, of_device in GOALS.items():
        assert of_device
        for row, goals in zip(plan.rows((*key, "kept") for key in of_device), of_device.values(), strict=True):
            for goal in goals:
                if goal.of not in (COPY, STREAM, HOST):
                    peer = PEERS[goal.of]
                    assert row.work.dtypes.name in peer.has[row.work.setting.name], (row.key, goal)
                    assert device in peer.devices and not (device == "cuda" and row.work.setting.name in peer.cpu_only)


def test_the_comparison_shows_goals_and_who_is_faster() -> None:
    rows = [
        a_row(2.0, {"torch fused": 3.0, "DeepSpeedCPUAdam": 2.5, "optimi": 1.8, "heavyball": 5.0}),
        a_row(2.0, {"torch fused": 1.2}, ("SGD", "fp32", "64M", "kept")),
        a_row(2.0, {"torch fused": 1.99}, ("AdamW", "bf16", "gpt2-small", "kept")),
        a_row(key=("Adam", "fp32", "2000x64", "warm")),
        {**a_row(key=("AdamW", "fp32", "1G", "kept")), "skipped": "needs 31.0 GiB of memory"},
    ]
    del rows[-1]["contenders"]
    wide, narrow = (tables.comparison(results(*rows), rows, narrow=n) for n in (False, True))
    [first, second, third, fourth, fifth] = wide.splitlines()[2:]
    assert first.startswith("| AdamW fp32 | 64M | 2 | 50 | 0.88 | 0.94 | 1.50x | 1.25x | **0.90x** | 2.50x |")
    assert first.endswith("| torch fused 0.97x | optimi |")
    assert second.endswith("| torch fused 0.97x (missed) | torch fused |") and "**0.60x**" in second
    # within the noise nobody is faster
    assert third.endswith("| torch fused 2x (missed); 0.93 of stream | none |") and "**" not in third
    assert "2000x64, in cache" in fourth
    assert "not measured: needs 31.0 GiB of memory" in fifth
    assert len({text.count("|") for text in wide.splitlines()}) == 1
    header, _, first, *_ = narrow.splitlines()
    assert "| optimi |" not in header and "fastest of the others" in header
    assert "**optimi 0.90x**" in first


def test_reasons_and_disturbances_are_told() -> None:
    rows = [a_row(), a_row()]
    for row in rows:
        row["contenders"]["apex"] = {"skipped": "is not installed"}
    rows[0]["contenders"]["optimi"] = {"failed": "ValueError: no"}
    assert tables.reasons(rows) == "- apex is not installed (2 rows)\n- optimi FAILED: ValueError: no (1 row)"
    assert tables.disturbed(rows) == ""
    rows[1]["others_cores"] = 0.5
    assert tables.disturbed(rows).endswith("busy during: AdamW fp32 64M.")


def test_an_unfinished_run_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = results(a_row())
    content.finished, content.planned = False, 7
    assert "interrupted: 1 of 7 rows are finished" in tables.everything(content)
    assert report.main([str(saved(tmp_path / "r.json", content))]) == 0
    assert "(The run was interrupted: 1 of 7 rows.)" in capsys.readouterr().out


# ---- report ----


def test_report_prints_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    extra = a_row(key=("Adam", "bf16", "olmoe", "kept"))
    path = saved(tmp_path / "r.json", results(a_row(2.0, {"torch fused": 3.0}), extra, scaling=curve()))
    assert report.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "| AdamW fp32 | 64M | 2 | 50 |" in shown and "olmoe" not in shown
    assert "| fusedoptim: number of tensors | 10 us per tensor |" in shown
    assert "A CPU, 2 threads, avx2; torch 2.12.3; Python 3.12.1, Linux x86_64; commit 0123456789ab, 2031" in shown
    assert report.main([str(path), "--all"]) == 0 and "olmoe" in capsys.readouterr().out

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: r.json -->\nold numbers\n<!-- end of results -->\nafter\n")
    assert report.main(["--check", str(readme)]) == 1
    assert "run python -m benchmarks.report --write" in capsys.readouterr().out
    assert report.main(["--write", str(readme)]) == 0
    text = readme.read_text()
    assert text == f"before\n<!-- results: r.json -->\n{shown.rstrip()}\n<!-- end of results -->\nafter\n"
    assert report.main(["--check", str(readme)]) == 0
    readme.write_text(text.replace("| 2 | 50 |", "| 1 | 99 |"))
    right = tmp_path / "right.md"
    right.write_text(text)
    for order in ([readme, right], [right, readme]):
        assert report.main(["--check", *map(str, order)]) == 1
        assert f"{readme}: its tables are not" in capsys.readouterr().out
    assert report.main(["--write", *map(str, order)]) == 0 and readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(UsageError, match="has no <!-- results: FILE -->"):
        report.main(["--check", str(readme)])
    with pytest.raises(UsageError, match=r"give one of FILE\.json, OUTDIR, --write and --check"):
        report.main([])


def test_a_short_table_has_a_few_cases_and_the_best_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    marks = "<!-- results: {} short -->\n{}\n<!-- end of results -->\n".format
    readme.write_text(marks("GPUs", "old") + marks("r.json", "old"))
    peers = {"torch foreach": 3.0, "torch fused": 2.5, "optimi": 1.0, "torchao": 9.0}
    rows = [
        a_row(3.0, {"optimi": 4.5}, ("AdamW", "fp32", "465-groups", "kept")),
        a_row(2.0, peers, ("SGD", "fp32", "gpt2-small", "kept")),
        a_row(2.0, {"torch fused": 1.0}, ("AdamW", "fp32", "2000x64", "warm")),
        a_row(2.0, peers, ("AdamW", "fp32", "64M", "kept")),
        {**a_row(key=("AdamW", "fp32", "2000x64", "kept")), "skipped": "too large"},
    ]
    del rows[-1]["contenders"]
    saved(tmp_path / "r.json", results(*rows))
    assert report.main(["--write", str(readme)]) == 0
    table = """| optimizer | case | ms | fastest of torch | fastest of the others |
|---|---|---:|---:|---:|
| SGD fp32 | gpt2-small | 2 | torch fused 1.25x | **optimi 0.50x** |
| AdamW fp32 | 465-groups | 3 | none | optimi 1.50x |

"""
    expected = marks("GPUs", report.NO_GPU) + marks("r.json", table + report.source(ENVIRONMENT))
    assert readme.read_text() == expected


def test_a_gpu_checks_results_become_a_file_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two plans: a row that is measured again takes the place of the older one, and every row has its commit."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / report.FOLDER
    folder.mkdir(parents=True)
    saved(folder / "cpu.json", results(a_row()))
    short, readme = (tmp_path / path for path in report.DOCUMENTS)
    readme.write_text("<!-- results: GPUs -->\n<!-- end of results -->\n")
    short.write_text("<!-- results: GPUs short -->\n<!-- end of results -->\n")
    assert report.main(["--write", str(readme), str(short)]) == 0
    assert report.NO_GPU in short.read_text()
    goals = readme.read_text().count("| not measured |")
    assert goals == sum(map(len, GOALS["cuda"].values()))

    gpu = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cores": 16}
    fp32, bf16 = (("AdamW", dtype, "gpt2-xl", "kept") for dtype in ("fp32", "bf16"))
    sgd = ("SGD", "fp32", "gpt2-xl", "kept")
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        out.mkdir()
        (out / "ab.json").write_text("[]")
    command = "python -m benchmarks.run --goals --out /tmp/x/first.json"
    old = results(a_row(2.0, key=fp32), a_row(3.0, key=bf16), a_row(4.0, key=sgd), **gpu, command=command)
    old.finished, old.planned = False, 9
    saved(first / "first.json", old)
    host = [{"case": "300x1024", "threads": 16, "us": {"min": 41.26, "median": 43.0}, "goal": None}]
    (first / "host.json").write_text(json.dumps({"environment": old.environment, "rows": host}))
    later = {**gpu, "commit": "fedcba987654", "date": "2031-02-04T04:05:06+00:00"}
    failed = {k: v for k, v in a_row(key=sgd).items() if k != "contenders"} | {"failed": "RuntimeError: no"}
    saved(second / "second.json", results(a_row(2.5, {"Triton backend": 2.6}, key=bf16), failed, **later))
    assert report.main([str(second), str(first)]) == 0

    content = load(folder / "h100.json")
    found = {r["dtype"]: (r["contenders"][OURS]["ms"]["median"], r["commit"]) for r in content.rows[:2]}
    assert found == {"fp32": (2.0, "0123456789ab"), "bf16": (2.5, "fedcba987654")} and len(content.rows) == 3
    assert content.rows[2]["contenders"], "a row that failed is no better than one that was measured"
    assert content.environment["commit"] == "fedcba987654" and content.finished
    text = readme.read_text()
    assert "**NVIDIA H100 80GB HBM3**" in text and "| AdamW bf16 | gpt2-xl | 2.5 | 40 |" in text
    assert "NVIDIA H100 80GB HBM3, driver 580.1, 16 cores; torch 2.12.3" in text
    assert "| AdamW bf16 | gpt2-xl | 2.5 | none | Triton backend 1.04x |" in short.read_text()
    assert "Measured at commit 0123456789ab: AdamW fp32 gpt2-xl; SGD fp32 gpt2-xl." in text
    assert "| case | threads | us min | us median |" in text and "| 300x1024 | 16 | 41.3 | 43 |" in text
    assert "commit fedcba987654, 2031-02-04" in text
    assert text.count("| not measured |") == goals - 3
    assert "| AdamW fp32 | gpt2-xl | torch fused 1x | not measured |" in text
    assert report.main([str(first)]) == 0
    assert "benchmarks.run --goals --out first.json`" in readme.read_text(), "of its own folder there is no word"
    assert report.file_of("NVIDIA H200").name == "h200.json"
    assert report.file_of("NVIDIA GeForce RTX 4090").name == "geforce-rtx-4090.json"
    with pytest.raises(UsageError, match="no results are in"):
        report.main([str(tmp_path / "benchmarks")])


# ---- compare ----


def compared(tmp_path: Path, old: Results, new: Results, *options: str) -> int:
    return compare.main([str(saved(tmp_path / "old.json", old)), str(saved(tmp_path / "new.json", new)), *options])


@pytest.mark.parametrize(
    "new,noise,machine,options,code,says",
    [
        (2.0, 0.01, 1.0, (), 0, "1 rows in both, 0 slower, 0 faster, 0 missing"),
        (2.5, 0.01, 1.0, (), 1, "1 rows in both, 1 slower, 0 faster, 0 missing"),
        (2.5, 0.30, 1.0, (), 0, "0 slower"),  # within the noise
        (2.08, 0.001, 1.0, (), 0, "0 slower"),  # below the threshold
        (2.08, 0.001, 1.0, ("--threshold", "0.02"), 1, "1 slower"),
        (2.5, 0.01, 1.25, (), 0, "0 slower"),  # the whole machine is slower
        (2.0, 0.01, 0.8, (), 1, "1 slower"),  # the machine is faster, fusedoptim is not
        (1.5, 0.01, 1.0, (), 0, "1 faster"),
    ],
)
def test_compare_exits_with_1_when_slower_beyond_the_noise(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    new: float,
    noise: float,
    machine: float,
    options: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    before = results(a_row(2.0, {"torch fused": 3.0}, noise=noise))
    after = results(a_row(new, {"torch fused": 3.0 * machine}, noise=noise, copy=machine))
    assert compared(tmp_path, before, after, *options) == code
    shown = capsys.readouterr().out
    assert says in shown
    if code:
        assert f"| AdamW fp32 64M kept | 2 | {new:.3g} | {machine:.2f}x | {new / 2 / machine:.2f}x |" in shown


def test_compare_says_what_is_not_comparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = a_row(key=("SGD", "fp32", "64M", "kept"))
    code = compared(tmp_path, results(a_row(), other, scaling=curve()), results(a_row(), torch="2.13.0", threads=1))
    shown = capsys.readouterr().out
    assert code == 0 and "note: torch was 2.12.3 and is 2.13.0" in shown and "note: threads was 2 and is 1" in shown
    assert "note: no longer measured: SGD fp32 64M kept" in shown and "1 rows in both, 0 slower, 0 faster, 4" in shown
    assert compared(tmp_path, results(a_row()), results(other)) == 1, "nothing was compared"


def test_compare_sees_curves_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = curve()
    slower[1]["contenders"][OURS]["ms"] = times(5.0)
    assert compared(tmp_path, results(a_row(), scaling=curve()), results(a_row(), scaling=slower)) == 1
    assert "tensors 10 of tensors" in capsys.readouterr().out

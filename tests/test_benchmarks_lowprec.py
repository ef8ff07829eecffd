"""The benchmarks of parameters and states in fewer bits: what they print and keep, and that they can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report, second_moments, storages, tables
from benchmarks.common.arguments import UsageError
from benchmarks.lowprec import __main__ as lowprec
from benchmarks.lowprec import finetuning
from benchmarks.lowprec.schemes import EXACT, SCHEMES, bytes_of, number, rounded
from benchmarks.lowprec.table import spread, table
from benchmarks.measure.results import load

pytest.importorskip("matplotlib")

FP32_MOMENTS, SMALL = "remainder, fp32 moments", "remainder8, 8 bits"
CHOSEN = ["--quick", "--seeds", "1", "--scheme", "fp32", "--scheme", FP32_MOMENTS, "--scheme", SMALL]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lowprec") / "lowprec.json"
    assert lowprec.main([*CHOSEN, "--out", str(path)]) == 0
    return path


def cells(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {name: rest for name, *rest in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def test_schemes_are_compared(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a remainder and fp32 moments, training has the bits of fp32 numbers."""
    results = load(out)
    assert results.finished and results.planned == 8
    assert [(r["scheme"], r["burst"]) for r in results.runs] == [
        (name, burst) for name in (EXACT.name, "fp32", FP32_MOMENTS, SMALL) for burst in (False, True)
    ]
    by = {(r["scheme"], r["burst"]): r for r in results.runs}
    for burst in (False, True):
        assert (by[FP32_MOMENTS, burst]["distance"], by[FP32_MOMENTS, burst]["loss_above_exact"]) == (0.0, 0.0)
        assert 0 < by[SMALL, burst]["distance"] < by[EXACT.name, burst]["distance_if_rounded"]
    assert by[SMALL, False]["distance"] < by[SMALL, True]["distance"]
    assert 5 < by[SMALL, False]["bytes"] < 5.3 and round(by["fp32", False]["bytes"], 2) == 12
    assert report.main([str(out)]) == 0
    text = capsys.readouterr().out
    assert table(results.runs) in text and '`master="remainder8", state_dtype="int8"`' in text
    shown = cells(text)
    assert shown[FP32_MOMENTS][-3:-1] == ["0", "0"] and shown["fp32"][-1] == "1.00"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_made_again_with_the_same_numbers(out: Path, tmp_path: Path) -> None:
    whole, cut = load(out), load(out)
    cut.path = tmp_path / "cut.json"
    cut.runs = [r for r in cut.runs if not (r["scheme"] == SMALL and r["burst"])]
    cut.save()
    assert lowprec.main([*CHOSEN, "--resume", "--out", str(cut.path)]) == 0
    without_times = [[{k: v for k, v in r.items() if k != "step_us"} for r in x.runs] for x in (whole, load(cut.path))]
    assert without_times[0] == without_times[1]
    with pytest.raises(UsageError, match=r"--resume: .* has settings"):
        lowprec.main(["--seeds", "1", "--resume", "--out", str(cut.path)])


def test_wrong_arguments() -> None:
    for options, says in (
        (["--scheme", "no"], "choose from 'fp32', 'master', "),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--resume"], "--resume needs --out"),
    ):
        with pytest.raises(UsageError, match=says):
            lowprec.main(options)


@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].module == "fusedoptim"])
def test_a_scheme_starts_at_the_checkpoint_and_moves(name: str) -> None:
    torch.manual_seed(0)
    start = rounded(torch.randn(64, 128)).float()
    p = nn.Parameter(start.to(SCHEMES[name].dtype, copy=True))
    optimizer = SCHEMES[name].make([("weight", p)], 0.0, 0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(number(p, optimizer.state[p]), start)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    expected = start - 1e-2 * (1 + 0.01 * start)
    unit = 2.0**-7 * expected.abs() if "bf16" in name or "stochastic" in name else 0.0  # in the last place, at most
    assert ((number(p, optimizer.state[p]) - expected).abs() <= unit + 1e-4).all()


def test_bytes_of_other_optimizers_count_what_subclasses_hold() -> None:
    p = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p, nn.Parameter(torch.zeros(2))])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bytes_of(optimizer) == 3 * 2 * p.numel() + 8 + 4  # the other parameter, and step


def test_the_guide_has_the_results() -> None:
    assert report.main(["--check", str(report.ROOT / "fusedoptim" / "guides" / "low_precision.md")]) == 0


def test_distance_and_spread() -> None:
    one, exact, start = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    assert finetuning.distance(one, exact, start) == 0.5
    assert [spread(x) for x in ([], [0.0, 0.0], [0.1, 0.12], [2.0], [1.0, float("nan")])] == [
        "", "0", "0.11 ± 0.01", "2", "nan",
    ]  # fmt: skip


def test_second_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "second-moments.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_moments, "BETAS", (0.9, 0.998))
        patch.setattr(second_moments, "STEPS", 150_000)
        patch.setattr(second_moments, "STEPS_AFTER_DROP", 60_000)
        assert second_moments.main(["--quick", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["host"]
    assert [r["beta2"] for r in rows] == ["0.9", "0.998"] * 2 and len(capsys.readouterr().out.splitlines()) == 8
    for row in rows:
        assert 0.98 < float(row["bf16"]) < 1.02 and 0.98 < float(row["8 bits"]) < 1.02
    assert float(rows[3]["bf16 to nearest"]) > 2 and float(rows[3]["8 bits to nearest"]) > 2


def test_storages_are_measured_and_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "storages.json"
    assert storages.main(["--elements", "8192", "--out", str(path)]) == 0
    rows = load(path).storages
    assert [row["storage"] for row in rows] == ["copy", *storages.STORAGES]
    assert all(row["ms"] > 0 for row in rows)
    assert capsys.readouterr().out.startswith(text := tables.storages([load(path)]))
    two = load(path)
    two.environment, two.storages = {**two.environment, "cpu": "Another"}, rows[1:3]
    both = tables.storages([load(path), two]).splitlines()
    assert both[0].endswith("| Another | over fp32's |") and both[2].endswith("| 1.00 |")
    assert both[5].endswith("|  |  |") and len(text.splitlines()) == len(both)
    assert report.main([str(path)]) == 0
    assert text in capsys.readouterr().out

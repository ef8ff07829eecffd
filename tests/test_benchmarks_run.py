"""The programs that measure, as commands: selections, interrupts, bad input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import ARGUMENTS, Options, _quick_collections, _small, add_peer, measured, torch_adamw  # noqa: F401
from cases import OPTIMIZERS

from benchmarks import compiled, run
from benchmarks.common import arguments
from benchmarks.common.arguments import UsageError
from benchmarks.measure import devices, optimizers
from benchmarks.measure.cases import CASES
from benchmarks.measure.devices import Cpu, Cuda, Sample
from benchmarks.measure.optimizers import DTYPES, SETTINGS, Work
from benchmarks.measure.peers import PEERS
from benchmarks.measure.results import OURS
from benchmarks.measure.timing import Budget


@pytest.mark.parametrize("how", ["keyboard", "terminated"])
def test_an_interrupted_run_keeps_its_finished_rows(
    monkeypatch: pytest.MonkeyPatch, measured: Options, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    made = []

    def interrupt(work: Work, groups: Any) -> Any:
        made.append(work)
        if len(made) == 2:
            if how == "keyboard":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return torch_adamw(work, groups)

    add_peer(monkeypatch, "fake", interrupt)
    code, content = measured(
        "--case", "tiny", "--optimizer", "AdamW", "--dtype", "fp32", "--dtype", "bf16+fp32", "--peer", "fake"
    )
    assert code == 130 and content["finished"] is False and content["planned"] == 2
    assert [r["dtype"] for r in content["rows"]] == ["fp32"] and "ms" in content["rows"][0]["contenders"][OURS]
    shown = capsys.readouterr()
    assert "interrupted: 1 of 2 rows are finished" in shown.out and "the finished rows are in" in shown.err


@pytest.mark.parametrize(
    "option,name,known",
    [
        ("--device", "tpu", "'cpu', 'cuda'"),
        ("--optimizer", "Adamw2", "'AdamW', 'Adam', 'SGD', 'RMSprop', 'Adagrad', 'NormAdaptive'"),
        ("--case", "gpt5", "'64M', '1G', 'gpt2-small'"),
        ("--dtype", "fp8", "'fp32', 'bf16', 'bf16+fp32'"),
        ("--peer", "torch", "'torch for-loop', 'torch foreach', 'torch fused'"),
        ("--condition", "cold", "'kept', 'recreated', 'warm'"),
    ],
)
def test_unknown_names_list_the_known_ones(
    option: str, name: str, known: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", option, name])
    with pytest.raises(SystemExit) as status:
        arguments.run(run.main)
    shown = capsys.readouterr()
    assert status.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"{option} '{name}' is unknown: choose from ") and known in shown.err


def test_names_in_any_case() -> None:
    assert arguments.known("--optimizer", ["adamw", "SGD"], SETTINGS) == ["AdamW", "SGD"]
    assert arguments.known("--optimizer", None, SETTINGS) == list(SETTINGS)


def test_optimizers_that_are_measured_where_they_are_asked_for() -> None:
    """Those of the gallery, and a user's class, each with the bytes that a step of its states moves."""
    asked = ["lion", "NAdam", "fusedoptim.gallery.rprop:Rprop"]
    options = [word for name in asked for word in ("--optimizer", name)]
    rows = run.selected_rows(run.parse([*options, "--case", "64M", "--dtype", "fp32"]))
    assert [r.key[0] for r in rows] == ["Lion", "NAdam", "fusedoptim.gallery.rprop:Rprop"]
    assert [r.work.bytes_per_element for r in rows] == [20, 28, 28]
    assert {*optimizers.GALLERY}.isdisjoint(SETTINGS) and {
        s.optimizer for s in (*SETTINGS.values(), *optimizers.GALLERY.values())
    } == {cls.__name__ for cls in OPTIMIZERS}
    peers = [PEERS["torch foreach"], PEERS["eager reference"]]
    takes_part = [[p.problem(r.work, r.case, "cpu") is None for p in peers] for r in rows]
    assert takes_part == [[False, True], [True, False], [False, True]]
    for name, says in [
        ("no_module:Lion", "cannot be imported: No module named 'no_module'"),
        ("fusedoptim:NoClass", "cannot be imported: module 'fusedoptim' has no attribute 'NoClass'"),
        ("torch.optim:Adam", "is no class of fusedoptim.FusedOptimizer"),
    ]:
        with pytest.raises(UsageError, match=f"^--optimizer '{name}' {says}"):
            run.selected_rows(run.parse(["--optimizer", name]))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda cannot be measured: torch finds no CUDA device"):
        run.main(["--device", "cuda", "--case", "2000x64"])
    assert Cuda().problem() is not None


@pytest.mark.parametrize(
    "options,says",
    [
        (["--quik"], "unrecognized arguments: --quik; --help lists the options"),
        (["--goals", "--condition", "warm"], "--goals are for gradients that are kept"),
    ],
)
def test_options_that_make_no_sense(options: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run.main(options)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.json"
    precious.write_text('{"chapters": 7}')
    with pytest.raises(UsageError, match="is not a results file"):
        run.main([*ARGUMENTS, "--peer", "none", "--out", str(precious)])
    assert precious.read_text() == '{"chapters": 7}'
    with pytest.raises(UsageError, match="cannot be written"):
        run.main([*ARGUMENTS, "--peer", "none", "--out", str(tmp_path / "no" / "folder.json")])


def test_rows_of_goals_and_selections() -> None:
    from benchmarks.measure.goals import GOALS

    for device in GOALS:
        chosen = run.selected_rows(run.parse(["--device", device, "--goals"]))
        assert [r.key[:3] for r in chosen] == list(GOALS[device])
        assert not run.selected_curves(run.parse(["--device", device, "--goals"]))
        backwards = run.selected_rows(run.parse(["--device", device, "--goals", "--reverse"]))
        assert [r.key for r in backwards] == [r.key for r in reversed(chosen)]
    some = run.parse(
        ["--device", "cuda", "--goals", "--case", "gpt2-xl", "--optimizer", "SGD", "--optimizer", "RMSprop"]
    )
    sgd, rmsprop = run.selected_rows(some)
    assert [r.work.setting.name for r in (sgd, rmsprop)] == ["SGD", "RMSprop"]
    both = [PEERS["torch fused"], PEERS["torch foreach"]]
    assert run.beside(sgd, both, some) == both[:1] and run.beside(rmsprop, both, some) == both
    assert run.beside(sgd, both, run.parse([])) == both
    assert run.selected_curves(run.parse([])) and not run.selected_curves(run.parse(["--case", "64M"]))
    full = run.selected_rows(run.parse([]))
    assert {r.work.setting.name for r in full} == set(SETTINGS) and {r.work.dtypes.name for r in full} == set(DTYPES)
    assert {r.case.name for r in full} == set(CASES)
    # without states of a parameter's shape there is nothing for the dtypes to differ in
    assert not run.selected_rows(run.parse(["--optimizer", "NormAdaptive", "--dtype", "bf16+fp32", "--case", "64M"]))


def test_variants_take_turns_and_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from benchmarks import ab

    tunables = {"window": 1}

    def tune(name: str, value: int) -> int:
        before, tunables[name] = tunables[name], value
        return before

    class Clock(Cpu):
        def timed(self, call: Callable[[], object]) -> Sample:
            call()
            return Sample(1.5 if tunables["window"] == 8 else 1.0, 0.0)

    key = ("AdamW", "fp32", "tiny", "kept")
    switches = (ab.Switch("typo", (key,), {"widnow": 8}), ab.Switch("window", (key,), {"window": 8}))
    monkeypatch.setattr(ab, "SWITCHES", switches)
    monkeypatch.setattr(ab, "BUDGET", Budget(0.01, at_least=6, at_most=6))
    monkeypatch.setattr(ab._native, "tune", tune)
    monkeypatch.setitem(devices.DEVICES, "cpu", Clock)
    out = tmp_path / "ab.json"
    assert ab.main(["--device", "cpu", "--switch", "window", "--out", str(out)]) == 0 and tunables == {"window": 1}
    [found] = json.loads(out.read_text())
    assert found["ratio"]["median"] == 1.5 and found["ratio"]["n"] == 6 and found["same_bits"]

    def differs(work: Work, groups: list[dict[str, Any]]) -> Any:
        return torch_adamw(work, [{**g, "lr": g["lr"] * tunables["window"]} for g in groups])

    monkeypatch.setattr(ab, "ours", differs)
    capsys.readouterr()
    assert ab.main(["--device", "cpu"]) == 1
    typo, window = capsys.readouterr().out.splitlines()
    assert "FAILED: KeyError" in typo and "1.500 (1.500 to 1.500, 6 rounds), OTHER BITS" in window


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_steps_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["compiled", "--tensors", "2", "--elements", "3", "--rounds", "2"])
    assert compiled.main() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["| fusedoptim", "| fusedoptim compiled", "| torch foreach compiled"]
    assert all(float(cell.rstrip(" |")) >= 0 for row in rows for cell in row[1:])

"""The training program: it learns, compares, resumes with the same bits, and explains its errors."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import convergence, witness
from benchmarks.train import checkpoint
from benchmarks.train.__main__ import main

ROOT = Path(__file__).parent.parent
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4", "--eval-every", "5"]


#: One thread: models as tiny as these gain nothing from two, and wait for each other when the machine is busy.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def command(*options: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "benchmarks.train", *map(str, options)]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)


@dataclass
class Ended:
    """Like a process that has ended, with what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def train(out: Path, *options: object) -> Ended:
    """In this process, which has loaded torch already."""
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = main([*TINY, "--out", str(out), *map(str, options)])
    return Ended(code, stdout.getvalue(), stderr.getvalue())


def same_checkpoints(a: Path, b: Path) -> None:
    one, two = (torch.load(p, weights_only=True) for p in (a, b))
    assert [t["loss"] for t in one["progress"]["train"]] == [t["loss"] for t in two["progress"]["train"]]
    assert one["progress"]["validation"] == two["progress"]["validation"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for i, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][i][name]), (i, name)


def test_it_learns_and_leaves_its_files(tmp_path: Path) -> None:
    """As a command, of which no warning comes."""
    result = run(*TINY, "--out", tmp_path, "--steps", 150, "--eval-every", 50)
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["validation"][-1]["loss"] < history["unigram_entropy"]
    assert len(history["train"]) == 150 and {"loss", "lr", "grad_norm", "optimizer_s"} == set(history["train"][0])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "history.json", "latest.pt", "loss.png"]
    for shown in ("loss", "lr", "|g|", "tok/s", "opt"):
        assert shown in result.stderr


@pytest.mark.parametrize("optimizer", ["Adam", "adamw", "SGD", "rmsprop", "ADAGRAD", "NormAdaptive"])
def test_losses_are_those_of_torch(tmp_path: Path, optimizer: str) -> None:
    result = train(tmp_path, "--steps", 12, "--optimizer", optimizer, "--compare", "--accumulate", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "losses identical: yes"
    own, alone, ours, theirs = result.stdout.splitlines()[2:6]
    assert own.startswith("the training's own step of fusedoptim's ")
    assert alone.startswith("the update alone, on copies of the parameters")
    assert " of fusedoptim: " in ours and (" of torch f" in theirs or " of eager reference: " in theirs)


def test_a_difference_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own square root, which is another."""
    monkeypatch.setattr(witness, "ieee_sqrt", nullcontext)
    result = train(tmp_path, "--steps", 30, "--compare")
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "losses identical: no" and lines[-2].startswith("first step at which the losses differ: ")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "normadaptive"])
def test_resuming_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Stopped between its two checkpoints of step 10, continued in another folder, to which the best comes along."""
    straight, cut, there = tmp_path / "straight", tmp_path / "cut", tmp_path / "there"
    options = [*TINY, "--steps", "20", "--optimizer", optimizer, "--accumulate", "2"]
    assert main([*options, "--out", str(straight)]) == 0
    save = checkpoint.save

    def save_and_stop(path: Path, settings: dict[str, object], progress: checkpoint.Progress, **parts: object) -> None:
        if progress.step == 10 and path.name == "latest.pt":
            raise Stopped
        save(path, settings, progress, **parts)

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(Stopped):
        main([*options, "--out", str(cut)])
    monkeypatch.undo()
    assert torch.load(cut / "latest.pt", weights_only=True)["progress"]["step"] == 5
    assert main([*options, "--out", str(there), "--resume", str(cut / "latest.pt")]) == 0
    for name in ("latest.pt", "best.pt"):
        same_checkpoints(straight / name, there / name)


def test_averaged_weights(tmp_path: Path) -> None:
    """They change nothing for the weights themselves, and are in the checkpoints."""
    plain, averaged, resumed = (tmp_path / name for name in ("plain", "averaged", "resumed"))
    options = ("--steps", 10, "--warmup", 2)
    assert train(plain, *options).returncode == 0
    result = train(averaged, *options, "--ema", 0.8, "--compare")
    assert result.returncode == 0 and "losses identical: yes" in result.stdout, result.stdout + result.stderr
    assert "validation loss of the averaged weights" in result.stdout
    one, two = (json.loads((path / "history.json").read_text())["validation"] for path in (plain, averaged))
    assert [v["loss"] for v in one] == [v["loss"] for v in two]
    assert two[-1]["loss_of_averages"] != two[-1]["loss"]
    assert train(resumed, *options, "--resume", averaged / "latest.pt").returncode == 2  # without averages: another run
    content = torch.load(averaged / "latest.pt", weights_only=True)
    assert all("ema" in state for state in content["optimizer"]["state"].values())
    assert content["optimizer"]["param_groups"][0]["max_grad_norm"] == 1.0


def test_in_bfloat16(tmp_path: Path) -> None:
    """Other losses than in fp32, the same with torch's optimizer, and no checkpoint for a run without."""
    assert main([*TINY, "--steps", "6", "--out", str(tmp_path / "fp32")]) == 0
    options = [*TINY, "--steps", "6", "--amp", "bf16"]
    assert main([*options, "--out", str(tmp_path / "bf16"), "--compare"]) == 0
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("fp32", "bf16"))
    assert two["settings"]["amp"] == "bf16"
    for of_fp32, of_bf16 in zip(one["train"], two["train"], strict=True):
        assert of_fp32["loss"] != of_bf16["loss"] == pytest.approx(of_fp32["loss"], abs=0.01)
    assert main([*TINY, "--steps", "6", "--out", str(tmp_path), "--resume", str(tmp_path / "bf16" / "latest.pt")]) == 2


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that changes no bit: it runs the graphs that torch.compile gives it as they are."""
    compiled: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    options = [*TINY, "--steps", "6", "--accumulate", "2"]
    assert main([*options, "--out", str(tmp_path / "eager")]) == 0
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    assert main([*options, "--out", str(tmp_path / "compiled"), "--compile"]) == 0
    same_checkpoints(tmp_path / "eager" / "latest.pt", tmp_path / "compiled" / "latest.pt")
    assert sum("functional.cross_entropy(" in graph.code for graph in compiled) == 2  # with and without gradients
    assert sum("ops.fusedoptim.step_" in graph.code for graph in compiled) == 1


def test_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", *TINY, "--out", str(tmp_path), "--compile"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --compile: torch.compile does not work here (")
    assert result.stderr.endswith("leave out --compile\n")
    assert not (tmp_path / "history.json").exists()


def test_resuming_elsewhere_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*TINY, "--steps", "10", "--out", str(here)]) == 0
    assert main([*TINY, "--steps", "10", "--out", str(there), "--resume", str(here / "latest.pt")]) == 0
    same_checkpoints(here / "best.pt", there / "best.pt")


def test_the_last_step_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows in no training loss."""

    def step_twice(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.step()

    monkeypatch.setattr(witness, "witness_step", step_twice)
    assert main([*TINY, "--out", str(tmp_path), "--steps", "1", "--compare"]) == 1
    assert "first step at which the losses differ: 1\nlosses identical: no\n" in capsys.readouterr().out


def test_killed_at_any_moment_it_resumes_with_the_same_bits(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = ["--steps", 60, "--eval-every", 2]
    assert train(straight, *options).returncode == 0
    resume: list[object] = []
    kills = 0
    for pause in (0.05, 0.4, 3600):
        process = subprocess.Popen(
            command(*TINY, "--out", killed, *options, *resume),
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        latest = killed / "latest.pt"
        before = latest.stat().st_mtime_ns if latest.exists() else None
        while process.poll() is None and (not latest.exists() or latest.stat().st_mtime_ns == before):
            time.sleep(0.005)
        try:
            process.wait(timeout=pause)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        for name in ("latest.pt", "best.pt"):
            torch.load(killed / name, weights_only=True)
        resume = ["--resume", latest]
    assert kills >= 1
    same_checkpoints(straight / "latest.pt", killed / "latest.pt")
    same_checkpoints(straight / "best.pt", killed / "best.pt")


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("short")
    good = tmp_path / "good"
    assert train(good, "--steps", 5).returncode == 0
    corrupt = tmp_path / "corrupt.pt"
    intact = (good / "latest.pt").read_bytes()
    corrupt.write_bytes(intact[:3000])
    flipped = tmp_path / "flipped.pt"
    flipped.write_bytes(
        intact[: len(intact) // 2] + bytes([intact[len(intact) // 2] ^ 1]) + intact[len(intact) // 2 + 1 :]
    )
    other_text = tmp_path / "other.txt"
    other_text.write_text("another text " * 1000)
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    cases = [
        (["--text", tmp_path / "missing"], f"--text {tmp_path / 'missing'} cannot be read: No such file"),
        (["--text", file], "5 bytes are too few"),
        (["--out", file / "below"], f"--out {file / 'below'} cannot be written"),
        (["--resume", tmp_path / "missing"], "No such file"),
        (["--resume", corrupt], f"--resume {corrupt} cannot be read"),
        (["--resume", flipped], "is damaged"),
        (["--resume", good / "latest.pt", "--steps", 5, "--text", other_text], "was made with text_crc32="),
        (["--resume", foreign], "is not a checkpoint of python -m benchmarks.train"),
        (["--resume", good / "latest.pt", "--width", 64], "was made with width=32, this run has width=64"),
        (
            ["--optimizer", "lion"],
            "'lion' is unknown: choose from 'Adam', 'AdamW', 'SGD', 'RMSprop', 'Adagrad', 'Norm",
        ),
        (["--steps", 0], "--steps must be at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--lr", -1], "--lr must be at least 0"),
        (["--width", 33], "must be a multiple of"),
        (["--amp", "fp16"], "argument --amp: invalid choice: 'fp16'"),
    ]
    for options, message in cases:
        assert main([*TINY, *map(str, ["--out", tmp_path / "out", *options])]) == 2, options
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err
        assert shown.err.count("\n") == 1


def test_convergence(capsys: pytest.CaptureFixture[str]) -> None:
    assert convergence.main() == 0
    assert capsys.readouterr().out.count(" yes\n") == 6

"""The training program with ``--shard``: losses are those of torch.optim sharded in the same way, and any number of
processes goes on with a checkpoint, whatever kind of sharding wrote it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist

from benchmarks import witness
from benchmarks.train import checkpoint
from benchmarks.train.__main__ import main

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ROOT = Path(__file__).parent.parent
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4", "--eval-every", "5"]
OPTIONS = [*TINY, "--steps", "10", "--warmup", "2"]
KINDS = ["ddp", "fsdp2", "hsdp", "zero"]
#: kind: the one whose run goes on with its checkpoint
NEXT = dict(zip(KINDS, ["fsdp2", "hsdp", "zero", "ddp"], strict=True))


def save_and_keep(save: Any, path: Path, settings: Any, progress: checkpoint.Progress, **states: Any) -> None:
    save(path, settings, progress, **states)
    if progress.step == 5 and path.name == "latest.pt":
        shutil.copy(path, path.with_name("kept.pt"))


def launched() -> contextlib.AbstractContextManager[object]:
    """Within it, this rank is one that torchrun has started."""
    numbers = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "test", **numbers})


def train(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    keep = functools.partial(save_and_keep, checkpoint.save)
    with launched(), mock.patch.object(checkpoint, "save", keep):
        for options in commands:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                code = main(options)
            found.append((code, out.getvalue(), err.getvalue()))
            dist.barrier()  # the checkpoint is written
    return found


def command(folder: Path, name: str, kind: str, source: str | None = None) -> list[str]:
    """A run in the folder of that name, which goes on with the source's step 5."""
    resume = [] if source is None else ["--resume", str(folder / source / "kept.pt")]
    return [*OPTIONS, "--shard", kind, "--out", str(folder / name), *resume]


def run_all(world: int, commands: dict[str, list[str]]) -> dict[str, str]:
    """What the first rank prints, by name; all have come to the end."""
    of_ranks = ranks.run(world, train, list(commands.values()))
    for rank, found in enumerate(of_ranks):
        for name, (code, out, err) in zip(commands, found, strict=True):
            assert code == 0, f"{name}, rank {rank}: {out}{err}"
            assert rank == 0 or out == "", name
    return {name: out for name, (_, out, _) in zip(commands, of_ranks[0], strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def compared(folder: Path) -> dict[str, str]:
    return run_all(2, {kind: [*command(folder, kind, kind), "--compare"] for kind in KINDS})


def losses(out: Path) -> tuple[list[float], list[float]]:
    """Of every step, and of every validation."""
    history = json.loads((out / "history.json").read_text())
    return [t["loss"] for t in history["train"]], [v["loss"] for v in history["validation"]]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_torch(kind: str, compared: dict[str, str]) -> None:
    lines = compared[kind].splitlines()
    assert f" tensors, {kind} over 2 processes, AdamW, " in lines[0]
    assert lines[-1] == "losses identical: yes"
    own, what, ours, theirs = lines[2:6]
    assert own.startswith("the training's own step of fusedoptim's AdamW: ") and "(minimum) of 10, " in own
    assert what.endswith(" in turn, 10 times:")
    assert ours.startswith("  AdamW of fusedoptim: ") and theirs.startswith("  AdamW of torch fused: ")
    assert all("(p50)" in line and "(minimum)" in line for line in (ours, theirs))


def train_with_another_root(options: list[str]) -> int:
    with mock.patch.object(witness, "ieee_sqrt", contextlib.nullcontext):
        [(code, _, _)] = train([options])
    return code


def test_a_difference_is_noticed(folder: Path) -> None:
    """By the process that says so; with torch's own square root."""
    options = [*command(folder, "different", "fsdp2"), "--steps", "20", "--compare"]
    assert ranks.run(2, train_with_another_root, options) == [1, 0]


def test_any_kind_goes_on_with_a_checkpoint(folder: Path, compared: dict[str, str]) -> None:
    """With the losses of the run that went on. The mean of two processes' gradients has one rounding in any kind, and
    their norm's bits agree in fp32, so that the losses of all kinds are the same, too."""
    run_all(2, {kind: command(folder, f"to {kind}", kind, source) for source, kind in NEXT.items()})
    expected = losses(folder / "ddp")
    assert len(expected[0]) == 10 and len(set(expected[0])) == 10
    for kind in KINDS:
        assert losses(folder / kind) == losses(folder / f"to {kind}") == expected, kind
    one, two = (torch.load(folder / name / "latest.pt", weights_only=True) for name in ("fsdp2", "to fsdp2"))
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][index][name]), (index, name)


def test_any_number_of_processes_goes_on_with_a_checkpoint(folder: Path, compared: dict[str, str]) -> None:
    """2 to 4, 4 to 2, 2 to 1. The means over other numbers of processes round otherwise."""
    four = {
        "four": [*command(folder, "four", "hsdp"), "--compare"],
        "to four": command(folder, "to four", "fsdp2", source="zero"),
    }
    assert run_all(4, four)["four"].endswith("losses identical: yes\n")
    run_all(2, {"from four": command(folder, "from four", "fsdp2", source="four")})
    torch.set_num_threads(1)
    assert main([*OPTIONS, "--out", str(folder / "to one"), "--resume", str(folder / "fsdp2" / "kept.pt")]) == 0
    expected = losses(folder / "ddp")
    for name, before in {"to four": "ddp", "from four": "four", "to one": "ddp"}.items():
        found = losses(folder / name)
        assert found[0][:5] == losses(folder / before)[0][:5] and found != expected, name
        for of, to in zip(found, expected, strict=True):
            assert of == pytest.approx(to, rel=1e-5), name


def test_averages_of_shards(folder: Path) -> None:
    """They are validated, not the weights that the last validation has left gathered."""
    kinds = ["ddp", "fsdp2", "hsdp"]
    run_all(2, {kind: [*command(folder, f"averaged {kind}", kind), "--ema", "0.8"] for kind in kinds})
    found = [json.loads((folder / f"averaged {kind}" / "history.json").read_text())["validation"] for kind in kinds]
    assert found[0] == found[1] == found[2]
    assert all(v["loss"] != v["loss_of_averages"] for v in found[0]) and len(found[0]) == 2


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    """The command itself, of which no warning comes, beside a single process."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    options = [*TINY, "--steps", "10", "--accumulate", "2"]
    launcher = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launcher, "-m", "benchmarks.train", *options, "--shard", "fsdp2", "--compare", "--out", str(together)],
        cwd=ROOT, capture_output=True, text=True, timeout=3600,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error",
            "TMPDIR": str(tmp_path),  # torchrun leaves a folder there
        },
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "losses identical: yes" and sum("M parameters" in line for line in lines) == 1
    assert sorted(p.name for p in together.iterdir()) == ["best.pt", "history.json", "latest.pt", "loss.png"]
    torch.set_num_threads(1)
    assert main([*options, "--out", str(alone)]) == 0
    histories = (json.loads((out / "history.json").read_text())["train"] for out in (together, alone))
    for i, (a, b) in enumerate(zip(*histories, strict=True)):  # the means of two halves round otherwise
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == b["lr"]
        assert i > 0 or a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "world", "error"),
    [
        (["--shard", "fsdp2"], None, "--shard fsdp2 shares a model between processes, but there is one: torchrun "),
        (["--shard", "hsdp", "--batch", "3"], "3", "--shard hsdp makes two replicas: 3 processes are no even number"),
        (["--shard", "zero", "--ema", "0.9"], "2", "--shard zero leaves a process averages of some parameters only"),
        (["--shard", "fsdp"], "2", "argument --shard: invalid choice: 'fsdp'"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(
    options: list[str],
    world: str | None,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if world is not None:
        for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, value)
    assert main([*TINY, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}") and said.count("\n") == 1

"""The check for a machine with a GPU: what becomes of its steps, and that those of both plans are whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import prebuild
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu.check import FAILED, PASSED, ROOT
from benchmarks.gpu.plans import Step, plans


def shell(name: str, text: str, limit: float = 20.0, **more: object) -> Step:
    return Step(name, "a.log", limit, text, **more)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_that_dies_hangs_or_is_not_there_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the summary is renewed on the way; a step that is cut may write down what it has."""
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    monkeypatch.setenv("COLOUR", "green")
    kept = gpu_check.KEPT
    waits = "trap 'echo saved; exit 1' INT; while :; do sleep 0.05; done"
    steps = [
        shell("good", "echo fine; echo also >&2", says="fine"),
        shell("dies", "echo oh dear; kill -9 $$"),
        shell("hangs", "trap '' INT TERM; sleep 100 & echo $!; wait; wait", 0.3),
        shell("cut", waits, 0.3, says="saved", partly=True),
        shell("no import", f"{sys.executable} -c 'import no_such_module'"),
        shell("absent", "no-such-program"),
        shell("silent", "true", says="5 passed"),
        shell("leaves", "sleep 100 & echo pid $!"),
        shell("long", f"echo first; yes 0123456789 | head -c {2 * kept}; echo; echo the end"),
        shell("sees", f"grep -c ' not run$' {tmp_path}/summary.txt; echo $COLOUR"),
        shell("last", f"touch {tmp_path}/.x.json.partial"),
    ]
    assert gpu_check.check("first", steps, "the head", tmp_path) == 5
    head, *lines, last = (tmp_path / "summary.txt").read_text().splitlines()
    found = {line[:14].strip(): (line[14:22].strip(), line.partition(" s  ")[2]) for line in lines}
    assert head == "the head" and re.match(r"GPU CHECK, first plan: 6 passed, 5 failed, \d+ s$", last)
    assert found["good"] == (PASSED, "also") and found["dies"] == (FAILED, "exit code -9: oh dear")
    assert found["hangs"][0] == FAILED and found["hangs"][1].startswith("cut after 0 s: ")
    assert found["cut"] == (PASSED, "cut after 0 s: saved")
    assert found["no import"] == (FAILED, "exit code 1: ModuleNotFoundError: No module named 'no_such_module'")
    assert found["absent"] == (FAILED, "exit code 127: bash: line 1: no-such-program: command not found")
    assert found["silent"][1] == "exit code 0: no '5 passed':"
    assert found["long"] == (PASSED, "the end") and found["sees"] == (PASSED, "green")
    log = (tmp_path / "a.log").read_text()
    assert "first\n" not in log and log.count("==== ") == len(steps) and kept < len(log) < kept + 3000
    assert "==== sees: " in log and "\n1\ngreen\n" in log, "only the last one had not run"
    assert not any(alive(int(pid)) for pid in re.findall(r"^(?:pid )?(\d{2,})$", log, re.M) if pid != "0123456789")
    assert {p.name for p in tmp_path.iterdir()} == {"summary.txt", "a.log"}


def test_a_plan_ends_in_time_or_when_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 0.2)
    steps = [shell("first", "sleep 50", 40.0), shell("second", "touch no")]
    assert gpu_check.check("first", steps, "", tmp_path, gpu_check.RESERVE + 0.5) == 2
    assert "no time was left" in (tmp_path / "summary.txt").read_text()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(
        gpu_check, "plans", lambda *args: {"second": [shell("asks", f"kill {os.getpid()}; sleep 9"), *steps]}
    )
    try:
        assert gpu_check.main([str(tmp_path), "--plan", "second"]) == 1
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert "second plan: 0 passed, 3 failed" in (tmp_path / "summary.txt").read_text()
    assert not list(tmp_path.glob("no"))


def as_bash_reads(command: str) -> list[str]:
    read = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    return read.stdout.splitlines()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plans(device: str, tmp_path: Path) -> None:
    for plan, steps in plans(device, tmp_path, "none").items():
        words = [w for s in steps for w in as_bash_reads(s.command)]
        assert len({s.name for s in steps}) == len(steps)
        files = {"summary.txt", *(s.log for s in steps), *(Path(w).name for w in words if w.startswith(str(tmp_path)))}
        assert len(files) <= 8 and all((ROOT / w).exists() for w in words if w.startswith("tests/"))
        # Libraries made beforehand take seconds instead of their limit; the last tests have what is left.
        assert sum(s.limit for s in steps if s.name != "libraries" and "tests" not in s.name) <= 270, plan
    assert sum(len((ROOT / "benchmarks" / n).read_text().splitlines()) for n in SCRIPTS) <= 350


SCRIPTS = ("gpu_check.sh", "gpu/check.py", "gpu/plans.py", "gpu/steps.py")


def test_the_command_and_its_tools(tmp_path: Path) -> None:
    """The check starts without torch, and shows what is wrong with it."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    command = [
        "bash",
        str(ROOT / "benchmarks" / "gpu_check.sh"),
        "out",
        "--device",
        "cpu",
        "--commit",
        "0123456789abcd",
    ]
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "--only", "self-check"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "libcudart.so.13: cannot open" in done.stdout, done.stderr
    assert "commit 0123456789ab, " in (tmp_path / "out" / "summary.txt").read_text()
    done = subprocess.run([*command, "--only", "lunch"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("--only 'lunch' is unknown: choose from 'device'")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.steps", "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert done.returncode == 0 and done.stdout.endswith(b" 0 wrong\n")


def test_libraries_made_beforehand_are_used_if_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files with words in them stand for libraries, and one that says so for those that load."""
    tree, made, name = tmp_path / "tree", tmp_path / "made", "_C.cpython-312-x86_64-linux-gnu.so"
    for folder in (tree / "csrc", tree / "fusedoptim", made):
        folder.mkdir(parents=True)
    (tree / "setup.py").write_text("print('a build')")
    loads = f"import sys; sys.exit(None if open('fusedoptim/{name}').read() == 'loads' else 'it does not load')"
    monkeypatch.setattr(prebuild, "LOADS", loads)
    monkeypatch.setattr(prebuild, "ROOT", tree)
    monkeypatch.setenv("FUSEDOPTIM_COMMIT", "0123456789ab")

    def installed(library: str = "loads", commit: str = "0123456789ab", sources: str | None = None) -> str:
        (made / name).write_text(library)
        report = {"cpu": None, "commit": commit, "sources": sources or prebuild.sources(tree)}
        (made / prebuild.REPORT).write_text(json.dumps(report))
        try:
            prebuild.install(made)
        except prebuild.UsageError as error:  # what this setup.py builds is nothing
            print(error)
        return capfd.readouterr().out

    (tree / "csrc" / "NOTES.md").write_text("what was measured")
    expected = "libraries made beforehand, of commit ba9876543210, whose sources are those of 0123456789ab"
    assert expected in installed(commit="ba9876543210")
    assert (tree / "fusedoptim" / name).exists()
    shown = installed(sources="other")
    assert "csrc or setup.py have changed since" in shown and "a build" in shown
    assert not (tree / "fusedoptim" / name).exists(), "one that does not fit must not stay"
    assert "failed with exit code 1" in shown and "libraries built" not in shown
    shown = installed("damaged")
    assert "not used: it does not load" in shown and "a build" in shown

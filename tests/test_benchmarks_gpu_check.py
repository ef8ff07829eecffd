"""The check for a machine with a GPU: time limits, what is kept of a part that is cut off, counts, the last line. The
tools that it runs are stood in for by scripts, and the GPU by the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import gpu_check, parts, verdicts
from benchmarks.errors import UsageError
from benchmarks.parts import ABSENT, FAILED, PASSED, ROOT, Finding, Interrupted, Outcome, Part, Verdict
from fusedoptim import _native

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Put back after every test. What a background job ignores, its children would ignore as well: not so here."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program, written for sh, in front of all others."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, text: str) -> Path:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        return program

    return make


def shell(name: str, text: str, limit: float = 20.0, **more: object) -> Part:
    return Part(name, f"{name}.log", limit, ["sh", "-c", text], **more)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


# ---- one part ----


def test_a_part_passes_or_fails_and_its_words_are_kept(tmp_path: Path) -> None:
    good = parts.run(shell("a", "echo fine; echo also >&2"), tmp_path, soon())
    bad = parts.run(shell("a", "echo oh dear; exit 3"), tmp_path, soon())
    assert good.verdict == Verdict(PASSED) and bad.verdict == Verdict(FAILED, "exit code 3: oh dear")
    log = (tmp_path / "a.log").read_text()
    assert log.index("fine\nalso\n") < log.index("oh dear") and log.count("==== a: sh -c") == 2
    assert not (tmp_path / parts.RUNNING).exists()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    found = parts.run(Part("a", "a.log", 5, ["no-such-program"]), tmp_path, soon())
    assert found.verdict.state == FAILED and found.verdict.note.startswith("cannot be started: ")


def test_the_environment_of_a_part(tmp_path: Path) -> None:
    parts.run(shell("a", "echo $COLOUR", environment={"COLOUR": "green"}), tmp_path, soon())
    assert "\ngreen\n" in (tmp_path / "a.log").read_text()


def test_a_part_is_cut_at_its_limit_with_all_its_processes(tmp_path: Path) -> None:
    begun = time.monotonic()
    part = shell("a", "echo early; sleep 100 & echo $!; wait", 0.5, least=0.1)
    found = parts.run(part, tmp_path, soon())
    assert found.verdict == Verdict(FAILED, "cut after 0 s") and time.monotonic() - begun < 5
    _, early, pid, last = (tmp_path / "a.log").read_text().splitlines()
    assert early == "early" and last == "[cut after 0 s]"
    time.sleep(0.05)
    assert not alive(int(pid))


def test_a_part_that_is_cut_may_write_down_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for a moment."""
    monkeypatch.setattr(parts, "GRACE", 0.5)
    begun = time.monotonic()
    parts.run(
        shell("polite", "trap 'echo saved; exit 1' INT; while :; do sleep 0.05; done", 0.4, least=0.1), tmp_path, soon()
    )
    assert "\nsaved\n" in (tmp_path / "polite.log").read_text()
    stubborn = shell("stubborn", "trap '' INT TERM; while :; do sleep 0.05; done", 0.4, least=0.1)
    assert parts.run(stubborn, tmp_path, soon()).verdict.state == FAILED
    assert time.monotonic() - begun < 5


def test_the_time_that_is_left_counts(tmp_path: Path) -> None:
    found = parts.run(shell("a", "touch ran", least=10.0), tmp_path, soon(3))
    assert found.verdict == Verdict(FAILED, "not run: 3 s were left, it takes 10") and not (tmp_path / "a.log").exists()
    found = parts.run(shell("a", "sleep 50", limit=40.0, least=0.1), tmp_path, soon(0.4))
    assert found.verdict.note.startswith("cut after 0 s") and found.seconds < 5


def test_long_logs_are_cut_to_their_ends(tmp_path: Path) -> None:
    for _ in range(6):
        parts.run(shell("a", f"yes 0123456789 | head -n {parts.KEPT // 5}; echo the end"), tmp_path, soon())
    log = tmp_path / "a.log"
    assert parts.LOG // 2 < log.stat().st_size < 256_000
    text = log.read_text()
    assert text.startswith("[the first ") and text.endswith("the end\n")
    kinds = {line if line[0] not in "[=" else line[:5] for line in text.splitlines()}
    assert kinds == {"[the ", "==== ", "0123456789", "the end"}, "no half lines"


def test_a_result_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    found = parts.run(shell("a", ":", judge=lambda outcome: Verdict(str(1 // 0))), tmp_path, soon())
    assert found.verdict.state == FAILED and "ZeroDivisionError" in found.verdict.note


# ---- all parts ----


def checked(out: Path, plan: list[Part], seconds: float = 60.0) -> tuple[gpu_check.Check, str]:
    out.mkdir(exist_ok=True)
    check = gpu_check.Check("cpu", out, plan)
    check.run(seconds)
    return check, (out / gpu_check.SUMMARY).read_text()


def test_counts_and_the_last_line(tmp_path: Path) -> None:
    plan = [
        shell("good", ":"),
        shell("bad", "exit 1"),
        shell("gone", ":", absent=Verdict(ABSENT, "no permission")),
        shell("also", ":"),
    ]
    check, text = checked(tmp_path / "out", plan)
    assert text.endswith("\nGPU CHECK: 2 passed, 1 failed\n") and check.failed == 1
    table = {row.split()[0]: row for row in text.splitlines() if row}
    assert "passed" in table["good"] and "failed" in table["bad"] and "exit code 1" in table["bad"]
    assert "not available" in table["gone"] and "no permission" in table["gone"]


def test_the_summary_is_renewed_after_every_part(tmp_path: Path) -> None:
    """So that it is right if the check is killed."""
    out = tmp_path / "out"
    seen = f"cat {out}/{gpu_check.SUMMARY} > {tmp_path}/"
    checked(out, [shell("one", seen + "before"), shell("two", "exit 1"), shell("three", seen + "after")])
    before, after = ((tmp_path / name).read_text() for name in ("before", "after"))
    assert before.endswith("GPU CHECK: 0 passed, 3 failed\n") and before.count("not run yet") == 3
    assert after.endswith("GPU CHECK: 1 passed, 2 failed\n") and after.count("not run yet") == 1


def test_the_whole_ends_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    plan = [
        shell("first", "sleep 50", 40.0, least=0.1),
        shell("second", ":", least=0.5),
        shell("third", ":", least=0.5),
    ]
    _, text = checked(tmp_path / "out", plan, gpu_check.RESERVE + 1.0)
    assert time.monotonic() - begun < 6
    assert text.endswith("GPU CHECK: 0 passed, 3 failed\n") and text.count("not run: 0 s were left") == 2


def test_the_limits_leave_time_to_end() -> None:
    assert parts.GRACE + 5 < gpu_check.RESERVE and gpu_check.TOTAL <= 540
    for device in ("cpu", "cuda"):
        plan = gpu_check.all_parts(device, Path("out"), Path("scratch"))
        assert [p.name for p in plan] == [
            *("build", "self-check", "tests", "benchmarks"),
            *(["Triton tests"] if device == "cuda" else []),
            *("memcheck", "racecheck", "initcheck", "synccheck", "ncu", "more benchmarks"),
        ]
        assert {p.log for p in plan} < set(gpu_check.FILES)
    assert len(set(gpu_check.FILES)) <= 8


DRIVER = """
import sys
from benchmarks import gpu_check
from benchmarks.parts import Part
gpu_check.all_parts = lambda device, out, scratch, tests: [
    Part("first", "a.log", 30, ["sh", "-c", "echo done"]),
    Part("second", "a.log", 30, ["sh", "-c", "echo begun; touch %s; sleep 60 & echo $! > %s; wait"]),
    Part("third", "a.log", 30, ["sh", "-c", "echo never"]),
]
sys.exit(gpu_check.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_check_that_is_asked_to_end_says_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    """Also where the signal was ignored before, as in the background of a script."""
    out, pid_file = tmp_path / "out", tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER % (out / ".bench.json.partial", pid_file), str(out), "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    end = soon(20)
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(number)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and time.monotonic() - begun < 5
    assert shown.endswith("GPU CHECK: 1 passed, 2 failed\n")
    text = (out / gpu_check.SUMMARY).read_text()
    assert text.endswith("GPU CHECK: 1 passed, 2 failed\n")
    assert f"ended by {number.name}" in text and "not run: interrupted" in text
    assert "done\n" in (out / "a.log").read_text() and "begun\n" in (out / "a.log").read_text()
    assert not alive(int(pid_file.read_text())) and {p.name for p in out.iterdir()} == {"summary.txt", "a.log"}


def test_the_first_signal_counts_and_no_other() -> None:
    parts.interruptible()
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.args == ("SIGTERM",)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "a second one must not disturb the end"


# ---- what counts as passed ----


def said(text: str, code: int | None = 0, cut: str | None = None) -> Outcome:
    return Outcome(code, text, cut)


XML = """<testsuites><testsuite tests="4">
<testcase name="test_good"/>{}
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    "cases,outcome,state,note",
    [
        ("", said(""), PASSED, "1 passed, 0 failed, 0 skipped"),
        (
            '<testcase name="test_bad"><failure message="no"/></testcase>',
            said("", 1),
            FAILED,
            "1 passed, 1 failed, 0 skipped; failed: test_bad",
        ),
        (
            '<testcase name="test_worse"><error message="no"/></testcase>',
            said("", 1),
            FAILED,
            "1 passed, 1 failed, 0 skipped; failed: test_worse",
        ),
        (
            '<testcase name="test_left"><skipped message="needs a CUDA device"/></testcase>',
            said(""),
            FAILED,
            "1 passed, 0 failed, 1 skipped (1 needs a CUDA device)",
        ),
        ("", said("", 2, "cut after 9 s"), FAILED, "1 passed, 0 failed, 0 skipped; cut after 9 s"),
        ("", said("Fatal Python error", -11), FAILED, "0 skipped; exit code -11: Fatal Python error"),
    ],
)
def test_verdicts_on_tests(tmp_path: Path, cases: str, outcome: Outcome, state: str, note: str) -> None:
    report = tmp_path / "t.xml"
    report.write_text(XML.format(cases))
    verdict = verdicts.tests(outcome, report)
    assert verdict.state == state and verdict.note.endswith(note)


def test_no_tests_are_no_success(tmp_path: Path) -> None:
    assert verdicts.tests(said("cut", -9, "cut after 9 s"), tmp_path / "none.xml").state == FAILED
    empty = tmp_path / "t.xml"
    empty.write_text("<testsuites/>")
    assert verdicts.tests(said(""), empty).state == FAILED


def test_verdicts_on_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    (tmp_path / "fusedoptim").mkdir()
    report = tmp_path / "fusedoptim" / "_build.json"
    report.write_text('{"torch": "2.11.0", "cpu": null, "cuda": "nvcc failed: no such file"}')
    assert verdicts.build(said(""), cuda=False) == Verdict(PASSED, "torch 2.11.0")
    found = verdicts.build(said(""), cuda=True)
    assert found == Verdict(FAILED, "without its cuda kernels: nvcc failed: no such file")
    assert verdicts.build(said("", 1), cuda=False).state == FAILED
    report.write_text('{"torch": "2.11.0", "cpu": null, "cuda": null}')
    assert verdicts.build(said(""), cuda=True).state == PASSED


SELF_CHECK = """backends:
  cuda       {}
  cpu        available
self-check: cuda, 6 optimizers in 4 dtypes: {} (1.0 s)
self-check: cpu, 6 optimizers in 4 dtypes: the reference's bits (1.0 s)
"""


def test_verdicts_on_the_self_check() -> None:
    good = verdicts.self_check(said(SELF_CHECK.format("available", "the reference's bits")), "cuda")
    assert good.state == PASSED and good.note.startswith("cuda, 6 optimizers")
    bad = verdicts.self_check(said(SELF_CHECK.format("available", "FAILED for AdamW"), 1), "cuda")
    assert bad.state == FAILED and "FAILED for AdamW" in bad.note
    missing = "not available: no nvcc was found"
    assert verdicts.self_check(said(SELF_CHECK.format(missing, "?")), "cuda") == Verdict(
        FAILED,
        f"cuda       {missing}; self-check: cuda, 6 optimizers in 4 dtypes: ? (1.0 s); "
        "self-check: cpu, 6 optimizers in 4 dtypes: the reference's bits (1.0 s)",
    )
    only_cpu = SELF_CHECK.format("available", "").replace("self-check: cuda", "nothing about cuda")
    assert verdicts.self_check(said(only_cpu), "cuda") == Verdict(FAILED, "cuda was not checked")


@pytest.mark.parametrize(
    "outcome,state,note",
    [
        (said("cuda: 26 sets, 0 wrong\n== ERROR SUMMARY: 0 errors"), PASSED, "ERROR SUMMARY: 0 errors"),
        (
            said("cuda: 26 sets, 0 wrong\n== ERROR SUMMARY: 3 errors", 86),
            FAILED,
            "found errors: ERROR SUMMARY: 3 errors",
        ),
        (said("Traceback\n== ERROR SUMMARY: 0 errors", 1), FAILED, "exit code 1"),
        (said("cuda: 26 sets, 0 wrong"), FAILED, "it gave no summary"),
        (said("== ERROR SUMMARY: 0 errors"), FAILED, "ERROR SUMMARY: 0 errors"),  # the program did not run
        (said("== ERROR SUMMARY: 0 errors", -2, "cut after 60 s"), FAILED, "cut after 60 s; ERROR SUMMARY: 0 errors"),
    ],
)
def test_verdicts_on_a_sanitizer(outcome: Outcome, state: str, note: str) -> None:
    verdict = verdicts.sanitizer(outcome, 86)
    assert verdict.state == state and verdict.note.startswith(note)


COUNTERS = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","step_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"0","step_kernel","launch__registers_per_thread","register/thread","64"
"1","norm_step_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","80.25"
==PROF== Disconnected
"""


@pytest.mark.parametrize(
    "outcome,state,note",
    [
        (said(COUNTERS), PASSED, "2 launches; % of peak memory bandwidth: 91.5, 80.25"),
        (said(COUNTERS, None, "cut after 45 s"), FAILED, "cut after 45 s; 2 launches"),
        (said("==ERROR== ERR_NVGPUCTRPERM - The user", 1), ABSENT, "no permission to read the GPU's counters"),
        (said("==WARNING== No kernels were profiled."), FAILED, "it measured nothing: ==WARNING== No kernels"),
        (said("Traceback", 1), FAILED, "exit code 1: Traceback"),
    ],
)
def test_verdicts_on_ncu(outcome: Outcome, state: str, note: str) -> None:
    verdict = verdicts.ncu(outcome)
    assert verdict.state == state and verdict.note.startswith(note)


def test_verdicts_on_benchmarks(tmp_path: Path) -> None:
    from test_benchmarks_results import a_row, results, saved

    path = tmp_path / "b.json"
    assert verdicts.benchmarks(said("no GPU", 2), path, whole=True) == Verdict(FAILED, "exit code 2: no GPU")
    content = results(a_row(), {**a_row(), "skipped": "too large", "contenders": {}})
    saved(path, content)
    good = Verdict(PASSED, "1 of 2 rows measured, 0 failed, 1 skipped")
    assert verdicts.benchmarks(said(""), path, whole=True) == good
    content.finished, content.planned = False, 9
    saved(path, content)
    cut = said("", 130, "cut after 60 s")
    note = "1 of 9 rows measured, 0 failed, 1 skipped; cut after 60 s"
    assert verdicts.benchmarks(cut, path, whole=True) == Verdict(FAILED, note)
    assert verdicts.benchmarks(cut, path, whole=False) == Verdict(PASSED, note)
    assert verdicts.benchmarks(said("killed", -9), path, whole=False).state == FAILED, "it ended too early by itself"
    content.rows[0]["contenders"]["fusedoptim"] = {"failed": "RuntimeError: illegal address"}
    content.rows.append(a_row())
    saved(path, content)
    found = verdicts.benchmarks(cut, path, whole=False)
    assert found.state == FAILED and "AdamW fp32 64M: RuntimeError: illegal address" in found.note


# ---- the goals' table ----


def test_goals_that_are_missed_are_shown_and_are_no_failures(tmp_path: Path) -> None:
    from test_benchmarks_results import a_row, results, saved

    row = a_row(2.0, {"torch fused": 1.9}, ("AdamW", "fp32", "gpt2-xl", "kept"))
    host = a_row(2.0, {}, ("AdamW", "fp32", "300x1024", "kept"))
    host["contenders"]["fusedoptim"]["host_ms"] = 0.041
    sgd = a_row(2.0, {}, ("SGD", "fp32", "1G", "kept"))
    sgd["contenders"]["torch fused"] = {"failed": "RuntimeError: no"}
    lost = {**a_row(key=("AdamW", "bf16", "1G", "kept")), "contenders": {}, "skipped": "needs 99 GiB"}
    saved(tmp_path / gpu_check.BENCH, results(row, host, sgd, lost))
    lines = gpu_check.goal_lines("cuda", tmp_path)
    goals = sum(len(g) for g in gpu_check.GOALS["cuda"].values())
    assert len(lines) == 1 + goals
    text = {" ".join(row.split()) for row in lines}
    assert text >= {
        "AdamW fp32 gpt2-xl 0.93 of copy 0.875 MISSED",
        "AdamW fp32 gpt2-xl torch fused 1x 0.95 MISSED",
        "AdamW fp32 300x1024 host <= 60 us 0.041 reached",
        "SGD fp32 1G torch fused 1x not measured: RuntimeError: no",
        "AdamW bf16 1G 0.9 of copy not measured: needs 99 GiB",
        "AdamW fp32 465-groups torch fused 8x not measured",
    }
    check = gpu_check.Check("cuda", tmp_path, [Part("benchmarks", "b.log", 5)])
    check.add(Finding(check.plan[0], Verdict(PASSED)))
    assert "MISSED" in check.summary() and check.summary().endswith("GPU CHECK: 1 passed, 0 failed\n")


# ---- tools ----


def test_tools_are_found_on_the_path_and_beside_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Callable[[str, str], Path]
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert gpu_check.tool("no-such-tool") is None
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    for name in ("nvcc", "a-tool"):
        (toolkit / name).write_text("#!/bin/sh\n")
        (toolkit / name).chmod(0o755)
    assert gpu_check.tool("a-tool") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert gpu_check.tool("a-tool") == str(toolkit / "a-tool")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{toolkit}:{os.environ['PATH']}")
    assert gpu_check.tool("a-tool") == str(toolkit / "a-tool")
    mine = fake("a-tool", ":")
    monkeypatch.setenv("PATH", f"{mine.parent}:{os.environ['PATH']}")
    assert gpu_check.tool("a-tool") == str(mine)


def test_a_sanitizer_is_needed_on_a_gpu_and_counters_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "tool", lambda name: None)
    plan = {d: {p.name: p for p in gpu_check.all_parts(d, Path("o"), Path("s"))} for d in ("cpu", "cuda")}
    assert plan["cuda"]["memcheck"].absent == Verdict(FAILED, "compute-sanitizer was not found")
    assert plan["cpu"]["memcheck"].absent == Verdict(ABSENT, "compute-sanitizer was not found")
    assert plan["cuda"]["ncu"].absent == Verdict(ABSENT, "ncu was not found")


def test_gpu_tests_are_those_that_are_marked() -> None:
    option, marker, *files = gpu_check.marked_tests()
    assert (option, marker) == ("-m", "gpu")
    assert {"tests/test_cuda_gpu.py", "tests/test_amp.py"} <= set(files) and "tests/test_properties.py" not in files
    plan = {p.name: p for p in gpu_check.all_parts("cuda", Path("o"), Path("s"))}
    selections = [list(plan[name].command[-2:]) for name in ("tests", "Triton tests")]
    assert selections == [["-k", "not triton"], ["-k", "triton"]]
    given = {p.name: p for p in gpu_check.all_parts("cuda", Path("o"), Path("s"), ["tests/test_x.py"])}
    assert given["tests"].command[-1] == "tests/test_x.py" and "Triton tests" not in given


# ---- the command ----


def run_script(out: Path, *options: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), out.name, *options],
        cwd=out.parent,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


STANDING_IN = 'for last; do case "$1" in */python*) break;; esac; shift; done'


def test_the_command_on_a_cpu(tmp_path: Path, fake: Callable[[str, str], Path]) -> None:
    """Real parts, with tools that stand in for NVIDIA's: one runs the program, one finds an error, one may not."""
    fake(
        "compute-sanitizer",
        f"""[ "$1 $3 $5" = "--tool --target-processes --error-exitcode" ] || exit 9
tool=$2
[ "$tool" = racecheck ] && echo "= RACECHECK SUMMARY: 1 hazard displayed" && exit "$6"
{STANDING_IN}
"$@" && echo "= ERROR SUMMARY: 0 errors" """,
    )
    fake("ncu", 'echo "==ERROR== ERR_NVGPUCTRPERM - The user has no permission"; exit 1')
    out = tmp_path / "out"
    out.mkdir()
    (out / gpu_check.BENCH).write_text("from an earlier check")
    (out / "notes.txt").write_text("mine")
    names = ("self-check", "benchmarks", "memcheck", "racecheck", "ncu")
    done = run_script(out, *(w for n in names for w in ("--part", n)), FUSEDOPTIM_CHECK_DEVICE="cpu")
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("GPU CHECK: 3 passed, 1 failed\n")
    text = (out / gpu_check.SUMMARY).read_text()
    assert text.splitlines()[-1] == "GPU CHECK: 3 passed, 1 failed" and "device cpu" in text
    table = {" ".join(row.split()[:2]): row for row in text.splitlines()}
    assert "the reference's bits" in table["self-check passed"]
    assert "1 of 1 rows measured, 0 failed" in table["benchmarks passed"]
    assert "ERROR SUMMARY: 0 errors" in table["memcheck passed"]
    assert "found errors: RACECHECK SUMMARY: 1 hazard displayed" in table["racecheck failed"]
    assert "no permission to read the GPU's counters" in table["ncu not"]
    assert any(row.startswith("AdamW fp32 2000x64") and "not measured" not in row for row in text.splitlines())
    files = {p.name: p.stat().st_size for p in out.iterdir()}
    assert files.keys() == {"notes.txt", "summary.txt", "build.log", "tools.log", "bench.json", "bench.log"}
    assert all(size < 256_000 for size in files.values())
    assert "28 sets of tensors" in (out / "tools.log").read_text()


def test_the_tests_part_runs_and_counts(tmp_path: Path, fake: Callable[[str, str], Path]) -> None:
    """One passes, one fails, one is skipped."""
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_one(): pass\ndef test_two(): assert 0\ndef test_three(): pytest.skip('no reason')\n"
    )
    out = tmp_path / "out"
    done = run_script(out, "--device", "cpu", "--part", "tests", "--tests", str(tests))
    assert done.returncode == 1 and done.stdout.endswith("GPU CHECK: 0 passed, 1 failed\n"), done.stdout + done.stderr
    assert "1 passed, 1 failed, 1 skipped (1 no reason); failed: test_two" in done.stdout
    assert {p.name for p in out.iterdir()} == {"summary.txt", "tests.log"}


#: Compilers that have the result ready, and leave it where it is asked for.
READY = 'while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) : > "$2";; esac; shift; done; cp "{}" "$out"'


@pytest.mark.skipif(_native._C is None, reason="needs a built library to hand out")
def test_the_build_is_for_this_machine_and_with_cuda(tmp_path: Path, fake: Callable[[str, str], Path]) -> None:
    library = next(Path(str(_native._C.__file__)).parent.glob("_C.*.so"))
    copy = tmp_path / "copy"
    for name in ("csrc", "fusedoptim", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    # torch asks a compiler for its version first
    cxx = fake("cxx", f'case "$1" in -dump*|--version) exec c++ "$@";; esac; {READY.format(library)}')
    environment = {"CXX": str(cxx), "CUDACXX": "nvcc", "TORCH_CUDA_ARCH_LIST": "5.0"}

    def build() -> str:
        script = copy / "benchmarks" / "gpu_check.sh"
        run_script(tmp_path / "out", "--device", "cuda", "--part", "build", script=script, **environment)
        return (tmp_path / "out" / gpu_check.SUMMARY).read_text()

    fake("nvcc", 'echo "nvcc fatal error: no such GPU" >&2; exit 1')
    text = build()
    assert "without its cuda kernels: nvcc failed: nvcc fatal error: no such GPU" in text
    assert text.endswith("GPU CHECK: 0 passed, 1 failed\n")
    fake("nvcc", READY.format(library))
    text = build()
    assert text.endswith("GPU CHECK: 1 passed, 0 failed\n"), text
    assert (copy / "fusedoptim" / "_C_cuda.so").exists()
    log = (tmp_path / "out" / "build.log").read_text()
    assert "arch=compute_" in log and "compute_50" not in log, "the environment's choice was not for this machine"


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "usage: bash benchmarks/gpu_check.sh OUTDIR [options]\n"
    for options, says in (
        (["--device", "tpu"], "--device 'tpu' is unknown: choose from 'cpu', 'cuda'"),
        (
            ["--device", "cpu", "--part", "lunch"],
            "--part 'lunch' is unknown: choose from 'build', 'self-check', 'tests'",
        ),
    ):
        with pytest.raises(UsageError) as raised:
            gpu_check.main([str(tmp_path / "out"), *options])
        assert str(raised.value).startswith(says)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"OUTDIR .* cannot be written"):
        gpu_check.main([str(tmp_path / "file")])


def test_nothing_of_torch_is_needed_to_say_that_all_is_broken(tmp_path: Path) -> None:
    """A torch that cannot be imported is a finding."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    out = tmp_path / "out"
    done = run_script(out, "--device", "cpu", "--part", "self-check", "--part", "benchmarks", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout.endswith("GPU CHECK: 0 passed, 2 failed\n"), done.stdout + done.stderr
    assert "libcudart.so.13: cannot open shared object file" in (out / gpu_check.SUMMARY).read_text()

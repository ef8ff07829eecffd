"""The package as it is installed and imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CAPABILITIES, CASES
from cuda_host import CHECKS_AS_CALLS, sanitizers

from fusedoptim import __main__ as main_module
from fusedoptim import _native

ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(_native._C is None, reason=f"no compiled library: {_native.problem}")


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, timeout=3600, cwd=Path(ROOT).anchor
    )


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-W", "ignore", "-c", code, PYTHONPATH=env.pop("PYTHONPATH", str(ROOT)), **env)


def test_import_is_silent_quick_and_starts_no_cuda(tmp_path: Path) -> None:
    """Quick as the number of functions called: 32,000 in a tenth of a second."""
    code = """if True:
        import sys, torch
        from counted import calls
        n = calls(lambda: __import__("fusedoptim"))
        assert not torch.cuda.is_initialized()
        assert "triton" not in sys.modules or hasattr(torch, "_inductor")
        open({path!r}, "w").write(str(n))
    """
    path = tmp_path / "calls"
    result = python(
        code.replace("{path!r}", repr(str(path))), PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    )
    assert result.returncode == 0 and result.stdout == "" and result.stderr == "", result.stderr
    assert int(path.read_text()) < 60_000


def test_report_fails_if_the_self_check_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main_module, "differing", lambda *arguments: ["Adam torch.float32"])
    assert main_module.main() == 1
    assert "FAILED for Adam torch.float32" in capsys.readouterr().out


class Driver:
    """Two GPUs, as far as the report asks, of which the kernels that are loaded have code for some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fitting: int) -> None:
        self.checked: list[tuple[str, str]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(_native, "cuda_problem", lambda: None)
        monkeypatch.setattr(_native, "triton_problem", lambda: "Triton is not installed")
        monkeypatch.setattr(
            _native, "cuda_device_problem", lambda i: None if i in fitting else "on a new GPU: no kernel image"
        )
        monkeypatch.setattr(main_module, "cuda_on_host", lambda: False)
        monkeypatch.setattr(main_module, "differing", lambda *arguments: self.checked.append(arguments))
        monkeypatch.setattr(main_module, "_check_compiled", lambda: False)


@needs_library
@pytest.mark.parametrize(
    ("fitting", "listed", "checked", "slow"),
    [
        ((0, 1), "available", "cuda:0", None),
        ((1,), "available on cuda:1, but not available: on a new GPU: no kernel image", "cuda:1", "cuda:0"),
        ((), "not available: on a new GPU: no kernel image", None, "cuda:0 and cuda:1"),
    ],
)
def test_report_of_gpus_that_the_kernels_have_no_code_for(
    fitting: tuple[int, ...],
    listed: str,
    checked: str | None,
    slow: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are listed as what they are, and not checked, which would raise."""
    driver = Driver(monkeypatch, *fitting)
    assert main_module.main() == int(slow is not None)
    shown = capsys.readouterr().out
    assert re.search(r"^  cuda +(.*)$", shown, re.M)[1] == listed
    assert driver.checked == [*([("cuda", checked)] if checked else []), ("cpu", "cpu")]
    assert re.findall(r"Parameters on (.+) are stepped by the eager reference", shown) == ([slow] if slow else [])


@needs_library
def test_library_refers_to_no_cpp_symbol_of_torch() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = run("nm", "-DC", _native._C.__file__).stdout
    assert "torch_parallel_for" in symbols
    undefined = [line for line in symbols.splitlines() if " U " in line]
    assert not [line for line in undefined if re.search(r"\b(c10|at|torch)::", line)]


@needs_library
def test_wide_instructions_stay_in_the_functions_that_are_chosen_for_them() -> None:
    """A shared function compiled for AVX-512 would end the process on a machine without it."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    listing = run("objdump", "-dC", "--no-show-raw-insn", _native._C.__file__).stdout
    function, offenders, users = "", set(), 0
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"%[yz]mm\d|\tv[a-z]", line):
            users += 1
            if not re.search(r"avx512|avx2", function):
                offenders.add(function)
    if "x86" in os.uname().machine:
        assert users > 1000
    assert not offenders


@needs_library
def test_rules_of_the_library_are_those_of_the_package() -> None:
    assert sorted(_native._C.rules()) == sorted({"clip", *(case.cls.rule.name for case in CASES if not case.own)})


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_so_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "build", "*.so", ".venv", "runs", "*.egg-info"))
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(target)]
    result = run(*command, str(source), CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout + result.stderr
    code = """if True:
        import warnings, torch, fusedoptim
        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            o = fusedoptim.AdamW([p], lr=0.5)
            o.step(); o.step()
            fusedoptim.SGD([p]).step()
        assert p[0] < 0.1, p
        messages = [str(w.message) for w in seen if "fusedoptim" in str(w.message)]
        assert len(messages) == 1, messages
        assert "no-such-compiler" in messages[0] and "apt-get install g++" in messages[0], messages
        assert messages[0].split(". Run `python")[0].endswith(f"--force-reinstall --no-deps {source})"), messages
    """
    result = python(code.replace("{source}", str(source)), PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr
    report = run(sys.executable, "-W", "ignore", "-m", "fusedoptim", PYTHONPATH=str(target))
    assert report.returncode == 1 and "library: not available: they were not built: " in report.stdout, report.stdout
    assert "cpu        not available: see the library" in report.stdout


@pytest.mark.slow
def test_kernels_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Layouts, tails, errors and stale memory, once more, in a library that ends the process at a bad access."""
    preload = sanitizers()
    if preload is None:
        pytest.skip("needs g++ with libasan")
    shutil.copytree(ROOT / "fusedoptim", tmp_path / "fusedoptim", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("tests", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    build = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    built = subprocess.run(
        build,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,  # against one that hangs, however busy the machine is
        env={
            **os.environ,
            "FUSEDOPTIM_SANITIZE": CAPABILITIES[0] if CAPABILITIES else "1",
            "FUSEDOPTIM_BUILD_CUDA": "0",
            "CXX": "g++",  # whose runtime is preloaded
            "CFLAGS": f"{os.environ.get('CFLAGS', '')} {CHECKS_AS_CALLS}",
        },
    )
    assert built.returncode == 0 and list((tmp_path / "fusedoptim").glob("_C*.so")), built.stdout + built.stderr
    env = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tmp_path),
        "FUSEDOPTIM_TEST_COVERING": "1",
        "FUSEDOPTIM_TEST_CSRC": str(ROOT / "csrc"),
        "CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all",  # of rules that tests compile
    }
    names = ("layout", "staleness", "rounding", "norm", "low_precision", "own_sums")
    tests = [f"tests/test_{name}.py" for name in names]
    # What own rules are compiled to has no checks, but for test_own_sums.py's.
    gallery = "asgd_all or lamb_clip or lars_all or schedule_free_all"
    chosen = f"not (ten_thousand or allocates or reference_sum or shards or {gallery})"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, env=env)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout

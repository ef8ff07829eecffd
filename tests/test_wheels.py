"""Wheels: what the libraries ask of a system, what a wheel has to hold, and what an installed one says of itself."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import fusedoptim
from fusedoptim import _installation, _native
from release import wheels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fusedoptim"
BUILT = [*PACKAGE.glob("_C.*.so"), *PACKAGE.glob("_C_cuda.so")]
#: The newest versions of symbols that manylinux_2_28 allows; of glibc what the libraries need less than.
NEWEST = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.mark.skipif(shutil.which("objdump") is None or not BUILT, reason="needs objdump and a compiled library")
@pytest.mark.parametrize("library", BUILT, ids=lambda p: p.name.partition(".")[0])
def test_a_library_loads_on_older_systems_than_the_one_that_it_was_built_on(library: Path) -> None:
    shown = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)?\s+(?:\.hidden )?(\S+)$", shown, re.M)
    assert len(found) > 20
    newer = {
        f"{name} of {kind} {version}"
        for kind, version, name in found
        if tuple(map(int, version.split("."))) > NEWEST[kind]
    }
    assert newer == set(), "csrc/old_glibc.cpp and csrc/cuda/old_glibc.cpp are the place for these"


def made(folder: Path, *names: str, size: int = 0) -> Path:
    path = folder / "fusedoptim-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * size)
    return path


def test_a_wheel_without_its_kernels_or_too_large_is_not_given_to_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = ("fusedoptim/_C.pyi", "fusedoptim/_native.py")
    whole = ("fusedoptim/_C.cpython-311.so", "fusedoptim/_C_cuda.so", "fusedoptim/include/cpu/own_program.h")
    assert wheels.unfit(made(tmp_path, *python, *whole)) is None
    for left_out in whole:
        problem = wheels.unfit(made(tmp_path, *python, *(name for name in whole if name != left_out)))
        assert problem is not None and fnmatch.fnmatch(left_out, problem.removeprefix("it has no "))
    monkeypatch.setattr(wheels, "MOST_BYTES", 10**6)
    assert wheels.unfit(made(tmp_path, *whole, size=10**6)) == "3.0 MB are more than 1"


def test_interpreters_that_are_not_here_are_left_out(tmp_path: Path) -> None:
    broken = tmp_path / "python3.99"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert wheels.found(["python3", str(broken), "python3.98"]) == ["python3"]


def test_an_installed_copy_names_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installation, "PACKAGE", tmp_path / "fusedoptim")
    assert _installation.wheel() is None
    folder = tmp_path / "fusedoptim-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fusedoptim\nVersion: 1.0\n")
    for tag, expected in (("cp311-cp311-linux_x86_64", None), ("cp311-cp311-manylinux_2_28_x86_64",) * 2):
        (folder / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        assert _installation.wheel() == expected


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('"750,800,1200;13.0"', "compute capability 7.5, 8.0, 12.0; CUDA 13.0, needs a driver of CUDA 13.0 on"),
        ('"900;12.9"', "compute capability 9.0; CUDA 12.9, needs a driver of CUDA 12.0 on"),
        ('""', None),  # the kernels on the host, as the tests build them
    ],
)
def test_a_cuda_library_says_for_which_gpus_it_is(tmp_path: Path, code: str, expected: str | None) -> None:
    library = tmp_path / "library.so"
    source = f"const char* fusedoptim_cuda_targets() {{ return {code}; }}"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=source, text=True, check=True)
    assert _native.cuda_targets(library) == expected


def test_another_library_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    assert _native.cuda_targets(tmp_path / "text.so") is None
    for library in BUILT:
        if library.name == "_C_cuda.so":
            assert re.match(r"compute capability \d", _native.cuda_targets(library) or "")


def test_the_changes_of_this_version_are_listed() -> None:
    assert re.search(rf"^## {re.escape(fusedoptim.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)

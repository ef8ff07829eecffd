"""What a copy of the package says about itself: source folders, installed copies, libraries that are not theirs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedoptim import _digest, _installation, _native

ROOT = Path(__file__).parent.parent
BUILT = ("*.so", "_build.json", "__pycache__")
needs_library = pytest.mark.skipif(_native._C is None, reason=f"no compiled library: {_native.problem}")


def clone(folder: Path, *ignore: str) -> Path:
    """A source folder, whose Python files and csrc are those here."""
    for name in ("fusedoptim", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*ignore))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def site(folder: Path) -> Path:
    """A folder with an installed copy: the package with what was built for it, and nothing else."""
    shutil.copytree(ROOT / "fusedoptim", folder / "fusedoptim", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(*command: str, cwd: Path, path: Path | str = "", **more: str) -> subprocess.CompletedProcess[str]:
    # `python` is this one. Warnings are torch's own, on machines without NumPy or a driver. Threads that wait for each
    # other take many times as long where others keep the cores busy.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PYTHONPATH": str(path), "PATH": programs, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **settings, **more}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=3600)


# Its own library is not that of an editable installation elsewhere, which setuptools would offer.
def test_a_source_folder_says_so_and_where_the_installed_copy_lies(tmp_path: Path) -> None:
    source, installed = clone(tmp_path / "a clone", *BUILT), site(tmp_path / "site")
    done = run(sys.executable, "-m", "fusedoptim", cwd=source, path=installed)
    text = done.stdout
    assert (
        f"library: not available: this is the source folder {source / 'fusedoptim'}, without a library for Python 3."
        in text
    )
    assert f"the installed copy lies in {installed / 'fusedoptim'}: run Python in another folder" in text
    assert f"-m pip install --no-build-isolation -e {shlex.quote(str(source))}\n" in text
    assert done.returncode == 1 and f"package: {source / 'fusedoptim'} (a source folder)" in text
    assert "cpu        not available: see the library" in text
    assert "Parameters on cpu are stepped by the eager reference" in text


@pytest.mark.slow
@needs_library
def test_the_readmes_last_command_finds_the_installed_copy_from_within_the_source_folder(tmp_path: Path) -> None:
    block = re.search(r"^## Install$.*?^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    *_, install, last = block[1].splitlines()
    assert install == "pip install --no-build-isolation ." and "python -m fusedoptim" in last
    source, installed = clone(tmp_path / "fusedoptim", *BUILT), site(tmp_path / "site")
    # An installed copy has no sources to look at, and spends no time on that.
    (installed / "fusedoptim" / "_digest.py").write_text("def sources(root): raise AssertionError('not needed')")
    programs = tmp_path / "bin"  # and no compiler, as where a wheel is installed
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)
    done = run("/bin/bash", "-c", last, cwd=source, path=installed, PATH=str(programs), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert f"package: {installed / 'fusedoptim'} (installed)" in done.stdout
    for name in ("cuda", "triton", "cpu", "reference"):
        assert re.search(rf"^  {name} +(available|not available: .+)$", done.stdout, re.M)
    assert "self-check: cpu, 7 optimizers in 4 dtypes: the reference's bits" in done.stdout
    came = ", ".join(_native._C.compiled_cpu_capabilities())
    assert f"kernels that came with it: CPU: {came}; CUDA: " in done.stdout and came.endswith("portable")
    assert "stepped by their functions, slowly: there is no C++ compiler: install one" in done.stdout


@needs_library
def test_a_library_of_another_clone_is_noticed(tmp_path: Path) -> None:
    other = clone(tmp_path / "other", "__pycache__")
    with (other / "csrc" / "module.cpp").open("a") as file:
        file.write("// a change\n")
    done = run(sys.executable, "-c", "from fusedoptim import _native as n; print(n._C, n.problem)", cwd=other)
    assert done.returncode == 0, done.stderr
    assert re.match(r"None \S*_C\.\S+ was built from other sources than this copy's", done.stdout)
    assert f"their digest is {_native._C.sources}, here it is {_digest.sources(other)}" in done.stdout


def test_an_installed_copy_goes_by_what_its_build_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installation, "PACKAGE", tmp_path)
    monkeypatch.setattr(_installation, "SOURCE_FOLDER", None)
    assert _installation.mismatch("_C.so", "0123456789abcdef") is None  # it noted nothing
    (tmp_path / "_build.json").write_text(json.dumps({"sources": "0123456789abcdef"}))
    assert _installation.mismatch("_C.so", "0123456789abcdef") is None
    for made_from, says in (("fedcba9876543210", "fedcba9876543210"), (None, "unknown")):
        text = _installation.mismatch("_C.so", made_from) or ""
        assert text.startswith("_C.so was built from other sources")
        assert f"(their digest is {says}, here it is 0123456789abcdef)" in text


@needs_library
def test_a_source_folder_goes_by_what_lies_there() -> None:
    assert _installation.mismatch("_C.so", _native._C.sources) is None
    assert "(their digest is unknown, here it is " in (_installation.mismatch("_C.so", None) or "")


def test_the_remedy_names_what_pip_installed_from_if_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, wheel = tmp_path / "the sources", tmp_path / "fusedoptim-0.1.0-cp311-cp311-linux_x86_64.whl"
    sources.mkdir()
    wheel.touch()
    metadata = tmp_path / "site" / "fusedoptim-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fusedoptim\nVersion: 0.1.0\n")
    monkeypatch.setattr(_installation, "PACKAGE", tmp_path / "site" / "fusedoptim")
    monkeypatch.setattr(_installation, "SOURCE_FOLDER", None)
    pip = f"{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps"
    unknown = f"in the folder with fusedoptim's sources: {pip} ."
    assert _installation.build_again() == unknown
    for origin, expected in [
        (sources.as_uri(), f"{pip} '{sources}'"),
        ((tmp_path / "gone").as_uri(), unknown),
        (wheel.as_uri(), unknown),  # it would bring the same libraries again
        ("https://host/fusedoptim.tar.gz", unknown),
    ]:
        (metadata / "direct_url.json").write_text(json.dumps({"url": origin, "dir_info": {}}))
        assert _installation.build_again() == expected
        assert _installation.build_again(CXX="g++ 13") == expected.replace(
            sys.executable, f"CXX='g++ 13' {sys.executable}"
        )


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(_installation, "_is_here", lambda name: name not in modules)


def with_setuptools(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def test_the_remedy_installs_what_building_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = f"{sys.executable} -m pip install"
    for version in ("70.1", "70.1.1", "84.2.1", "100.0"):
        with_setuptools(monkeypatch, version)
        assert _installation.build_again().startswith(f"{pip} --no-build-isolation ")
    for version in ("65.5.0", "70.0.0", None):  # without the package called wheel these make none
        with_setuptools(monkeypatch, version)
        assert _installation.build_again().startswith(f"{pip} 'setuptools>=70.1' && {pip} --no-build-isolation ")
    without(monkeypatch, "ninja")
    assert _installation.build_again().startswith(f"{pip} 'setuptools>=70.1' ninja && {pip} --no-build-isolation ")
    with_setuptools(monkeypatch, "80.9.0")
    assert _installation.build_again().startswith(f"{pip} ninja && {pip} --no-build-isolation ")


def test_what_is_here_is_found_without_a_word() -> None:
    assert _installation._is_here("torch") and _installation._is_here("json")
    assert not _installation._is_here("no_such_module")
    before = sys.modules.get("distutils")
    _installation._is_here("pip")
    assert sys.modules.get("distutils") is before


def test_the_remedy_needs_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which environments that uv makes do not have."""
    with_setuptools(monkeypatch, "65.5.0")
    without(monkeypatch, "pip")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    uv = f"uv pip install --python {sys.executable}"
    assert _installation.build_again().startswith(f"{uv} 'setuptools>=70.1' && {uv} --no-build-isolation ")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    pip = f"{sys.executable} -m pip install 'setuptools>=70.1' && "
    assert _installation.build_again().startswith(f"{sys.executable} -m ensurepip && {pip}")
    without(monkeypatch, "pip", "ensurepip")
    assert _installation.build_again().startswith(f"{sys.executable} has no pip: install it (Debian, ")
    assert f"then {pip}" in _installation.build_again()


def test_the_readme_and_the_metadata_ask_for_the_setuptools_that_building_needs() -> None:
    commands = re.findall(r"pip install [^\n`]*\btorch\b[^\n`&]*", (ROOT / "README.md").read_text())
    assert len(commands) >= 4 and all("torch 'setuptools>=70.1' ninja" in command for command in commands)
    assert 'requires = ["setuptools>=70.1", "ninja", ' in (ROOT / "pyproject.toml").read_text()

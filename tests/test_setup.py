"""What setup.py builds, leaves out and shows, and what an archive of the sources holds."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import fusedoptim
from fusedoptim import _digest, _native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads setup.py, and builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.delenv("FUSEDOPTIM_BUILD_CUDA", raising=False)
    return lambda: runpy.run_path(str(ROOT / "setup.py"))


def nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes down that it was called."""
    calls, program = folder / "calls", folder / "nvcc"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done; [ -d "$last" ] || : > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(program))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return calls


def test_cuda_is_left_out_if_asked_whatever_is_there(
    definitions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FUSEDOPTIM_BUILD_CUDA", "0")
    cause = definitions()["build_cuda"](tmp_path, tmp_path / "command")
    assert "FUSEDOPTIM_BUILD_CUDA=0" in cause and "unset it" in cause and not calls.exists()


def test_cuda_is_built_for_a_torch_without_it_if_asked(
    definitions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not a CUDA build" in definitions()["build_cuda"](tmp_path, tmp_path / "command")
    assert not calls.exists()
    monkeypatch.setenv("FUSEDOPTIM_BUILD_CUDA", "1")
    assert definitions()["build_cuda"](tmp_path, tmp_path / "command") is None
    assert "-gencode arch=compute_90,code=sm_90" in calls.read_text() and (tmp_path / "_C_cuda.so").exists()
    shown = capsys.readouterr().out
    assert "nvcc compiles the CUDA kernels for sm_80, sm_90, compute_90" in shown
    assert "FUSEDOPTIM_BUILD_CUDA=0 leaves them out" in shown and re.search(r"nvcc took \d+ s\n", shown)


def test_cuda_kernels_that_were_built_before_are_taken(
    definitions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before.so"
    before.write_bytes(b"kernels")
    monkeypatch.setenv("FUSEDOPTIM_BUILD_CUDA", str(before))
    assert definitions()["build_cuda"](tmp_path, tmp_path / "command") is None
    assert (tmp_path / "_C_cuda.so").read_bytes() == b"kernels"


@pytest.mark.parametrize("value", ["2", "yes", "off"])
def test_another_value_is_refused(definitions: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FUSEDOPTIM_BUILD_CUDA", value)
    with pytest.raises(SystemExit, match=f"FUSEDOPTIM_BUILD_CUDA='{value}' is unknown: 0 leaves .* out, 1 builds"):
        definitions()


def test_a_long_compilation_shows_that_it_goes_on(
    definitions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one goes on until two lines have said so."""
    run_and_say, said, file = definitions()["run_and_say"], [], tmp_path / "enough"

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            file.touch()

    monkeypatch.setitem(run_and_say.__globals__, "say", say)
    wait = f"import os, sys, time\nwhile not os.path.exists({str(file)!r}): time.sleep(0.01)"
    code = f"print('first', flush=True)\n{wait}\nprint('second'); sys.exit(3)"
    assert run_and_say([sys.executable, "-c", code], "nvcc", every=0.05) == (3, "first\nsecond\n")
    *running, last = said
    assert len(running) >= 2 and all(re.fullmatch(r"nvcc has run for \d+ s", text) for text in running)
    assert re.fullmatch(r"nvcc took \d+ s", last)


@pytest.mark.skipif(_native._C is None, reason=f"no compiled library: {_native.problem}")
def test_the_library_carries_the_digest_of_its_sources() -> None:
    assert _native._C.sources == _digest.sources(ROOT)


def test_the_digest_is_of_every_file_that_is_compiled(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    before = _digest.sources(tmp_path)
    assert before == _digest.sources(ROOT)
    compiled = [p for p in (tmp_path / "csrc").rglob("*") if p.is_file() and p.suffix != ".md"]
    assert len(compiled) > 40
    for path in [tmp_path / "setup.py", *compiled]:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert _digest.sources(tmp_path) != before, path
        path.write_bytes(content)
    (tmp_path / "csrc" / "cuda" / "NOTES.md").write_text("measured")
    assert _digest.sources(tmp_path) == before


@pytest.mark.slow
def test_an_archive_of_the_sources_holds_all_files(tmp_path: Path) -> None:
    """Each that git knows, and none that was built or run here."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git and a clone")
    files = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("fusedoptim/_build.json", "fusedoptim/_C_cuda.so", "fusedoptim/_C.x.so", "tests/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        held = {m.name.partition("/")[2] for m in tar if m.isfile()}
    assert files - held == set()
    assert {name for name in held - files if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


def test_the_version_is_the_packages_also_where_it_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from setuptools.config.pyprojecttoml import read_configuration\n"
        "print(read_configuration('pyproject.toml')['project']['version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == fusedoptim.__version__, done.stderr


def test_every_folder_with_modules_is_a_package_that_is_installed() -> None:
    listed = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert listed is not None
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fusedoptim").rglob("*.py")}
    assert set(json.loads(listed[1])) == folders

"""What a copy of the package says about itself: source folders, installed copies, libraries that are not theirs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(*command: str, cwd: Path, path: Path | str = "") -> subprocess.CompletedProcess[str]:
    # `python` is this one. -W: torch's own warnings, on machines without NumPy or a driver.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(path), "PATH": programs, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def problem(cwd: Path, path: Path | str = "") -> str:
    done = run(sys.executable, "-c", "from fusedoptim import _native as n; print(n._C, n.problem)", cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    library, _, text = done.stdout.partition(" ")
    assert library == "None"
    return text


# Its own library is not that of an editable installation elsewhere, which setuptools would offer.
def test_a_source_folder_says_so_and_where_the_installed_copy_lies(tmp_path: Path) -> None:
    source, installed = clone(tmp_path / "a clone", *BUILT), site(tmp_path / "site")
    text = problem(source, installed)
    assert f"this is the source folder {source / 'fusedoptim'}, without a library for Python 3." in text
    assert f"the installed copy lies in {installed / 'fusedoptim'}: run Python in another folder" in text
    assert text.strip().endswith(f"-m pip install --no-build-isolation -e {shlex.quote(str(source))}")
    done = run(sys.executable, "-m", "fusedoptim", cwd=source, path=installed)
    assert done.returncode == 1 and f"package: {source / 'fusedoptim'} (a source folder)" in done.stdout
    assert "Parameters on cpu are stepped by the eager reference" in done.stdout


@needs_library
def test_the_readmes_last_command_finds_the_installed_copy_from_within_the_source_folder(tmp_path: Path) -> None:
    block = re.search(r"^## Install$.*?^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    *_, install, last = block[1].splitlines()
    assert install == "pip install --no-build-isolation ." and "python -m fusedoptim" in last
    source, installed = clone(tmp_path / "fusedoptim", *BUILT), site(tmp_path / "site")
    # An installed copy has no sources to look at, and spends no time on that.
    (installed / "fusedoptim" / "_digest.py").write_text("def sources(root): raise AssertionError('not needed')")
    done = run("bash", "-c", last, cwd=source, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"package: {installed / 'fusedoptim'} (installed)" in done.stdout


@needs_library
def test_a_library_of_another_clone_is_noticed(tmp_path: Path) -> None:
    other = clone(tmp_path / "other", "__pycache__")
    with (other / "csrc" / "module.cpp").open("a") as file:
        file.write("// a change\n")
    text = problem(other)
    assert "_C." in text and "was built from other sources than this copy's" in text
    assert f"their digest is {_native._C.sources}, here it is {_digest.sources(other)}" in text
    # An installed copy goes by what its build noted.
    installed = site(tmp_path / "site")
    note = installed / "fusedoptim" / "_build.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "sources": "0123456789abcdef"}))
    assert "here it is 0123456789abcdef" in problem(tmp_path, installed)


@needs_library
def test_a_library_from_before_digests_is_not_taken_for_ours() -> None:
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


def test_the_remedy_installs_what_building_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _installation.importlib.util.find_spec
    monkeypatch.setattr(_installation.importlib.util, "find_spec", lambda n: None if n == "ninja" else real(n))
    pip = f"{sys.executable} -m pip install"
    assert _installation.build_again().startswith(f"{pip} ninja && {pip} --no-build-isolation ")

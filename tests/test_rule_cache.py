"""Where compiled rules are kept: for the user alone, unchanged, and without harm where that cannot be."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import parameters, set_gradients

from fusedoptim import FusedOptimizer, Rule
from fusedoptim.own_rules import cache, compiler, libraries, programs, verify

ROOT = Path(__file__).parent.parent


def scaled(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g, alpha=h["lr"])


class Scaled(FusedOptimizer):
    rule = Rule("scaled", scaled)

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, options)


def step() -> str:
    """Which runner steps it."""
    params = parameters([(5,)])
    set_gradients(params, 0)
    optimizer = Scaled(params)
    optimizer.step()
    assert params[0].grad is not None
    assert torch.equal(params[0].detach(), parameters([(5,)])[0].detach().add(params[0].grad, alpha=-0.1))
    (runner,) = optimizer._runners or ()
    return type(runner).__name__


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in a process that has compiled nothing so far."""
    for module, name in ((compiler, "_loaded"), (libraries, "_loaded"), (programs, "_known"), (verify, "_checked")):
        monkeypatch.setattr(module, name, {})
    path = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are compiled from now on."""
    sources: list[str] = []
    compile_: Callable[[str, str, Path], None] = compiler._compile

    def noted(source: str, capability: str, to: Path) -> None:
        sources.append(source)
        compile_(source, capability, to)

    monkeypatch.setattr(compiler, "_compile", noted)
    return sources


def anew() -> None:
    """As another process would come."""
    compiler._loaded.clear()
    libraries._loaded.clear()


def test_it_is_the_users_alone_and_used_again(folder: Path, compiled: list[str]) -> None:
    assert step() == "OwnCpuRunner" and len(compiled) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    assert sorted(p.suffix for p in folder.iterdir()) == [".sha256", ".so"]
    anew()
    assert step() == "OwnCpuRunner" and len(compiled) == 1


def test_what_was_changed_is_not_loaded(folder: Path, compiled: list[str]) -> None:
    step()
    (library,) = folder.glob("*.so")
    content = library.read_bytes()
    library.unlink()  # which is still mapped
    library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    library.chmod(0o600)
    anew()
    assert step() == "OwnCpuRunner" and len(compiled) == 2


def test_what_others_may_write_is_not_loaded(folder: Path, compiled: list[str]) -> None:
    step()
    (library,) = folder.glob("*.so")
    library.chmod(0o666)
    anew()
    assert step() == "OwnCpuRunner" and len(compiled) == 2


def test_what_somebody_else_owns_is_not_loaded(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.find(next(folder.glob("*.so")).name) is None
    anew()
    assert step() == "OwnCpuRunner" and len(compiled) == 2


def test_a_link_is_not_followed(folder: Path, tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert step() == "OwnCpuRunner" and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("fails", ["mkdtemp", "write_text"])
def test_a_folder_that_is_read_only_or_full_does_no_harm(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        if fails == "mkdtemp" and "dir" not in kwargs:
            return mkdtemp(*args, **kwargs)
        raise OSError("no space left on device")

    mkdtemp = cache.tempfile.mkdtemp
    monkeypatch.setattr(cache.tempfile if fails == "mkdtemp" else Path, fails, full)
    assert step() == "OwnCpuRunner" and compiled
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_does_no_harm(
    folder: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "below"))
    assert step() == "OwnCpuRunner" and compiled


def test_without_a_compiler_the_function_steps_it_with_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    with pytest.warns(
        UserWarning, match=r"nothing is compiled for the rule 'scaled' \(there is no C\+\+ compiler: inst"
    ):
        assert step() == "ReferenceRunner"
    assert step() == "ReferenceRunner"  # no other warning: they are errors


def test_a_compiler_that_fails_is_quoted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "FLAGS", ("--no-such-flag",))
    compiler._environment.cache_clear()
    with pytest.warns(UserWarning, match=r"failed with a rule's code: .*no-such-flag"):
        assert step() == "ReferenceRunner"
    compiler._environment.cache_clear()
    assert not list(folder.glob("*.so"))


SCRIPT = """
import sys
sys.path.insert(0, "tests")
from test_rule_cache import step
print(step())
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, cache.VARIABLE: str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["OwnCpuRunner"] * 2
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]

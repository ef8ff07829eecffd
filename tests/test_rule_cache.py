"""Where compiled rules are kept: for the user alone, unchanged, and without harm where that cannot be."""

from __future__ import annotations

import gc
import os
import shutil
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CAPABILITIES, parameters, set_gradients

from fusedoptim import FusedOptimizer, Rule, _native
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
    monkeypatch.setattr(compiler, "_loaded", {})
    for module, name in ((libraries, "_loaded"), (programs, "_known"), (verify, "_checked")):
        monkeypatch.setattr(module, name, weakref.WeakKeyDictionary())
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
    with pytest.warns(UserWarning, match="is not used"):
        assert step() == "OwnCpuRunner" and len(compiled) == 2


def test_a_link_is_not_followed(folder: Path, tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="is not used.* no link"):
        assert step() == "OwnCpuRunner" and not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_was_there_keeps_its_permissions(folder: Path, compiled: list[str]) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert step() == "OwnCpuRunner" and len(list(folder.iterdir())) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and cache.problem() is None


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path, compiled: list[str]) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match=f"{folder} is not used: .*chmod go-w .* compiles rules anew") as caught:
        assert [step(), step()] == ["OwnCpuRunner"] * 2 and compiled and not list(folder.iterdir())
    assert len(caught) == 1 and stat.S_IMODE(folder.stat().st_mode) == 0o777
    assert f"chmod go-w {folder}" in (cache.problem() or "")


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_file_system_from_which_nothing_can_be_run(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    load, tried = compiler.ctypes.CDLL, []

    def fails(path: str) -> Any:
        tried.append(path)
        if everywhere or path.startswith(str(folder)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(compiler.ctypes, "CDLL", fails)
    if everywhere:
        with pytest.warns(UserWarning, match=f"cannot be loaded from {folder}.*{cache.VARIABLE}, or TMPDIR"):
            assert step() == "ReferenceRunner"
    else:
        assert step() == "OwnCpuRunner"
    assert len(tried) == 2 and not os.path.exists(tried[1])


def test_a_compiler_may_have_arguments(
    folder: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} {shutil.which('c++')} -DANYTHING")
    for cached in (compiler.command, compiler._environment):
        cached.cache_clear()
    try:
        assert step() == "OwnCpuRunner"
        assert compiled and (tmp_path / "calls").read_text() == "called\n"
        assert compiler.compiler() == f"{wrapper} {shutil.which('c++')} -DANYTHING"
        compiler.command.cache_clear()
        monkeypatch.setenv("CXX", "not_there -O2")
        assert "CXX='not_there -O2' is not found" in (compiler.problem() or "")
    finally:
        monkeypatch.delenv("CXX")
        for cached in (compiler.command, compiler._environment):
            cached.cache_clear()


def test_what_is_kept_goes_with_the_rule(folder: Path) -> None:
    def rule() -> Any:
        def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
            p.sub_(g, alpha=h["lr"])

        return type("Own", (Scaled,), {"rule": Rule("own", function)})

    own = rule()
    params = parameters([(5,)])
    set_gradients(params, 0)
    own(params).step()
    sizes = [len(x) for x in (programs._known, libraries._loaded, verify._checked)]
    del own, params
    gc.collect()
    assert sizes == [1, 1, 1] and [len(x) for x in (programs._known, libraries._loaded, verify._checked)] == [0, 0, 0]


def test_each_instruction_set_is_checked(folder: Path) -> None:
    for capability in CAPABILITIES:
        _native._C.set_cpu_capability(capability)
        assert step() == "OwnCpuRunner"
    (checked,) = verify._checked.values()
    assert len(checked) == len(CAPABILITIES)


def test_more_numbers_than_there_is_room_for(folder: Path) -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        for k in range(300):
            p.mul_(h["lr"] + k)

    params = parameters([(5,)])
    set_gradients(params, 0)
    own: Any = type("Own", (Scaled,), {"rule": Rule("much", function)})
    with pytest.warns(UserWarning, match=r"take numbers of 1200 bytes, and 1024 are the most: combine numbers"):
        own(params).step()


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

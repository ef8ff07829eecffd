"""The files that Triton reads rules' printed functions from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedoptim import _native
from fusedoptim.own_rules import cache

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(_native.triton_problem() is not None, reason=f"Triton: {_native.triton_problem()}")
STEP = """if True:
    import torch, fusedoptim
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = fusedoptim.AdamW([p], backend="triton")
    optimizer.step()
    assert type(optimizer._runners[0]).__name__ == "TritonRunner"
    assert (p < 1).all()
"""
COMPILE = """if True:
    import sys
    from benchmarks.triton_compile import generate, printed, stored
    code = printed(sys.argv[1], {})
    generate(code, (stored(code, "bf16"),))
"""


def start(code: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def names(folder: Path) -> list[str]:
    return sorted(p.suffix for p in folder.iterdir())


def test_processes_may_write_one_at_once_and_need_no_compiler(tmp_path: Path) -> None:
    """A second start finds it."""
    env = {"TRITON_INTERPRET": "1", cache.VARIABLE: str(tmp_path / "cache"), "CXX": "/there/is/none"}
    finish(start(STEP, **env), start(STEP, **env))
    assert names(tmp_path / "cache") == [".py", ".sha256"]
    (module,) = (tmp_path / "cache").glob("*.py")
    before = module.stat().st_mtime_ns
    finish(start(STEP, **env))
    assert module.stat().st_mtime_ns == before
    module.write_text(module.read_text().replace("*", "+"))  # what was changed is not loaded
    finish(start(STEP, **env))
    assert "*" in module.read_text()


def test_a_folder_that_takes_nothing_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finish(start(STEP, TRITON_INTERPRET="1", **{cache.VARIABLE: str(tmp_path / "file" / "cache")}))


def test_tritons_own_cache_is_hit_wherever_the_file_is(tmp_path: Path) -> None:
    compiled = tmp_path / "triton"

    def entries(name: str, folder: str) -> set[Path]:
        finish(start(COMPILE, name, TRITON_CACHE_DIR=str(compiled), **{cache.VARIABLE: str(tmp_path / folder)}))
        return set(compiled.rglob("*"))

    first = entries("AdamW", "here")
    assert any(path.suffix == ".cubin" for path in first)
    assert entries("AdamW", "there") == first

"""Builds the CUDA kernels for the host (see cuda_on_host.h)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
#: -O2 takes twice as long to compile, and no test is faster for it.
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
#: The address sanitizer's checks are calls, which compile faster than code in their place.
CHECKS_AS_CALLS = "--param=asan-instrumentation-with-call-threshold=0"
#: To compile, -O0 takes 11 seconds of one core, this 17, and -O1 30; the tests are slowest with -O0.
SANITIZE = [
    "-Og",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    CHECKS_AS_CALLS,
]


def build(target: Path, *more: str) -> Path:
    """Compiles csrc/cuda to a shared library for FUSEDOPTIM_CUDA_LIBRARY."""
    model = Path(__file__).with_name("cuda_on_host.h")
    source = ROOT / "csrc" / "cuda" / "launch.cu"
    command = ["g++", *FLAGS, *WARNINGS, *more, "-include", str(model), "-x", "c++", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build_once(factory: pytest.TempPathFactory) -> Path:
    """The library for all tests of a session, whichever of its processes needs it first."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    target = folder / "cuda_on_host.so"
    with open(folder / "cuda_on_host.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(target.with_suffix(".part")).rename(target)
    return target


def sanitizers() -> str | None:
    """What a process has to preload for libraries built with SANITIZE: the runtime, then the C++ library, which it
    looks for when it starts, to follow exceptions. None if there is no such runtime."""
    if shutil.which("g++") is None:
        return None
    ask = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(a, capture_output=True, text=True, check=True).stdout.strip() for a in ask]
    return " ".join(found) if all(map(os.path.isabs, found)) else None

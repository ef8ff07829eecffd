"""Builds the CUDA kernels for the host (see cuda_on_host.h)."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["-std=c++17", "-O2", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build(target: Path, *more: str) -> Path:
    """Compiles csrc/cuda to a shared library for FUSEDOPTIM_CUDA_LIBRARY."""
    model = Path(__file__).with_name("cuda_on_host.h")
    source = ROOT / "csrc" / "cuda" / "launch.cu"
    command = ["g++", *FLAGS, *WARNINGS, *more, "-include", str(model), "-x", "c++", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target

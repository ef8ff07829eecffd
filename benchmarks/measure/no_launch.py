"""Kernels that do nothing (no_launch.cpp), to measure what a step takes besides."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from fusedoptim import _native

from ..common.arguments import UsageError

COMPILE = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
VARIABLE = "FUSEDOPTIM_CUDA_LIBRARY"


def build(library: Path) -> None:
    source = Path(__file__).with_name("no_launch.cpp")
    try:
        subprocess.run([*COMPILE, str(source), "-o", str(library)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"the library that launches nothing cannot be compiled: {error}") from error


@contextmanager
def no_launch() -> Iterator[None]:
    """Within it, ``backend="cuda"`` takes tensors on the CPU and leaves them as they are. Compiling takes two seconds.

    Raises:
        UsageError: if it cannot be compiled, or is for another version than the package's own library.
    """
    if _native._C is None:
        raise UsageError(f"without the compiled library there is nothing to measure: {_native.problem}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "no_launch.so"
        build(library)
        with mock.patch.dict(os.environ, {VARIABLE: str(library)}):
            _native.cuda_problem.cache_clear()
            try:
                if problem := _native.cuda_problem():
                    raise UsageError(problem)
                yield
            finally:
                _native._C.set_cuda_api(0)
                _native.cuda_problem.cache_clear()

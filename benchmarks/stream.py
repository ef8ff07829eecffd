"""Compiles and runs the plain C stream (stream.c) in this process."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*command, str(source), "-o", str(target)], check=True, capture_output=True)
        return ctypes.CDLL(str(target))


def stream(elements: int, reads: int, writes: int) -> Callable[[], None]:
    """A call that reads ``reads`` fp32 arrays of ``elements`` elements and writes ``writes`` of them.

    Raises OSError or subprocess.CalledProcessError where there is no C compiler with OpenMP."""
    library = _library()
    arrays = [torch.randn(elements) for _ in range(reads)]
    pointers = (ctypes.c_void_p * 4)(*(a.data_ptr() for a in arrays))

    def run(keep: object = arrays) -> None:
        library.stream(pointers, reads, writes, ctypes.c_ssize_t(elements))

    return run

"""Programs of the CUDA toolkit."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def tool(name: str) -> str:
    """On the PATH or in the toolkit, whose folder is that of nvcc if no variable names it; else the name itself."""
    homes = os.environ.get("CUDA_HOME"), Path(shutil.which("nvcc") or "/").resolve().parent.parent, "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=":".join(f"{home}/bin" for home in homes)) or name


def cuobjdump() -> str | None:
    """The one of the toolkit, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which(tool("cuobjdump")) or shutil.which("cuobjdump", path=str(brought))

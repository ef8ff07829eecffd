"""Programs of the CUDA toolkit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def tool(name: str) -> str:
    """On the PATH or in the toolkit, whose folder is that of nvcc if no variable names it; else the name itself."""
    homes = os.environ.get("CUDA_HOME"), Path(shutil.which("nvcc") or "/").resolve().parent.parent, "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=":".join(f"{home}/bin" for home in homes)) or name

"""Loads the compiled libraries, each once, and keeps the cause if that fails. Silent."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from types import ModuleType

import torch

INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps fusedoptim"

_C: ModuleType | None = None
#: Why there is no compiled library, and the remedy; None if there is.
problem: str | None = None


def build_report() -> dict[str, str | None]:
    """What the installation wrote about itself: torch's version at build time, and why kernels were left out."""
    path = Path(__file__).with_name("_build.json")
    try:
        report: dict[str, str | None] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report


def _explain(error: ImportError) -> str:
    built = build_report()
    if built.get("cpu"):
        return f"they were not built: {built['cpu']}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"no library for Python {platform.python_version()} is in {Path(__file__).parent}; "
            f"from the source folder run: pip install --no-build-isolation ."
        )
    return (
        f"the library, built with torch {built.get('torch', 'unknown')}, does not load under torch {torch.__version__} "
        f"({error}); torch >= 2.10 is needed, or build again: {INSTALL}"
    )


try:
    from . import _C as _loaded

    _C = _loaded
except ImportError as error:
    problem = _explain(error)


def cuda_library() -> Path:
    """Where the CUDA kernels are; FUSEDOPTIM_CUDA_LIBRARY names another file."""
    return Path(os.environ.get("FUSEDOPTIM_CUDA_LIBRARY") or Path(__file__).with_name("_C_cuda.so"))


@functools.cache
def cuda_problem() -> str | None:
    """Loads the CUDA kernels, without starting CUDA. Why there are none, and the remedy; None if there are."""
    if _C is None:
        return problem
    path = cuda_library()
    if not path.exists():
        cause = build_report().get("cuda") or f"there is no {path}; build again: {INSTALL}"
        return f"they were not built: {cause}"
    try:
        library = ctypes.CDLL(str(path))
        library.fusedoptim_cuda_api.restype = ctypes.c_void_p
        _C.set_cuda_api(library.fusedoptim_cuda_api())
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path} does not load ({error}); build again: {INSTALL}"
    return None


def tune(name: str, value: int) -> int:
    """Sets a choice of csrc/cuda/tuning.h, for measurements. Returns the value before."""
    assert _C is not None
    return int(_C.tune(name, value))


@functools.cache
def triton_problem() -> str | None:
    """Why Triton's kernels cannot be compiled, and the remedy; None if they can. Does not import Triton."""
    if _C is None:
        return f"the library that keeps their tables is missing: {problem}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    compilers = [os.environ.get("CC"), "cc", "gcc", "clang"]
    if not any(c and shutil.which(c) for c in compilers) and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a C compiler at run time: install one (Debian, Ubuntu: apt-get install gcc) or set CC"
    return None


@functools.cache
def cuda_device_problem(index: int) -> str | None:
    """Why the CUDA kernels, which are loaded, cannot run on a device."""
    assert _C is not None
    cause: str | None = _C.cuda_problem(index)
    if cause is None or _C.cuda_on_host():
        return cause
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"on {torch.cuda.get_device_name(index)}: {cause}. If they lack code for it, build again with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} {INSTALL}"
    )

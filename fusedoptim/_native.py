"""Loads the compiled libraries, each once, and keeps the cause if that fails. Silent."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import torch

from . import _installation

_C: ModuleType | None = None
#: Why there is no compiled library, and the remedy; None if there is.
problem: str | None = None

if not _installation.has_library():
    problem = _installation.absent()
else:
    try:
        _loaded = importlib.import_module(f"{__package__}._C")
        problem = _installation.mismatch(_loaded.__file__, getattr(_loaded, "sources", None))
        _C = _loaded if problem is None else None
    except ImportError as error:
        problem = _installation.unloadable(error)


def cuda_library() -> Path:
    """Where the CUDA kernels are; FUSEDOPTIM_CUDA_LIBRARY names another file."""
    return Path(os.environ.get("FUSEDOPTIM_CUDA_LIBRARY") or Path(__file__).with_name("_C_cuda.so"))


def cuda_targets(path: Path) -> str | None:
    """For which GPUs a library of CUDA kernels was compiled, and by what; None for one that does not load or say so."""
    try:
        says = ctypes.CDLL(str(path)).fusedoptim_cuda_targets
    except (OSError, AttributeError):
        return None
    says.restype = ctypes.c_char_p
    kinds, _, release = says().decode().partition(";")
    if not release:
        return None
    capabilities = ", ".join(f"{int(kind) // 100}.{int(kind) // 10 % 10}" for kind in kinds.split(","))
    # A driver runs what was compiled with its own major release of CUDA and with earlier ones.
    return f"compute capability {capabilities}; CUDA {release}, needs a driver of CUDA {release.partition('.')[0]}.0 on"


def load_cuda(path: Path) -> None:
    """Has every step from now on take its CUDA kernels from a library.

    Raises:
        OSError, AttributeError, RuntimeError: if it does not load, is none of this kind, or another version's.
    """
    assert _C is not None
    library = ctypes.CDLL(str(path))
    library.fusedoptim_cuda_api.restype = ctypes.c_void_p
    _C.set_cuda_api(library.fusedoptim_cuda_api())


@functools.cache
def cuda_problem() -> str | None:
    """Loads the CUDA kernels, without starting CUDA. Why there are none, and the remedy; None if there are."""
    if _C is None:
        return problem
    path = cuda_library()
    named = "unset FUSEDOPTIM_CUDA_LIBRARY" if os.environ.get("FUSEDOPTIM_CUDA_LIBRARY") else None
    if not path.exists():
        if named:
            return f"there is no {path}: {named}"
        return _installation.not_built(_installation.build_report().get("cuda"))
    try:
        load_cuda(path)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path} does not load ({error}). {named or f'Build again: {_installation.build_again()}'}"
    return None


def tune(name: str, value: int) -> int:
    """Sets a choice of csrc/gpu/tuning.h, for measurements. Returns the value before."""
    assert _C is not None
    return int(_C.tune(name, value))


@functools.cache
def triton_problem() -> str | None:
    """Why Triton's kernels cannot be compiled, and the remedy; None if they can. Does not import Triton."""
    if _C is None:
        return f"the library keeps their tables, and is not available: {problem}"
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
    again = _installation.build_again(TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    return f"on {torch.cuda.get_device_name(index)}: {cause}. If they lack code for it, build again: {again}"

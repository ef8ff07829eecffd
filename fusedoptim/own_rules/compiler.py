"""Compiles a printed rule into a small library, with the C++ compiler that is here."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

from .. import _installation
from . import cache

#: As in setup.py: exact results, and what lets the compiler vectorise without changing a value.
FLAGS = (
    *("-O3", "-g0", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-ignored-attributes"),
)
CAPABILITY_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}


class CompilerError(RuntimeError):
    """A printed rule did not compile."""


@functools.cache
def compiler() -> str | None:
    """Its path; None if there is none. CXX names another."""
    named = os.environ.get("CXX")
    return next((found for c in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(c))), None)


def problem() -> str | None:
    """Why rules cannot be compiled here, and the remedy; None if they can."""
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX={named!r} is not found" if named else "there is no C++ compiler"
        return f"{what}: install one (Debian, Ubuntu: apt-get install g++) or set CXX"
    if not (headers() / "cpu" / "own_program.h").exists():
        return f"the headers that it includes are not in {headers()}: install the package again"
    return None


def headers() -> Path:
    """The folder of csrc: in a source folder its own, else a copy that came with the package."""
    source = _installation.SOURCE_FOLDER
    return _installation.PACKAGE / "include" if source is None else source / "csrc"


@functools.cache
def _environment() -> str:
    """What a library depends on beside its source."""
    path = os.path.realpath(compiler() or "")
    found = os.stat(path)
    digest = hashlib.sha256(f"{path} {found.st_size} {found.st_mtime_ns} {FLAGS}".encode())
    for header in sorted(p for part in ("core", "rules", "cpu") for p in (headers() / part).glob("*.h")):
        digest.update(f"{header.name}\0".encode() + header.read_bytes())
    return digest.hexdigest()


_loaded: dict[str, int] = {}
_lock = threading.Lock()


def load(source: str, capability: str) -> int:
    """Compiles a library, unless that was done before, and loads it. Returns the address of its ProgramCode
    (csrc/cpu/own_program.h).

    Raises:
        CompilerError: with what the compiler says.
    """
    key = hashlib.sha256(f"{_environment()}\0{capability}\0{source}".encode()).hexdigest()[:32]
    with _lock:
        if key not in _loaded:
            name = f"{key}.so"
            found = cache.find(name)
            if found is not None:
                _loaded[key] = _address(found)
            else:
                with cache.added(name, lambda to: _compile(source, capability, to)) as made:
                    _loaded[key] = _address(made)
        return _loaded[key]


def _compile(source: str, capability: str, to: Path) -> None:
    path = compiler()
    assert path is not None
    command = [path, *FLAGS, *CAPABILITY_FLAGS[capability], f"-I{headers()}", "-x", "c++", "-", "-o", str(to)]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode != 0 or not to.exists():
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr[-500:]]
        raise CompilerError(f"{path} failed with a rule's code: {errors[0].strip()}")


def _address(path: Path) -> int:
    library = ctypes.CDLL(str(path))
    library.fusedoptim_program.restype = ctypes.c_void_p
    address: int = library.fusedoptim_program()
    return address

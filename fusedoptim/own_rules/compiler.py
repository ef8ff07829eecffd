"""Compiles a printed rule into a small library, with the C++ compiler that is here."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
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
def command() -> tuple[str, ...] | None:
    """Its path, with arguments; None if there is none. CXX names another, as "clang++" or "ccache g++"."""
    named = os.environ.get("CXX", "").strip()
    try:
        candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    except ValueError:  # quotes that are not closed
        return None
    for program, *arguments in candidates:
        found = shutil.which(program)
        if found is not None:
            return (found, *arguments)
    return None


def compiler() -> str | None:
    found = command()
    return None if found is None else shlex.join(found)


def problem() -> str | None:
    """Why rules cannot be compiled here, and the remedy; None if they can."""
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the program of CXX={named!r} is not found" if named else "there is no C++ compiler"
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
    digest = hashlib.sha256(repr(FLAGS).encode())
    for word in command() or ():
        digest.update(f"{word}\0".encode())
        program = shutil.which(word)  # of "ccache g++" both are programs
        if program is not None:
            path = os.path.realpath(program)
            found = os.stat(path)
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\0".encode())
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
                _loaded[key] = _opened(found)
            else:
                with cache.added(name, lambda to: _compile(source, capability, to)) as made:
                    _loaded[key] = _opened(made)
        return _loaded[key]


def _compile(source: str, capability: str, to: Path) -> None:
    by = command()
    assert by is not None
    line = [*by, *FLAGS, *CAPABILITY_FLAGS[capability], f"-I{headers()}", "-x", "c++", "-", "-o", str(to)]
    try:
        done = subprocess.run(line, input=source, capture_output=True, text=True)
    except OSError as error:
        raise CompilerError(f"{shlex.join(by)} cannot be run: {error}") from None
    if done.returncode != 0 or not to.exists():
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr[-500:]]
        raise CompilerError(f"{shlex.join(by)} failed with a rule's code: {errors[0].strip()}")


def _opened(path: Path) -> int:
    """The address in a library. Where the folder's file system lets nothing be run, in a copy elsewhere."""
    try:
        return _address(path)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="fusedoptim-") as other:
            try:
                return _address(Path(shutil.copy(path, other)))
            except OSError as error:
                raise CompilerError(
                    f"a compiled rule cannot be loaded from {path.parent}, nor from {other}: {error}. Set "
                    f"{cache.VARIABLE}, or TMPDIR, to a folder on a file system from which programs can be run"
                ) from None


def _address(path: Path) -> int:
    library = ctypes.CDLL(str(path))
    library.fusedoptim_program.restype = ctypes.c_void_p
    address: int = library.fusedoptim_program()
    return address

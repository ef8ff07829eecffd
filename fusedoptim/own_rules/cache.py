"""The folder where compiled rules are kept from one process to the next. It is the user's alone: what somebody else
wrote, or changed, is not loaded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .._warnings import warn

#: Names the folder.
VARIABLE = "FUSEDOPTIM_CACHE"
#: Folders of which was said that they are not used.
_told: set[Path] = set()


def folder() -> Path:
    """Where it is: as the environment says, or where the desktop's conventions have it."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fusedoptim"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"fusedoptim-{os.getuid()}"


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written it."""
    found = path.lstat()
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


def _usable() -> Path | None:
    """The folder, made if there is none; None if it cannot be used."""
    path = folder()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # one that was there keeps its permissions
            path.mkdir(mode=0o700)
    except OSError:
        pass  # one that is read-only may have been filled before
    return path if problem() is None else None


def problem() -> str | None:
    """Why the folder is not used; None if it is."""
    path = folder()
    try:
        if _is_ours(path) and path.is_dir():
            return None
    except OSError as error:
        return f"{path} cannot be used ({error})"
    return (
        f"{path} is not used: it has to be a folder of the user's own, which nobody else may write to, and no link "
        f"(chmod go-w {path}, or set {VARIABLE})"
    )


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def find(name: str) -> Path | None:
    """An entry that is there, and as it was written."""
    path = _usable()
    if path is None:
        return None
    entry, note = path / name, path / f"{name}.sha256"
    try:
        if _is_ours(entry) and _is_ours(note) and note.read_text() == _digest_of(entry.read_bytes()):
            return entry
    except OSError:
        pass
    return None


@contextmanager
def added(name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new entry: made beside the others and then put in its place, so that two processes may make it at once. Where
    the folder cannot be written to, or is full, it is made elsewhere, for the duration of the ``with``.

    Args:
        make: writes a file.
    """
    path = _usable()
    if path is None and folder().is_dir() and folder() not in _told:
        _told.add(folder())
        warn(f"{problem()}. Until then every process compiles rules anew")
    entry = None if path is None else _kept(path, name, make)
    if entry is not None:
        yield entry
        return
    with tempfile.TemporaryDirectory(prefix="fusedoptim-") as other:
        entry = Path(other) / name
        make(entry)
        yield entry


def _kept(path: Path, name: str, make: Callable[[Path], None]) -> Path | None:
    """None where the folder does not take it; whatever make() raises otherwise goes through."""
    try:
        own = Path(tempfile.mkdtemp(dir=path))
    except OSError:
        return None
    try:
        made, note = own / name, own / "note"
        make(made)
        try:
            made.chmod(0o600)
            note.write_text(_digest_of(made.read_bytes()))
            note.chmod(0o600)
            made.replace(path / name)
            note.replace(path / f"{name}.sha256")
        except OSError:
            return None
        return path / name
    finally:
        for file in own.iterdir():
            file.unlink()
        own.rmdir()

"""Files that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .arguments import UsageError


def temporary(path: Path) -> Path:
    """Where ``path`` is written first. Always the same, so that what a killed process left is overwritten by the next
    one."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes to a temporary file beside ``path``, then renames it."""
    partial = temporary(path)
    try:
        with partial.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        raise


def make_folder(path: Path, option: str) -> None:
    """Creates a folder and tries to write to it. Raises UsageError, naming the option that asked for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror}") from error

"""Loads the compiled library once and keeps the cause if that fails. Silent."""

from __future__ import annotations

import json
import platform
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

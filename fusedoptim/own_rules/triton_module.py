"""The printed Triton functions of programs as a module: Triton reads its functions' sources from files."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path

from ..triton_kernels.device import RuleFunctions
from . import cache
from .trace import Program
from .triton_text import module as text_of

_made: dict[str, RuleFunctions] = {}
_lock = threading.Lock()
_kept = contextlib.ExitStack()
atexit.register(_kept.close)


def functions_of(programs: Sequence[Program]) -> RuleFunctions:
    """Those of a rule whose variants are these programs."""
    text = text_of(programs)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    with _lock:
        if key not in _made:
            name = f"{key}.py"
            path = cache.find(name) or _kept.enter_context(cache.added(name, lambda to: _write(to, text)))
            spec = importlib.util.spec_from_file_location(f"fusedoptim_rule_{key}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            _made[key] = RuleFunctions(*(getattr(module, name, None) for name in RuleFunctions._fields))
        return _made[key]


def _write(to: Path, text: str) -> None:
    to.write_text(text)

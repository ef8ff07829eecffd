"""The work of a function, as a number that no machine's load changes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any


def calls(function: Callable[[], Any]) -> int:
    """How many functions it calls, Python's and C's. Those of others' objects that go meanwhile are not among them."""
    n = 0
    gc.collect()
    collects = gc.isenabled()
    gc.disable()

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return n

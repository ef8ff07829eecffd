"""The one way in which this package warns."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

#: Top-level modules between the user's code and the place that warns: this package, torch's wrappers of a step, of a
#: schedule's step and of compiled code, and what ``with`` and ``copy.deepcopy`` go through.
_BETWEEN = frozenset({__name__.partition(".")[0], "torch", "contextlib", "copy"})


def _between(frame: FrameType) -> bool:
    # Code that torch.fx generated has a name like <eval_with_key>.0 for a file.
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _BETWEEN or frame.f_code.co_filename.startswith("<eval_with_key>")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's that led here, whatever lies between. Where there is none (a hook that autograd
    runs on a thread of its own), at the outermost line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _between(frame):
        frame = frame.f_back
    module = str(frame.f_globals.get("__name__", "<unknown>"))
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)

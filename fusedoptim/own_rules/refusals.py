"""What is said of a rule's function that cannot be traced: the operation, the line, and what to use instead."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

import torch

#: Frames in these files are not the function's own.
_OURS = tuple(str(p) for p in (Path(__file__).parent, Path(__file__).parent.with_name("rule_functions.py")))
_TORCHS = str(Path(torch.__file__).parent)

#: By the name of an operation, what a rule can use in its place.
INSTEAD = {
    "item": "numbers (the group's, t, norm(x), states that are numbers) are there as they are, and a tensor's elements "
    "cannot be looked at one by one",
    "exp": "elements have no exp: use the operations that the table in the guide lists",
    "log": "elements have no log: use the operations that the table in the guide lists",
    "sum": "only norm(x) and mean_square(x) are over whole tensors",
    "mean": "mean_square(x) is the mean of squares, for a mask of zeros and ones that of the mask",
    "max": "torch.maximum(a, b) is elementwise; only norm(x) and mean_square(x) are over whole tensors",
    "min": "torch.minimum(a, b) is elementwise; only norm(x) and mean_square(x) are over whole tensors",
    "norm": "use fusedoptim.norm(x), which is a number, and has the whole tensor's elements also where it is sharded",
    "linalg_vector_norm": "use fusedoptim.norm(x), which is a number",
    "matmul": "a rule is elementwise: a product of matrices needs elements of other places",
    "mm": "a rule is elementwise: a product of matrices needs elements of other places",
    "randn_like": "a rule has no random numbers of its own: rounding='stochastic' is an option of every optimizer",
    "rand_like": "a rule has no random numbers of its own: rounding='stochastic' is an option of every optimizer",
    "relu": "use x.clamp(min=0)",
    "numel": "mean_square(x) divides by the elements of the whole tensor",
    "shape": "a rule is elementwise, whatever the shape is",
    "size": "a rule is elementwise, whatever the shape is",
    "dim": "a rule is elementwise, whatever the shape is; put such parameters in a group of their own",
    "ndim": "a rule is elementwise, whatever the shape is; put such parameters in a group of their own",
    "view": "a rule is elementwise, whatever the shape is",
    "reshape": "a rule is elementwise, whatever the shape is",
    "getitem": "a rule is elementwise: an element cannot look at another",
    "float": "numbers have +, -, *, /, **, abs(), min(), max() and comparisons; double(lr) is the number of a learning "
    "rate; for roots use x ** 0.5",
    "int": "numbers are doubles: leave int() out",
}


class RuleError(TypeError):
    """A rule's function does what cannot be traced."""


def refuse(what: str, instead: str = "") -> RuleError:
    """An error for the line of the function that is running.

    Args:
        what: what it does that cannot be traced.
    """
    remedy = f" {instead[0].upper()}{instead[1:]}." if instead else ""
    return RuleError(f"{what} cannot be traced{_where()}.{remedy} Or pass backend='reference', to run it eagerly")


def refuse_operation(name: str) -> RuleError:
    plain = name.strip("_")
    instead = INSTEAD.get(name) or INSTEAD.get(plain) or "the guide on rules of one's own lists what can be used"
    return refuse(f"{name}()", instead)


def _where() -> str:
    """The innermost line that is not of this package's tracer or torch's, as far as there is one."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_OURS, _TORCHS)):
            text = linecache.getline(file, frame.f_lineno).strip()
            shown = f": {text}" if text else ""
            return f" ({Path(file).name}, line {frame.f_lineno}{shown})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""

"""What is said of a rule's function that cannot be traced: the operation, the line, and what to use instead."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch

#: Frames in these folders and this file are not the function's own.
_FOLDERS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, Path(torch.__file__).parent))
_FUNCTIONS = str(Path(__file__).parent.with_name("rule_functions.py"))

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
    "relu_": "use x.clamp_(min=0)",
    "device": "a rule computes the same on every device",
    "grad": "the gradient is what the function gets as such",
    "numel": "mean_square(x) divides by the elements of the whole tensor",
    "shape": "a rule is elementwise, whatever the shape is",
    "size": "a rule is elementwise, whatever the shape is",
    "dim": "a rule is elementwise, whatever the shape is; put such parameters in a group of their own",
    "ndim": "a rule is elementwise, whatever the shape is; put such parameters in a group of their own",
    "view": "a rule is elementwise, whatever the shape is",
    "reshape": "a rule is elementwise, whatever the shape is",
    "getitem": "a rule is elementwise: an element cannot look at another",
    "float": "a rule computes in one dtype, fp32 or fp64: x.to(g.dtype) for masks",
    "double": "a rule computes in one dtype, fp32 or fp64: x.to(g.dtype) for masks",
    "mod": "elements have +, -, *, / and ** with a few exponents",
    "floordiv": "elements have +, -, *, / and ** with a few exponents",
    "shift": "elements are no integers: multiply by a power of 2",
    "round": "elements have no roundings: to_fp32(number) rounds a number",
}


class RuleError(TypeError):
    """A rule's function does what cannot be traced."""


def refuse(what: str, instead: str = "") -> RuleError:
    """An error for the line of the function that is running.

    Args:
        what: what it does that cannot be traced.
    """
    remedy = f" {instead[0].upper()}{instead[1:]}." if instead else ""
    error = RuleError(f"{what} cannot be traced{_where()}.{remedy} Or pass backend='reference', to run it eagerly")
    _traced.refused = _traced.refused or error
    return error


def refuse_operation(name: str) -> RuleError:
    plain = name.strip("_")
    instead = INSTEAD.get(name) or INSTEAD.get(plain) or "the guide on rules of one's own lists what can be used"
    return refuse(f"{name}()", instead)


def refuse_text() -> RuleError:
    return refuse("the text of a symbol", "a rule's function is not run at each step, so it can print and name nothing")


# ---- lines ----


class _Traced(threading.local):
    function: Callable[..., Any] | None = None
    #: The first error of its present call, which the function may have caught.
    refused: RuleError | None = None


_traced = _Traced()


@contextmanager
def blaming(function: Callable[..., Any]) -> Iterator[None]:
    """What is refused within, and not by one of the function's lines, is refused with its first."""
    before, _traced.function = _traced.function, function
    try:
        yield
    finally:
        _traced.function = before


def call(function: Callable[..., Any], *args: Any) -> Any:
    """The function's lines are those of what it calls from here.

    Raises:
        RuleError: where it asks of a symbol what symbols do not have, beside what it raises itself.
    """
    try:
        result = function(*args)
        if _traced.refused is not None:
            raise _traced.refused
        return result
    except (TypeError, AttributeError) as error:
        if isinstance(error, RuleError) or not any(name in str(error) for name in _SYMBOLS):
            raise
        instead = "Leave dtype= out" if _DTYPE in str(error) else "Use what the guide on rules of one's own lists"
        raise RuleError(
            f"what the function does with a symbol cannot be traced{_line_of(error)}: {error}. {instead}, or pass "
            "backend='reference', to run it eagerly"
        ) from None
    except ArithmeticError as error:
        raise RuleError(
            f"what the function computes of its own numbers fails on one of its paths, all of which are traced"
            f"{_line_of(error)}: {error}. Ask before whether it can be computed: `1 / d if d > 0 else 0.0`"
        ) from None
    finally:
        _traced.refused = None  # which holds on to everything there is, by the frames of its traceback


#: Words of Python's and torch's own errors, where these get what stands for numbers and tensors.
_DTYPE = "_ComputeDtype"
_SYMBOLS = ("Elements", "Number", "Condition", _DTYPE)


def _line_of(error: BaseException) -> str:
    """Where the function's own code raised it."""
    frames = [(f.f_code.co_filename, line) for f, line in _frames_of(error)]
    return _shown(*next((at for at in reversed(frames) if not _is_ours(at[0])), frames[-1]))


def _frames_of(error: BaseException) -> Iterator[tuple[Any, int]]:
    at = error.__traceback__
    while at is not None:
        yield at.tb_frame, at.tb_lineno
        at = at.tb_next


def _is_ours(file: str) -> bool:
    return file == _FUNCTIONS or file.startswith(_FOLDERS)


def _where() -> str:
    """The innermost line of the function that is traced, or else its first."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code is call.__code__:
            break
        if found is None and not _is_ours(file):
            found = (file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None and _traced.function is not None:
        return first_line(_traced.function)
    return "" if found is None else _shown(*found)


def first_line(function: Callable[..., Any]) -> str:
    """Where it is written; empty where that is not known."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return _shown(code.co_filename, code.co_firstlineno) if isinstance(code, CodeType) else ""


def _shown(file: str, line: int) -> str:
    text = linecache.getline(file, line).strip()
    return f" ({Path(file).name}, line {line}{f': {text}' if text else ''})"

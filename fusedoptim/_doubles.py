"""Numbers as compiled code has them: C's doubles, which are infinite or NaN where Python's raise or become complex."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


def divide(x: float, y: float) -> float:
    if y != 0:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


def power(x: float, y: float) -> float:
    """C's pow."""
    try:
        return math.pow(x, y)
    except OverflowError:
        pass
    except ValueError:  # 0 to a negative power, or a negative number to one that is not whole
        if x != 0:
            return math.nan
    return -math.inf if math.copysign(1.0, x) < 0 and y % 2 == 1 else math.inf


class Double(float):
    """A number that a rule's function computes with. What is worked out from it is one, too."""

    __slots__ = ()


def _binary(function: Callable[[float, float], float], reflected: bool) -> Any:
    def method(self: Double, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        x, y = float(self), float(other)
        return Double(function(y, x) if reflected else function(x, y))

    return method


def _unary(function: Callable[[float], float]) -> Any:
    return lambda self: Double(function(float(self)))


for _name, _function in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": divide,
    "pow": power,
}.items():
    setattr(Double, f"__{_name}__", _binary(_function, False))
    setattr(Double, f"__r{_name}__", _binary(_function, True))
_UNARY: dict[str, Callable[[float], float]] = {"neg": operator.neg, "pos": operator.pos, "abs": abs}
for _name, _of_one in _UNARY.items():
    setattr(Double, f"__{_name}__", _unary(_of_one))


def doubles(x: Any) -> Any:
    """A number, or a tuple of numbers, as doubles; a tensor, or None, as it is."""
    if isinstance(x, tuple):
        return tuple(map(doubles, x))
    return Double(x) if isinstance(x, float) else x

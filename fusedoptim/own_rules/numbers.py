"""Symbols for numbers: the group's, the step's, norms, and what is worked out from them."""

from __future__ import annotations

from typing import Any

from ..rule_functions import double, to_fp32
from .nodes import ARITHMETIC, COMPARISONS, Kind, Node
from .paths import Path
from .refusals import refuse, refuse_operation, refuse_text

_HAVE = (
    "numbers have +, -, *, /, **, abs(), min(), max() and comparisons, and double(lr) is the number of a learning rate"
)


_LARGEST = 2**1023


class Condition:
    """A comparison of numbers. Asked for its truth it is decided: see paths.py."""

    def __init__(self, path: Path, node: Node) -> None:
        self._path, self.node = path, node

    def __bool__(self) -> bool:
        return self._path.decide(self.node)

    def __int__(self) -> int:
        return int(bool(self))

    __index__ = __int__

    def __float__(self) -> float:
        return float(bool(self))

    def __str__(self) -> str:
        raise refuse_text()

    def __format__(self, how: str) -> str:
        raise refuse_text()

    def __and__(self, other: Any) -> Any:
        raise refuse("arithmetic with a condition on numbers", "use `and`, `or`, `not` and `a if c else b`")

    __or__ = __rand__ = __ror__ = __xor__ = __rxor__ = __add__ = __radd__ = __sub__ = __rsub__ = __and__
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = __and__
    __eq__ = __ne__ = __and__

    def __invert__(self) -> Any:
        raise refuse("~ of a condition on numbers", "use `not`")

    def __hash__(self) -> int:
        raise refuse("a condition in a set or as a key", "use `and`, `or`, `not` and `a if c else b`")


class Number:
    """A number that a step knows."""

    def __init__(self, path: Path, node: Node) -> None:
        self._path, self.node = path, node

    __repr__ = object.__repr__
    #: numpy leaves the operation to this.
    __array_ufunc__ = None

    def __hash__(self) -> int:
        raise refuse("a number in a set or as a key", "compare it with each: t == 1 or t == 2, or `t in (1, 2)`")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0]
        if isinstance(first, Number):
            path = first._path
            if function is to_fp32:
                return Number(path, path.graph.make("fp32", Kind.NUMBER, untied(path, first.node)))
            if function is double:
                return Number(path, untied(path, first.node))
        raise refuse_operation(getattr(function, "__name__", str(function)))

    def __bool__(self) -> bool:
        return self._path.decide(self._path.graph.make("ne", Kind.CONDITION, self.node, self._path.graph.const(0.0)))

    def __float__(self) -> float:
        raise refuse("float(), or a function of math, of a number", f"{_HAVE}; for roots use x ** 0.5")

    def __int__(self) -> int:
        raise refuse("int() of a number", "numbers are doubles: leave int() out")

    def __round__(self, *digits: Any) -> int:
        raise refuse("a rounding of a number", f"{_HAVE}; to_fp32(x) rounds to fp32")

    __index__ = __int__
    __trunc__ = __floor__ = __ceil__ = __round__

    def __str__(self) -> str:
        raise refuse_text()

    def __format__(self, how: str) -> str:
        raise refuse_text()

    def __copy__(self) -> Number:
        return self

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.node.of_lr and name == "item":
            return lambda: Number(self._path, untied(self._path, self.node))
        if self.node.of_lr and name in ("reshape", "view", "detach"):
            return self._same
        raise refuse_operation(name)

    def _same(self, *shape: Any) -> Number:
        """A view of a learning rate that is a tensor, which has no dimensions."""
        if shape not in ((), ((),)):
            raise refuse_operation("reshape")
        return self

    def sqrt(self) -> Number:
        """What math.sqrt is, for the duration of a trace."""
        return Number(self._path, self._path.graph.make("sqrt", Kind.NUMBER, untied(self._path, self.node)))

    def __pos__(self) -> Number:
        return self

    def __mod__(self, other: Any) -> Any:
        raise refuse("% or // of numbers", _HAVE)

    __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = __mod__


def untied(path: Path, node: Node) -> Node:
    """What a learning rate that is a tensor stands for, as a number of its own."""
    return path.graph.make("double", Kind.NUMBER, node) if node.of_lr else node


def node_of(path: Path, x: Any) -> Node | None:
    """Of a number of any kind; None for what is none."""
    if isinstance(x, Number):
        return x.node
    if isinstance(x, (bool, int, float)) and not isinstance(x, Condition):
        if isinstance(x, int) and (abs(x) > _LARGEST or int(float(x)) != x):
            raise refuse("an integer that no double is", "numbers are doubles: write it as one, as 1e20")
        return path.graph.const(x)
    return None


def _operand(path: Path, x: Any) -> Node | None:
    """Of an operation; None for what is no number."""
    if isinstance(x, complex):
        raise refuse("a complex number", "as a power of a negative number is one: take abs(x), or max(x, 0.0)")
    return node_of(path, x)


def _as_lr(path: Path, node: Node) -> Node:
    """An operand as torch takes it beside a learning rate that is a tensor, where it adds or compares: rounded to that
    dtype. Where it multiplies, it is not."""
    if node.of_lr or (node.op == "const" and abs(node.data) <= 256 and node.data % 1 == 0):  # which all dtypes have
        return node
    return path.graph.make("mul", Kind.NUMBER, node, path.graph.const(1.0), of_lr=True)


def _operation(path: Path, op: str, *args: Node) -> Node:
    of_lr = any(a.of_lr for a in args)
    if of_lr and op in ("add", "sub"):
        args = tuple(_as_lr(path, a) for a in args)
    if of_lr and op == "pow":
        raise refuse("** with a learning rate that is a tensor", "double(lr) is its number")
    if of_lr and op == "div" and not args[0].of_lr:  # torch takes the reciprocal, then multiplies
        one = path.graph.make("div", Kind.NUMBER, path.graph.const(1.0), args[1], of_lr=True)
        return path.graph.make("mul", Kind.NUMBER, one, args[0], of_lr=True)
    return path.graph.make(op, Kind.NUMBER, *args, of_lr=of_lr)


def _unary(op: str) -> Any:
    def method(self: Number) -> Number:
        return Number(self._path, _operation(self._path, op, self.node))

    return method


def _binary(op: str, reflected: bool) -> Any:
    def method(self: Number, other: Any) -> Any:
        right = _operand(self._path, other)
        if right is None:
            return NotImplemented
        args = (right, self.node) if reflected else (self.node, right)
        return Number(self._path, _operation(self._path, op, *args))

    return method


def _comparison(op: str) -> Any:
    def method(self: Number, other: Any) -> Any:
        right = node_of(self._path, other)
        if right is None:
            return NotImplemented
        left = self.node
        if left.of_lr or right.of_lr:
            left, right = _as_lr(self._path, left), _as_lr(self._path, right)
        return Condition(self._path, self._path.graph.make(op, Kind.CONDITION, left, right))

    return method


_NAMES = {"div": "truediv"}
for _op in ("neg", "abs"):
    setattr(Number, f"__{_op}__", _unary(_op))
for _op in ("add", "sub", "mul", "div", "pow"):
    assert _op in ARITHMETIC
    _name = _NAMES.get(_op, _op)
    setattr(Number, f"__{_name}__", _binary(_op, False))
    setattr(Number, f"__r{_name}__", _binary(_op, True))
for _op in COMPARISONS:
    setattr(Number, f"__{_op}__", _comparison(_op))

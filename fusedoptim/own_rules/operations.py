"""torch's elementwise operations, each with the roundings that it has on the CPU: which of its operations are one fma,
and which are not. The square root is IEEE's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .nodes import COMPARISONS, Kind, Node
from .numbers import Number
from .paths import Path
from .refusals import refuse
from .tensors import COMPUTE_DTYPE, OPERATIONS, Elements, is_constant, mask_node, number_node, tensor_node


def _operation(*names: str) -> Callable[[Callable[..., Node]], Callable[..., Node]]:
    def register(function: Callable[..., Node]) -> Callable[..., Node]:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def _make(path: Path, op: str, *args: Node) -> Node:
    return path.graph.make(op, Kind.TENSOR, *args)


def _spread(path: Path, number: float) -> Node:
    return _make(path, "spread", path.graph.const(number))


def _scaled(path: Path, number: Node, x: Node) -> Node:
    return x if is_constant(number, 1.0) else _make(path, "mul", _make(path, "spread", number), x)


# ---- sums and products ----


@_operation("add")
def _add(path: Path, a: Any, b: Any, *, alpha: Any = 1) -> Node:
    x, y, by = tensor_node(path, a), tensor_node(path, b), number_node(path, alpha)
    return _make(path, "add", x, y) if is_constant(by, 1.0) else _make(path, "fma", _make(path, "spread", by), y, x)


@_operation("sub", "subtract")
def _sub(path: Path, a: Any, b: Any, *, alpha: Any = 1) -> Node:
    x, y, by = tensor_node(path, a), tensor_node(path, b), number_node(path, alpha)
    if is_constant(by, 1.0):
        return _make(path, "sub", x, y)
    return _make(path, "fma", _make(path, "neg", _make(path, "spread", by)), y, x)


@_operation("rsub")
def _rsub(path: Path, a: Any, b: Any, *, alpha: Any = 1) -> Node:
    return _sub(path, b, a, alpha=alpha)


@_operation("mul", "multiply")
def _mul(path: Path, a: Any, b: Any) -> Node:
    return _make(path, "mul", tensor_node(path, a), tensor_node(path, b))


@_operation("div", "divide", "true_divide")
def _div(path: Path, a: Any, b: Any) -> Node:
    return _make(path, "div", tensor_node(path, a), tensor_node(path, b))


@_operation("reciprocal")
def _reciprocal(path: Path, x: Any) -> Node:
    return _make(path, "div", _spread(path, 1.0), tensor_node(path, x))


@_operation("addcmul")
def _addcmul(path: Path, s: Any, a: Any, b: Any, *, value: Any = 1) -> Node:
    scaled = _scaled(path, number_node(path, value), tensor_node(path, a))
    return _make(path, "fma", scaled, tensor_node(path, b), tensor_node(path, s))


@_operation("addcdiv")
def _addcdiv(path: Path, s: Any, a: Any, b: Any, *, value: Any = 1) -> Node:
    scaled = _scaled(path, number_node(path, value), tensor_node(path, a))
    return _make(path, "add", tensor_node(path, s), _make(path, "div", scaled, tensor_node(path, b)))


@_operation("lerp")
def _lerp(path: Path, start: Any, end: Any, weight: Any) -> Node:
    a, b = tensor_node(path, start), tensor_node(path, end)
    if not isinstance(weight, Elements):
        return _make(path, "lerp", a, b, number_node(path, weight))
    w, one = tensor_node(path, weight), _spread(path, 1.0)
    small = path.graph.make("lt", Kind.MASK, _make(path, "abs", w), _spread(path, 0.5))
    coefficient = _make(path, "where", small, w, _make(path, "sub", w, one))
    return _make(path, "fma", coefficient, _make(path, "sub", b, a), _make(path, "where", small, a, b))


# ---- one operand ----


@_operation("neg", "negative")
def _neg(path: Path, x: Any) -> Node:
    return _make(path, "neg", tensor_node(path, x))


@_operation("abs", "absolute")
def _abs(path: Path, x: Any) -> Node:
    return _make(path, "abs", tensor_node(path, x))


@_operation("sign", "sgn")
def _sign(path: Path, x: Any) -> Node:
    return _make(path, "sign", tensor_node(path, x))


@_operation("sqrt")
def _sqrt(path: Path, x: Any) -> Node:
    return _make(path, "sqrt", tensor_node(path, x))


@_operation("rsqrt")
def _rsqrt(path: Path, x: Any) -> Node:
    return _make(path, "div", _spread(path, 1.0), _sqrt(path, x))


@_operation("square")
def _square(path: Path, x: Any) -> Node:
    node = tensor_node(path, x)
    return _make(path, "mul", node, node)


@_operation("pow")
def _pow(path: Path, x: Any, exponent: Any) -> Node:
    node = tensor_node(path, x)
    by_number: dict[float, Callable[[], Node]] = {
        1: lambda: node,
        2: lambda: _make(path, "mul", node, node),
        3: lambda: _make(path, "mul", _make(path, "mul", node, node), node),
        0.5: lambda: _sqrt(path, x),
        -0.5: lambda: _rsqrt(path, x),
        -1: lambda: _reciprocal(path, x),
    }
    if isinstance(exponent, (int, float)) and exponent in by_number and isinstance(x, Elements):
        return by_number[exponent]()
    raise refuse("x ** n of elements", f"n may be one of {', '.join(map(str, by_number))}")


@_operation("clone", "detach", "contiguous", "alias", "positive")
def _same(path: Path, x: Any, **_: Any) -> Node:
    return x.node  # type: ignore[no-any-return]


# ---- new tensors ----


@_operation("zeros_like", "zero")
def _zeros(path: Path, x: Any, **_: Any) -> Node:
    return _spread(path, 0.0)


@_operation("ones_like")
def _ones(path: Path, x: Any, **_: Any) -> Node:
    return _spread(path, 1.0)


@_operation("full_like", "fill")
def _full(path: Path, x: Any, value: Any, **_: Any) -> Node:
    return _make(path, "spread", number_node(path, value))


@_operation("copy")
def _copy(path: Path, x: Any, other: Any, non_blocking: bool = False) -> Node:
    return tensor_node(path, other)


@_operation("to", "type_as", "type")
def _to(path: Path, x: Any, dtype: Any, *_: Any, **__: Any) -> Node:
    if dtype is COMPUTE_DTYPE or isinstance(dtype, Elements):
        return tensor_node(path, x)
    raise refuse(f"a conversion to {dtype}", "a rule computes in one dtype, fp32 or fp64: x.to(g.dtype) for masks")


# ---- comparisons and choices ----


def _comparison(op: str) -> Callable[..., Node]:
    def compare(path: Path, a: Any, b: Any) -> Node:
        return path.graph.make(op, Kind.MASK, tensor_node(path, a), tensor_node(path, b))

    return compare


_LONG = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "ne": "not_equal"}
for _op in COMPARISONS:
    _operation(_op, *([_LONG[_op]] if _op in _LONG else []))(_comparison(_op))


@_operation("isnan")
def _isnan(path: Path, x: Any) -> Node:
    return _comparison("ne")(path, x, x)


@_operation("isfinite")
def _isfinite(path: Path, x: Any) -> Node:
    return path.graph.make("lt", Kind.MASK, _abs(path, x), _spread(path, float("inf")))


@_operation("logical_and", "bitwise_and")
def _and(path: Path, a: Any, b: Any) -> Node:
    return path.graph.make("and", Kind.MASK, mask_node(path, a), mask_node(path, b))


@_operation("logical_or", "bitwise_or")
def _or(path: Path, a: Any, b: Any) -> Node:
    return path.graph.make("or", Kind.MASK, mask_node(path, a), mask_node(path, b))


@_operation("logical_not", "bitwise_not")
def _not(path: Path, x: Any) -> Node:
    return path.graph.make("not", Kind.MASK, mask_node(path, x))


@_operation("where")
def _where(path: Path, mask: Any, a: Any, b: Any) -> Node:
    if isinstance(a, Elements) and a.node.kind is Kind.MASK and isinstance(mask, Elements):
        mask, a = (mask, a) if mask.node.kind is Kind.MASK else (a, mask)  # x.where(mask, y)
    if not (isinstance(a, Elements) or isinstance(b, Elements)):
        raise refuse("torch.where(mask, number, number)", "mask.to(g.dtype) is ones and zeros of the compute dtype")
    return _make(path, "where", mask_node(path, mask), tensor_node(path, a), tensor_node(path, b))


@_operation("masked_fill")
def _masked_fill(path: Path, x: Any, mask: Any, value: Any) -> Node:
    return _make(path, "where", mask_node(path, mask), _make(path, "spread", number_node(path, value)), x.node)


@_operation("maximum")
def _maximum(path: Path, a: Any, b: Any) -> Node:
    return _make(path, "max", *_both_tensors(path, "maximum", a, b))


@_operation("minimum")
def _minimum(path: Path, a: Any, b: Any) -> Node:
    return _make(path, "min", *_both_tensors(path, "minimum", a, b))


@_operation("copysign")
def _copysign(path: Path, a: Any, b: Any) -> Node:
    return _make(path, "copysign", tensor_node(path, a), tensor_node(path, b))


def _both_tensors(path: Path, name: str, a: Any, b: Any) -> tuple[Node, Node]:
    if not (isinstance(a, Elements) and isinstance(b, Elements)):
        raise refuse(f"torch.{name}() of a tensor and a number", "use x.clamp(min=...) or x.clamp(max=...)")
    return tensor_node(path, a), tensor_node(path, b)


@_operation("clamp", "clip")
def _clamp(path: Path, x: Any, min: Any = None, max: Any = None) -> Node:
    """A NaN stays, and so does a zero's sign beside a limit of 0. A limit that is a NaN makes everything one."""
    node = tensor_node(path, x)
    if isinstance(min, Elements) or isinstance(max, Elements):
        raise refuse("clamp() with limits that are tensors", "use torch.maximum() and torch.minimum()")
    for op, limit in (("lt", min), ("gt", max)):
        if limit is not None:
            number = number_node(path, limit)
            bound = _make(path, "spread", number)
            node = _make(path, "where", path.graph.make(op, Kind.MASK, node, bound), bound, node)
            if number.op != "const":
                is_nan = path.graph.make("ne", Kind.CONDITION, number, number)
                node = path.graph.make("choose", Kind.TENSOR, is_nan, bound, node)
    return node


@_operation("clamp_min")
def _clamp_min(path: Path, x: Any, min: Any) -> Node:
    return _clamp(path, x, min=min)


@_operation("clamp_max")
def _clamp_max(path: Path, x: Any, max: Any) -> Node:
    return _clamp(path, x, max=max)


# ---- Python's operators ----


def _power_of(path: Path, number: Any, x: Elements) -> Node:
    raise refuse("number ** elements", "elements have no powers but x ** 2, x ** 3, x ** 0.5, x ** -0.5, x ** -1")


def _divided_by(path: Path, number: Any, x: Elements) -> Node:
    """number / tensor is the reciprocal times the number, but for a learning rate that is a tensor."""
    if isinstance(number, Number) and number.node.of_lr:
        return _div(path, number, x)
    return _make(path, "mul", _reciprocal(path, x), tensor_node(path, number))


def _python(name: str, function: Callable[..., Node], reflected: bool = False, in_place: bool = False) -> None:
    def method(self: Elements, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        result = Elements(self._path, function(self._path, *args))
        return self._assign(result) if in_place else result

    setattr(Elements, f"__{name}__", method)


for _name, _function in {"add": _add, "sub": _sub, "mul": _mul, "truediv": _div, "pow": _pow}.items():
    _python(_name, _function)
    _python(f"i{_name}", _function, in_place=True)
for _name, _function in {"add": _add, "sub": _sub, "mul": _mul, "truediv": _divided_by, "pow": _power_of}.items():
    _python(f"r{_name}", _function, reflected=True)
for _op in COMPARISONS:
    _python(_op, OPERATIONS[_op])
for _name, _function in {"and": _and, "or": _or}.items():
    _python(f"i{_name}", _function, in_place=True)
for _name, _function in {"and": _and, "or": _or, "invert": _not, "neg": _neg, "abs": _abs}.items():
    _python(_name, _function)

"""torch's elementwise operations, each with the roundings that it has on the CPU: which of its operations are one fma,
and which are not. The square root is IEEE's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .nodes import COMPARISONS, Kind, Node
from .numbers import Condition, Number
from .paths import Path
from .refusals import refuse
from .tensors import (
    COMPUTE_DTYPE,
    OF_MASKS,
    OPERATIONS,
    Elements,
    is_constant,
    mask_node,
    number_node,
    run,
    tensor_node,
)


def _operation(*names: str, masks: bool = False) -> Callable[[Callable[..., Node]], Callable[..., Node]]:
    """Of torch's functions of these names, whose arguments have torch's names.

    Args:
        masks: whether they are of masks alone, too.
    """

    def register(function: Callable[..., Node]) -> Callable[..., Node]:
        for name in names:
            OPERATIONS[name] = function
        OF_MASKS.update(names if masks else ())
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
def _add(path: Path, input: Any, other: Any, *, alpha: Any = 1) -> Node:
    x, y, by = tensor_node(path, input), tensor_node(path, other), number_node(path, alpha)
    return _make(path, "add", x, y) if is_constant(by, 1.0) else _make(path, "fma", _make(path, "spread", by), y, x)


@_operation("sub", "subtract")
def _sub(path: Path, input: Any, other: Any, *, alpha: Any = 1) -> Node:
    x, y, by = tensor_node(path, input), tensor_node(path, other), number_node(path, alpha)
    if is_constant(by, 1.0):
        return _make(path, "sub", x, y)
    return _make(path, "fma", _make(path, "neg", _make(path, "spread", by)), y, x)


@_operation("rsub")
def _rsub(path: Path, input: Any, other: Any, *, alpha: Any = 1) -> Node:
    return _sub(path, other, input, alpha=alpha)


@_operation("mul", "multiply")
def _mul(path: Path, input: Any, other: Any) -> Node:
    return _make(path, "mul", tensor_node(path, input), tensor_node(path, other))


@_operation("div", "divide", "true_divide")
def _div(path: Path, input: Any, other: Any) -> Node:
    return _make(path, "div", tensor_node(path, input), tensor_node(path, other))


@_operation("reciprocal")
def _reciprocal(path: Path, input: Any) -> Node:
    return _make(path, "div", _spread(path, 1.0), tensor_node(path, input))


@_operation("addcmul")
def _addcmul(path: Path, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Node:
    scaled = _scaled(path, number_node(path, value), tensor_node(path, tensor1))
    return _make(path, "fma", scaled, tensor_node(path, tensor2), tensor_node(path, input))


@_operation("addcdiv")
def _addcdiv(path: Path, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Node:
    scaled = _scaled(path, number_node(path, value), tensor_node(path, tensor1))
    return _make(path, "add", tensor_node(path, input), _make(path, "div", scaled, tensor_node(path, tensor2)))


@_operation("lerp")
def _lerp(path: Path, input: Any, end: Any, weight: Any) -> Node:
    a, b = tensor_node(path, input), tensor_node(path, end)
    if not isinstance(weight, Elements):
        return _make(path, "lerp", a, b, number_node(path, weight))
    w, one = tensor_node(path, weight), _spread(path, 1.0)
    small = path.graph.make("lt", Kind.MASK, _make(path, "abs", w), _spread(path, 0.5))
    coefficient = _make(path, "where", small, w, _make(path, "sub", w, one))
    return _make(path, "fma", coefficient, _make(path, "sub", b, a), _make(path, "where", small, a, b))


# ---- one operand ----


@_operation("neg", "negative")
def _neg(path: Path, input: Any) -> Node:
    return _make(path, "neg", tensor_node(path, input))


@_operation("abs", "absolute")
def _abs(path: Path, input: Any) -> Node:
    return _make(path, "abs", tensor_node(path, input))


@_operation("sign", "sgn")
def _sign(path: Path, input: Any) -> Node:
    return _make(path, "sign", tensor_node(path, input))


@_operation("sqrt")
def _sqrt(path: Path, input: Any) -> Node:
    return _make(path, "sqrt", tensor_node(path, input))


@_operation("rsqrt")
def _rsqrt(path: Path, input: Any) -> Node:
    return _make(path, "div", _spread(path, 1.0), _sqrt(path, input))


@_operation("square")
def _square(path: Path, input: Any) -> Node:
    node = tensor_node(path, input)
    return _make(path, "mul", node, node)


@_operation("pow")
def _pow(path: Path, input: Any, exponent: Any) -> Node:
    node = tensor_node(path, input)
    by_number: dict[float, Callable[[], Node]] = {
        1: lambda: node,
        2: lambda: _make(path, "mul", node, node),
        3: lambda: _make(path, "mul", _make(path, "mul", node, node), node),
        0.5: lambda: _sqrt(path, input),
        -0.5: lambda: _rsqrt(path, input),
        -1: lambda: _reciprocal(path, input),
    }
    is_number = isinstance(exponent, (int, float)) and not isinstance(exponent, (Number, Condition))
    if is_number and exponent in by_number and isinstance(input, Elements):
        return by_number[exponent]()
    raise refuse("x ** n of elements", f"n may be one of {', '.join(map(str, by_number))}")


@_operation("clone", "detach", "contiguous", "alias", "positive", masks=True)
def _same(path: Path, input: Any, *, memory_format: Any = None) -> Node:
    return input.node  # type: ignore[no-any-return]


# ---- new tensors ----


def _check_new(name: str, dtype: Any, others: dict[str, Any]) -> None:
    if dtype is not None:
        raise refuse(f"{name}(dtype={dtype})", "a rule computes in one dtype, fp32 or fp64: leave dtype= out")
    told = [key for key, value in others.items() if value and key != "memory_format"]
    if told:
        raise refuse(f"{name}({told[0]}=...)", "what a rule makes is as its tensors are: leave it out")


@_operation("zeros_like")
def _zeros_like(path: Path, input: Any, *, dtype: Any = None, **others: Any) -> Node:
    _check_new("zeros_like", dtype, others)
    return _spread(path, 0.0)


@_operation("ones_like")
def _ones_like(path: Path, input: Any, *, dtype: Any = None, **others: Any) -> Node:
    _check_new("ones_like", dtype, others)
    return _spread(path, 1.0)


@_operation("full_like")
def _full_like(path: Path, input: Any, fill_value: Any, *, dtype: Any = None, **others: Any) -> Node:
    _check_new("full_like", dtype, others)
    return _make(path, "spread", number_node(path, fill_value))


@_operation("zero")
def _zero(path: Path, input: Any) -> Node:
    return _spread(path, 0.0)


@_operation("fill")
def _fill(path: Path, input: Any, value: Any) -> Node:
    return _make(path, "spread", number_node(path, value))


@_operation("copy", masks=True)
def _copy(path: Path, input: Any, src: Any, non_blocking: bool = False) -> Node:
    return src.node if isinstance(src, Elements) else tensor_node(path, src)


@_operation("to", "type_as", "type", masks=True)
def _to(
    path: Path, input: Any, dtype: Any, non_blocking: Any = False, *, copy: bool = False, memory_format: Any = None
) -> Node:
    if isinstance(dtype, Elements) and dtype.node.kind is Kind.MASK:
        raise refuse("a conversion to a mask", "compare it: x != 0")
    if dtype is COMPUTE_DTYPE or isinstance(dtype, Elements):
        return tensor_node(path, input)
    raise refuse(f"a conversion to {dtype}", "a rule computes in one dtype, fp32 or fp64: x.to(g.dtype) for masks")


# ---- comparisons and choices ----


def _comparison(op: str) -> Callable[..., Node]:
    def compare(path: Path, input: Any, other: Any) -> Node:
        for mask, number in ((input, other), (other, input)):
            if isinstance(mask, Elements) and mask.node.kind is Kind.MASK and not isinstance(number, Elements):
                raise refuse(
                    "a comparison of a mask with a number", "a mask is a condition as it is; ~mask is its opposite"
                )
        return path.graph.make(op, Kind.MASK, tensor_node(path, input), tensor_node(path, other))

    return compare


_LONG = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "ne": "not_equal"}
for _op in COMPARISONS:
    _operation(_op, *([_LONG[_op]] if _op in _LONG else []), masks=True)(_comparison(_op))


@_operation("isnan")
def _isnan(path: Path, input: Any) -> Node:
    return _comparison("ne")(path, input, input)


@_operation("isfinite")
def _isfinite(path: Path, input: Any) -> Node:
    return path.graph.make("lt", Kind.MASK, _abs(path, input), _spread(path, float("inf")))


def _mask(path: Path, op: str, *args: Node) -> Node:
    return path.graph.make(op, Kind.MASK, *args)


@_operation("logical_and", "bitwise_and", masks=True)
def _and(path: Path, input: Any, other: Any) -> Node:
    return _mask(path, "and", mask_node(path, input), mask_node(path, other))


@_operation("logical_or", "bitwise_or", masks=True)
def _or(path: Path, input: Any, other: Any) -> Node:
    return _mask(path, "or", mask_node(path, input), mask_node(path, other))


@_operation("logical_xor", "bitwise_xor", masks=True)
def _xor(path: Path, input: Any, other: Any) -> Node:
    a, b = mask_node(path, input), mask_node(path, other)
    return _mask(path, "or", _mask(path, "and", a, _mask(path, "not", b)), _mask(path, "and", _mask(path, "not", a), b))


@_operation("logical_not", "bitwise_not", masks=True)
def _not(path: Path, input: Any) -> Node:
    return _mask(path, "not", mask_node(path, input))


@_operation("where", masks=True)
def _where(path: Path, condition: Any, input: Any, other: Any) -> Node:
    mask, kinds = mask_node(path, condition), [x.node.kind for x in (input, other) if isinstance(x, Elements)]
    if not kinds:
        raise refuse("torch.where(mask, number, number)", "mask.to(g.dtype) is ones and zeros of the compute dtype")
    if kinds == [Kind.MASK, Kind.MASK]:
        yes, no = _mask(path, "and", mask, input.node), _mask(path, "and", _mask(path, "not", mask), other.node)
        return _mask(path, "or", yes, no)
    if kinds == [Kind.MASK]:
        raise refuse("torch.where(mask, mask, number)", "use & and | of masks")
    return _make(path, "where", mask, tensor_node(path, input), tensor_node(path, other))


@_operation("masked_fill", masks=True)
def _masked_fill(path: Path, input: Any, mask: Any, value: Any) -> Node:
    if isinstance(input, Elements) and input.node.kind is Kind.MASK:
        raise refuse("masked_fill() of a mask", "use mask | other, or mask & ~other")
    return _make(path, "where", mask_node(path, mask), _make(path, "spread", number_node(path, value)), input.node)


@_operation("maximum")
def _maximum(path: Path, input: Any, other: Any) -> Node:
    return _make(path, "max", *_both_tensors(path, "maximum", input, other))


@_operation("minimum")
def _minimum(path: Path, input: Any, other: Any) -> Node:
    return _make(path, "min", *_both_tensors(path, "minimum", input, other))


@_operation("copysign")
def _copysign(path: Path, input: Any, other: Any) -> Node:
    return _make(path, "copysign", tensor_node(path, input), tensor_node(path, other))


def _both_tensors(path: Path, name: str, a: Any, b: Any) -> tuple[Node, Node]:
    if not (isinstance(a, Elements) and isinstance(b, Elements)):
        raise refuse(f"torch.{name}() of a tensor and a number", "use x.clamp(min=...) or x.clamp(max=...)")
    return tensor_node(path, a), tensor_node(path, b)


@_operation("clamp", "clip")
def _clamp(path: Path, input: Any, min: Any = None, max: Any = None) -> Node:
    """A NaN stays, and so does a zero's sign beside a limit of 0. A limit that is a NaN makes everything one."""
    node = tensor_node(path, input)
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
def _clamp_min(path: Path, input: Any, min: Any) -> Node:
    return _clamp(path, input, min=min)


@_operation("clamp_max")
def _clamp_max(path: Path, input: Any, max: Any) -> Node:
    return _clamp(path, input, max=max)


# ---- Python's operators ----


@_operation("number ** x")
def _power_of(path: Path, number: Any, x: Elements) -> Node:
    raise refuse("number ** elements", "elements have no powers but x ** 2, x ** 3, x ** 0.5, x ** -0.5, x ** -1")


@_operation("number / x")
def _divided_by(path: Path, number: Any, x: Elements) -> Node:
    """The reciprocal times the number, but for a learning rate that is a tensor."""
    if isinstance(number, Number) and number.node.of_lr:
        return _div(path, number, x)
    return _make(path, "mul", _reciprocal(path, x), tensor_node(path, number))


def _python(method: str, operation: str, reflected: bool = False, in_place: bool = False) -> None:
    def python(self: Elements, *others: Any) -> Any:
        result = run(self._path, operation, (*others, self) if reflected else (self, *others), {})
        return self._assign(result) if in_place else result

    setattr(Elements, f"__{method}__", python)


_PYTHON = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}
_PYTHON |= {"and": "logical_and", "or": "logical_or", "xor": "logical_xor"}
for _name, _of in _PYTHON.items():
    _python(_name, _of)
    _python(f"i{_name}", _of, in_place=True)
    _python(f"r{_name}", {"div": "number / x", "pow": "number ** x"}.get(_of, _of), reflected=True)
for _op in COMPARISONS:
    _python(_op, _op)
for _name, _of in {"invert": "logical_not", "neg": "neg", "abs": "abs"}.items():
    _python(_name, _of)

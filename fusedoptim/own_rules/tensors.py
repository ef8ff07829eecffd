"""Symbols for tensors: the parameter, the gradient, the states, and what is worked out from them. Each stands for
whatever it was given last, since operations may be in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rule_functions import correctly_rounded_sqrt, mean_square, norm
from .nodes import Kind, Node
from .numbers import Number, node_of
from .paths import Path
from .refusals import refuse, refuse_operation, refuse_text

#: Those that return the tensor itself where they change nothing, and those that always return a view of it.
ITSELF, VIEWS = ("contiguous", "positive", "to", "type", "type_as"), ("detach", "alias")
#: What torch's operations do, by its names (operations.py). As methods they exist with a trailing underscore, too.
OPERATIONS: dict[str, Callable[..., Node]] = {}
#: Those of masks alone; all others take a mask only beside a tensor, and then as ones and zeros.
OF_MASKS: set[str] = set()
#: Where torch takes no mask.
_WITHOUT_MASKS = ("sub", "subtract", "rsub", "lerp")
_ONES_AND_ZEROS = "use torch.where(mask, a, b), or mask.to(g.dtype), which is ones and zeros"


class _ComputeDtype:
    """What x.dtype is: that in which a rule computes."""

    def __eq__(self, other: object) -> bool:
        raise refuse("a comparison of dtypes", "a rule computes in fp32 or fp64, with the same operations")

    def __hash__(self) -> int:
        raise refuse("a dtype in a set or as a key", "a rule computes in fp32 or fp64, with the same operations")

    def __repr__(self) -> str:
        return "the compute dtype"


COMPUTE_DTYPE = _ComputeDtype()


def run(path: Path, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Elements:
    """An operation, of what torch's function of that name gets."""
    arguments = dict(kwargs)
    out = arguments.pop("out", None)
    kinds = {x.node.kind for x in (*args, *arguments.values()) if isinstance(x, Elements)}
    if kinds == {Kind.MASK} and name not in OF_MASKS:
        raise refuse(f"{name}() of masks, which torch does not compute in the tensors' dtype,", _ONES_AND_ZEROS)
    if Kind.MASK in kinds and name in _WITHOUT_MASKS:
        raise refuse(f"{name}() of a mask, which torch refuses,", _ONES_AND_ZEROS)
    try:
        result = Elements(path, OPERATIONS[name](path, *args, **arguments))
    except TypeError as error:
        if type(error) is not TypeError:  # refused
            raise
        said = str(error).partition("() ")[2] or error
        raise refuse(f"{name}() with these arguments ({said})") from None
    if out is not None:
        if not isinstance(out, Elements):
            raise refuse(f"{name}(out=...) with another tensor", "out= is one of the rule's own")
        return out._assign(result)
    first = args[0] if args else arguments.get("input")
    if isinstance(first, Elements):
        if name in VIEWS:
            return first._view()
        if name in ITSELF and result.node is first.node and not arguments.get("copy"):
            return first
    return result


@dataclass
class _Memory:
    """What several tensors may have in common."""

    node: Node


class Elements:
    """All elements of one tensor."""

    __hash__ = object.__hash__
    __repr__ = object.__repr__
    #: numpy leaves the operation to this.
    __array_ufunc__ = None

    def __init__(self, path: Path, node: Node) -> None:
        self._path, self._memory = path, _Memory(node)

    @property
    def node(self) -> Node:
        """What was written to it last, or to a view of it."""
        return self._memory.node

    def _view(self) -> Elements:
        """Another tensor with the same memory."""
        view = Elements(self._path, self.node)
        view._memory = self._memory
        return view

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbol = next((x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Elements)), None)
        if symbol is None:  # within a list: foreach functions and others
            raise refuse_operation(getattr(function, "__name__", str(function)))
        if function in (norm, mean_square):
            return symbol._sum(function)
        name = "sqrt" if function is correctly_rounded_sqrt else getattr(function, "__name__", str(function))
        if name in OPERATIONS:
            return run(symbol._path, name, args, kwargs or {})
        plain = name.removesuffix("_")
        if plain not in OPERATIONS:
            raise refuse_operation(name)
        target = args[0] if args else (kwargs or {}).get("input")
        if not isinstance(target, Elements):
            raise refuse(f"{name}() in the place of another tensor", "a function writes its own tensors")
        return target._assign(run(symbol._path, plain, args, kwargs or {}))

    def _sum(self, function: Any) -> Number:
        """norm() or mean_square() of this."""
        path, make = self._path, self._path.graph.make
        if path.depends_on_sums or self.node.needs_sums:
            raise refuse(
                f"{function.__name__}() of what depends on another one",
                "a step measures all of them in one pass, before it updates anything",
            )
        total = make("sum", Kind.NUMBER, data=len(path.sums))
        path.sums.append(_as_tensor(path, self.node))
        if function is norm:
            return Number(path, make("sqrt", Kind.NUMBER, total))
        numel, zero = make("numel", Kind.NUMBER), path.graph.const(0.0)
        mean = make("div", Kind.NUMBER, total, numel)
        return Number(path, make("choose", Kind.NUMBER, make("eq", Kind.CONDITION, numel, zero), zero, mean))

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":
            if self.node.kind is Kind.MASK:
                raise refuse("the dtype of a mask", "g.dtype is that in which a rule computes")
            return COMPUTE_DTYPE
        if name == "data":
            return self._view()
        if name.startswith("__"):
            raise AttributeError(name)
        plain = name.removesuffix("_")
        if name not in OPERATIONS and plain not in OPERATIONS:
            raise refuse_operation(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if name == plain:
                return run(self._path, name, (self, *args), kwargs)
            return self._assign(run(self._path, plain, (self, *args), kwargs))

        return method

    def where(self, condition: Any, other: Any) -> Elements:
        return run(self._path, "where", (condition, self, other), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_path", "_memory"):
            object.__setattr__(self, name, value)
        elif name == "data" and isinstance(value, Elements) and value.node.kind is self.node.kind:
            self._memory = value._memory
        else:
            raise refuse(f"x.{name} = ...", "write x in place: x.copy_(...)")

    def _assign(self, other: Elements) -> Elements:
        if self.node.kind is Kind.TENSOR:
            self._memory.node = _as_tensor(self._path, other.node)
        elif other.node.kind is Kind.MASK:
            self._memory.node = other.node
        else:
            raise refuse("numbers in the place of a mask", "x.to(g.dtype) makes ones and zeros of a mask")
        return self

    def __pos__(self) -> Elements:
        return self

    def __copy__(self) -> Elements:
        return self._view()

    def __deepcopy__(self, memo: Any) -> Elements:
        return Elements(self._path, self.node)

    def __bool__(self) -> bool:
        raise refuse("a condition on elements", "use torch.where(mask, a, b)")

    def __str__(self) -> str:
        raise refuse_text()

    def __format__(self, how: str) -> str:
        raise refuse_text()


def _refused(name: str) -> Any:
    def method(self: Elements, *args: Any) -> Any:
        raise refuse_operation(name)

    return method


#: What Python asks of a tensor, by what is said of it.
_REFUSED = {
    "item": ("float", "int", "index", "complex"),
    "size": ("len",),
    "getitem": ("iter", "getitem", "setitem", "delitem", "contains"),
    "matmul": ("matmul", "rmatmul", "imatmul"),
    "mod": ("mod", "rmod", "imod"),
    "floordiv": ("floordiv", "rfloordiv", "ifloordiv", "divmod", "rdivmod"),
    "shift": ("lshift", "rshift", "rlshift", "rrshift", "ilshift", "irshift"),
    "round": ("round", "trunc", "floor", "ceil"),
}
for _name, _methods in _REFUSED.items():
    for _method in _methods:
        setattr(Elements, f"__{_method}__", _refused(_name))


def _as_tensor(path: Path, node: Node) -> Node:
    """A mask as ones and zeros."""
    if node.kind is Kind.TENSOR:
        return node
    make, const = path.graph.make, path.graph.const
    one, zero = (make("spread", Kind.TENSOR, const(x)) for x in (1.0, 0.0))
    return make("where", Kind.TENSOR, node, one, zero)


def tensor_node(path: Path, x: Any) -> Node:
    """Of an operand: elements, or a number for all of them."""
    if isinstance(x, Elements):
        return _as_tensor(path, x.node)
    number = node_of(path, x)
    if number is None:
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise refuse(f"an operand of type {kind}", "the operands of a rule are its own tensors and numbers")
    return path.graph.make("spread", Kind.TENSOR, number)


def number_node(path: Path, x: Any) -> Node:
    found = node_of(path, x)
    if found is None:
        raise refuse(f"{type(x).__name__} in a number's place", "a rule's numbers are those of the group, t, and norms")
    return found


def mask_node(path: Path, x: Any) -> Node:
    if isinstance(x, Elements) and x.node.kind is Kind.MASK:
        return x.node
    raise refuse("elements in the place of a mask", "compare them: x != 0")


def is_constant(node: Node, value: float) -> bool:
    return node.op == "const" and node.data == value and math.copysign(1, node.data) == math.copysign(1, value)

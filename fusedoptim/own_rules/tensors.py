"""Symbols for tensors: the parameter, the gradient, the states, and what is worked out from them. Each stands for
whatever it was given last, since operations may be in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..rule_functions import correctly_rounded_sqrt, mean_square, norm
from .nodes import Kind, Node
from .numbers import Number, node_of
from .paths import Path
from .refusals import refuse, refuse_operation

#: Where they change nothing they return the tensor itself, or a view of it.
VIEWS = ("detach", "contiguous", "alias", "positive", "to", "type", "type_as")
#: What torch's operations do, by its names (operations.py). As methods they exist with a trailing underscore, too.
OPERATIONS: dict[str, Callable[..., Node]] = {}


class _ComputeDtype:
    """What x.dtype is: that in which a rule computes."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise refuse("a comparison of dtypes", "a rule computes in fp32 or fp64, with the same operations")

    def __repr__(self) -> str:
        return "the compute dtype"


COMPUTE_DTYPE = _ComputeDtype()


def run(path: Path, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Elements:
    out = kwargs.pop("out", None)
    try:
        result = Elements(path, OPERATIONS[name](path, *args, **kwargs))
    except TypeError as error:
        if type(error) is not TypeError:  # refused
            raise
        raise refuse(f"{name}() with these arguments ({error})") from None
    if name in VIEWS and out is None and isinstance(args[0], Elements) and result.node is args[0].node:
        return args[0]  # what is written to the one is written to the other
    return result if out is None else out._assign(result)


class Elements:
    """All elements of one tensor."""

    __hash__ = object.__hash__

    def __init__(self, path: Path, node: Node) -> None:
        self._path, self.node = path, node

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbol = next((x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Elements)), None)
        if symbol is None:  # within a list: foreach functions and others
            raise refuse_operation(getattr(function, "__name__", str(function)))
        if function in (norm, mean_square):
            return symbol._sum(function)
        name = "sqrt" if function is correctly_rounded_sqrt else getattr(function, "__name__", str(function))
        if name not in OPERATIONS:
            raise refuse_operation(name)
        return run(symbol._path, name, args, kwargs or {})

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
            return COMPUTE_DTYPE
        if name == "data":
            return self
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_path", "node"):
            object.__setattr__(self, name, value)
        elif name == "data" and isinstance(value, Elements):
            self._assign(value)
        else:
            raise refuse(f"x.{name} = ...", "write x in place: x.copy_(...)")

    def _assign(self, other: Elements) -> Elements:
        if self.node.kind is Kind.TENSOR:
            self.node = _as_tensor(self._path, other.node)
        elif other.node.kind is Kind.MASK:
            self.node = other.node
        else:
            raise refuse("numbers in the place of a mask", "x.to(g.dtype) makes ones and zeros of a mask")
        return self

    def __pos__(self) -> Elements:
        return self

    def __bool__(self) -> bool:
        raise refuse("a condition on elements", "use torch.where(mask, a, b)")

    def __float__(self) -> float:
        raise refuse_operation("item")

    __int__ = __index__ = __float__

    def __len__(self) -> int:
        raise refuse_operation("size")

    def __iter__(self) -> Any:
        raise refuse_operation("getitem")

    def __getitem__(self, index: Any) -> Any:
        raise refuse_operation("getitem")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refuse_operation("getitem")

    def __matmul__(self, other: Any) -> Any:
        raise refuse_operation("matmul")


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

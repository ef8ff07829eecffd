"""What a rule's function computes, as a graph of operations: on numbers, worked out per tensor and step in double, and
on elements, in the compute dtype. Equal operations on equal operands are one node."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .._doubles import divide, power


class Kind(Enum):
    NUMBER = "number"
    CONDITION = "condition of numbers"
    TENSOR = "tensor"
    MASK = "mask"

    @property
    def is_element(self) -> bool:
        return self in (Kind.TENSOR, Kind.MASK)


@dataclass(frozen=True, eq=False)
class Node:
    """An operation, or a leaf, on earlier nodes.

    Leaves are ``const`` (its value in ``data``), ``column`` (a number of the group: key and index), ``lr``, ``t``,
    ``number`` (a state that is one, by name), ``sum`` (which of the rule's sums of squares), ``numel`` (elements of the
    whole tensor), ``first`` (whether states count as absent); and of elements ``param``, ``grad``, ``state`` (by name).
    """

    op: str
    kind: Kind
    args: tuple[Node, ...] = field(default=(), repr=False)  # which may be as many as 2**n, written out
    data: Any = None
    #: When it was made: operands come before what they are operands of.
    order: int = 0
    #: Whether it follows from the group's values alone, the learning rate left out: schedules change that. What is too
    #: long for a guard counts as following from more, so that a step chooses by it.
    is_static: bool = False
    #: Operations of it in postfix order, and how many values they keep at once.
    length: int = 1
    height: int = 1
    #: Whether it follows from a sum over whole tensors.
    needs_sums: bool = False
    #: A number that has the arithmetic of a learning rate that is a tensor: each operation rounds to that dtype.
    of_lr: bool = False


#: The operations of conditions, and those of numbers that round nothing but their result to double.
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _fp32(x: float) -> float:
    from ..rule_functions import to_fp32

    return to_fp32(x)


ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": divide,
    "pow": power,
    "neg": operator.neg,
    "abs": abs,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "fp32": _fp32,
}
#: How far down a choice goes into operands.
DEEPEST = 100
#: Of the operations of a guard's condition; of the values that they keep (kMost in csrc/core/guard.h, which keeps two
#: more for all conditions).
LONGEST, HIGHEST = 1000, 60
_DYNAMIC_LEAVES = ("lr", "t", "number", "sum", "numel", "first")


class Graph:
    """Makes nodes, each once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}
        self._selected: dict[tuple[Node, Node, Node], Node] = {}

    def make(self, op: str, kind: Kind, *args: Node, data: Any = None, of_lr: bool = False) -> Node:
        # 0.0 and -0.0 are equal, and NaN is not equal to itself.
        key = (op, kind, tuple(map(id, args)), repr(data), of_lr)
        found = self._nodes.get(key)
        if found is None:
            static = not kind.is_element and op not in _DYNAMIC_LEAVES and all(a.is_static for a in args)
            length = 1 + sum(a.length for a in args) if static else 1
            height = max((k + a.height for k, a in enumerate(args)), default=1)
            static = static and length <= LONGEST and height <= HIGHEST
            sums = op == "sum" or any(a.needs_sums for a in args)
            found = self._nodes[key] = Node(
                op, kind, args, data, len(self._nodes), static, length, height if static else 1, sums, of_lr
            )
        return found

    def const(self, value: float) -> Node:
        return self.make("const", Kind.NUMBER, data=float(value))

    def select(self, condition: Node, yes: Node, no: Node, depth: int = 0) -> Node:
        """One of two by a condition of numbers. Where both are the same operation, it chooses operands, which are often
        numbers and cost nothing per element."""
        if yes is no:
            return yes
        key = (condition, yes, no)
        if key not in self._selected:
            self._selected[key] = self._select(condition, yes, no, depth)
        return self._selected[key]

    def _select(self, condition: Node, yes: Node, no: Node, depth: int) -> Node:
        if depth < DEEPEST and yes.op == no.op and yes.args and yes.kind == no.kind and _alike(yes, no):
            args = [self.select(condition, a, b, depth + 1) for a, b in zip(yes.args, no.args, strict=True)]
            return self.make(yes.op, yes.kind, *args, data=yes.data, of_lr=yes.of_lr)
        return self.make("choose", yes.kind, condition, yes, no, of_lr=yes.of_lr or no.of_lr)


def _alike(a: Node, b: Node) -> bool:
    """Whether choosing operands takes at most one choice of elements."""
    same = a.data == b.data and a.of_lr == b.of_lr and len(a.args) == len(b.args)
    if not same or a.op == "choose" or any(x.kind != y.kind for x, y in zip(a.args, b.args, strict=True)):
        return False
    return sum(x is not y and x.kind.is_element for x, y in zip(a.args, b.args, strict=True)) <= 1


def in_order(roots: Iterable[Node]) -> list[Node]:
    """All that these follow from, and they themselves, operands first."""
    found: dict[int, Node] = {}
    left = list(roots)
    while left:
        node = left.pop()
        if id(node) not in found:
            found[id(node)] = node
            left.extend(node.args)
    return sorted(found.values(), key=lambda node: node.order)


def value_of(node: Node, columns: Mapping[tuple[str, int], float]) -> Any:
    """The value of a static node, from a group's numbers by key and index."""
    found: dict[Node, Any] = {}
    for n in in_order([node]):
        if n.op in ("const", "column"):
            found[n] = n.data if n.op == "const" else columns[n.data]
        else:
            operation = (COMPARISONS if n.kind is Kind.CONDITION else ARITHMETIC)[n.op]
            found[n] = operation(*(found[a] for a in n.args))
    return found[node]


def postfix(node: Node, column_of: Callable[[tuple[str, int]], int]) -> Iterator[tuple[str, float]]:
    """A static node for the interpreter of csrc/core/guard.h."""
    if node.op == "const":
        yield "constant", node.data
    elif node.op == "column":
        yield "column", float(column_of(node.data))
    else:
        for a in node.args:
            yield from postfix(a, column_of)
        yield node.op, 0.0

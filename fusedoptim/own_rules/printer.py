"""What the printers of programs share: the order of things, and their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .nodes import Node, in_order
from .trace import Program


class Scalar(NamedTuple):
    """What an operation on elements takes of the numbers: a ``number``, a ``weight`` of lerp, a ``condition``."""

    kind: str
    node: Node

    @property
    def name(self) -> str:
        return f"{'w' if self.kind == 'weight' else 'n'}{self.node.order}"


#: By the operation, which of its operands that is, and of which kind.
_TAKEN = {"spread": (0, "number"), "lerp": (2, "weight"), "choose": (0, "condition")}


class Printer:
    """A name for each node, and a line that says what it is. Numbers are n1, n2, ..., elements v1, v2, ..."""

    def __init__(self, program: Program) -> None:
        self.program, rule = program, program.rule
        self.slots = {s.name: k for k, s in enumerate(rule.states)}
        self.numbers = {s.name: k for k, s in enumerate(rule.numbers)}
        self.columns = {(h.key, h.index): k for k, h in enumerate(rule.hyper)}
        self.results = [program.param, *program.new_states.values()]
        self.scalars = self.scalars_of([*self.results, *program.sums])

    def scalars_of(self, roots: Iterable[Node]) -> list[Scalar]:
        taken = [
            Scalar(_TAKEN[n.op][1], n.args[_TAKEN[n.op][0]])
            for n in in_order(roots)
            if n.kind.is_element and n.op in _TAKEN
        ]
        return list(dict.fromkeys(taken))

    def numbers_of(self, roots: Iterable[Node]) -> list[str]:
        """Lines that work out these numbers."""
        lines, powers = [], 0
        for node in in_order(roots):
            lines.append(self.number_line(node, self.number(node, powers)))
            powers += node.op == "pow"
        return lines

    def elements_of(self, roots: Iterable[Node]) -> list[str]:
        """Lines that work out these elements, from the scalars."""
        nodes = [n for n in in_order(roots) if n.kind.is_element]
        return [self.element_line(n, self.element(n)) for n in nodes]

    # ---- of a language ----

    def number_line(self, node: Node, expression: str) -> str:
        raise NotImplementedError

    def element_line(self, node: Node, expression: str) -> str:
        raise NotImplementedError

    def number(self, node: Node, use: int) -> str:
        """An expression of the names of its operands. use: how many powers came before it."""
        raise NotImplementedError

    def element(self, node: Node) -> str:
        raise NotImplementedError


def name_of(node: Node) -> str:
    return f"{'v' if node.kind.is_element else 'n'}{node.order}"


#: Operations that are an operator in C++ as in Triton.
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}

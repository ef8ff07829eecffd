"""Prints programs as what the kernels of triton_kernels take: the functions of a rule, for all of its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._rule import AROUND
from .nodes import Node
from .printer import OPERATORS, Printer, Scalar, name_of
from .trace import Program

_HEAD = '''"""Printed by fusedoptim.own_rules.triton_text."""

import triton
import triton.language as tl

from fusedoptim.triton_kernels import arithmetic as a
'''
#: Where a rule's own numbers begin in a group's row: behind lr, its dtype, and what all rules have (csrc/core/row.h).
FIRST_COLUMN = 2 + len(AROUND)
_FUNCTIONS = {"sqrt": "a.sqrt", "max": "a.maximum", "min": "a.minimum", "abs": "tl.abs", "fma": "tl.fma"}
_FUNCTIONS |= {"sign": "a.sign", "copysign": "a.copysign", "where": "tl.where", "div": "a.divide"}
_LOGIC = {"and": "&", "or": "|"}


def _constant(x: float) -> str:
    shown = f'float("{x}")' if math.isinf(x) or math.isnan(x) else repr(x)
    return f"a.double({shown})"


def _is_whole(node: Node) -> bool:
    """Whether it is a whole number that is not negative, whatever the group's values are."""
    return node.op == "t" or (node.op == "const" and node.data >= 0 and float(node.data).is_integer())


class TritonPrinter(Printer):
    def __init__(self, program: Program, variant: int) -> None:
        super().__init__(program)
        self.variant = variant

    def number_line(self, node: Node, expression: str) -> str:
        return f"{name_of(node)} = {expression}"

    element_line = number_line

    def number(self, node: Node, use: int) -> str:
        args = [name_of(x) for x in node.args]
        match node.op:
            case "const":
                return _constant(node.data)
            case "column":
                return f"a.hyper(row, {FIRST_COLUMN + self.columns[node.data]})"
            case "number":
                return f"number{self.numbers[node.data]}"
            case "sum":
                return f"sum{node.data}"
            case "t":
                return "step"
            case "numel" | "first":
                return node.op
            case "lr":
                return "a.lr_value(row)"
            case "choose":
                return f"tl.where({', '.join(args)})"
            case "pow" if node.args[1].op == "const" and node.args[1].data == 0.5:
                return f"tl.sqrt({args[0]})"
            case "pow" if _is_whole(node.args[1]):
                return f"a.power({', '.join(args)})"
            case "pow":
                return f"a.general_power({', '.join(args)})"
            case "add" | "sub" | "mul" | "div" if node.of_lr:
                return f"a.lr_{node.op}(row, {', '.join(args)})"
            case "div":
                return f"{args[0]} / {args[1]}"
            case "neg":
                return f"{args[0]} * -1.0"
            case "abs" | "sqrt":
                return f"tl.{node.op}({args[0]})"
            case "fp32":
                return f"{args[0]}.to(tl.float32).to(tl.float64)"
            case "double":
                return args[0]
        return f"{args[0]} {OPERATORS[node.op]} {args[1]}"

    def element(self, node: Node) -> str:
        args = [name_of(x) for x in node.args]
        match node.op:
            case "param" | "grad":
                return node.op[0]
            case "state":
                return f"s{self.slots[node.data]}"
            case "spread":
                return f"a.spread({args[0]}, p)"
            case "choose":
                return f"tl.where({', '.join(args)})"
            case "lerp":
                weight = Scalar("weight", node.args[2]).name
                return f"a.lerp({args[0]}, {args[1]}, {weight}, {weight}_from_start)"
            case "neg":
                return f"{args[0]} * -1.0"  # Triton's -x is 0 - x, which loses the sign of a zero
            case "not":
                return f"{args[0]} == 0"
        if node.op in _LOGIC:
            return f"{args[0]} {_LOGIC[node.op]} {args[1]}"
        if node.op in OPERATORS:
            return f"{args[0]} {OPERATORS[node.op]} {args[1]}"
        return f"{_FUNCTIONS[node.op]}({', '.join(args)})"

    # ---- functions ----

    def _names(self) -> str:
        names = [
            n for s in self.scalars for n in ([s.name, f"{s.name}_from_start"] if s.kind == "weight" else [s.name])
        ]
        return ", ".join([*names, "first"])

    def _given(self, scalar: Scalar) -> str:
        number = name_of(scalar.node)
        if scalar.kind == "weight":
            return f"{scalar.name}, {scalar.name}_from_start = a.lerp_weight({number}, T)"
        return f"{scalar.name} = {number}.to(T)" if scalar.kind == "number" else ""

    def functions(self, measured: bool) -> list[str]:
        """prepare, update, next_numbers where the rule has any, and measured if it is asked for, of this variant."""
        program, rule, k = self.program, self.program.rule, self.variant
        inputs = "step, first, sum0, sum1, number0, number1, number2, numel = inputs"
        # A number may be taken by elements and by a weight: it is converted last.
        last = sorted(filter(None, map(self._given, self.scalars)), key=lambda line: "_from_start" not in line)
        prepare = [inputs, *self.numbers_of(s.node for s in self.scalars), *last]
        states = ", ".join(f"s{i}" for i in range(3))
        new = {self.slots[n]: name_of(x) for n, x in program.new_states.items()}
        results = ", ".join(new.get(i, f"s{i}") for i in range(3))
        unpack = [f"{states} = s", f"{self._names()}{'' if self.scalars else ','} = c"]
        found = [
            _function(
                f"prepare_{k}", "row, inputs, T: tl.constexpr", prepare, self._names() + ("" if self.scalars else ",")
            ),
            _function(
                f"update_{k}",
                "p, g, s, c",
                [*unpack, *self.elements_of(self.results)],
                f"{name_of(program.param)}, ({results})",
            ),
        ]
        if rule.numbers:
            numbers = {self.numbers[n]: name_of(x) for n, x in program.new_numbers.items()}
            kept = ", ".join(numbers.get(i, f"number{i}") for i in range(3))
            lines = [inputs, *self.numbers_of(program.new_numbers.values())]
            found.append(_function(f"next_numbers_{k}", "row, inputs", lines, kept))
        if measured:
            summed = [name_of(x) for x in program.sums] + ["tl.zeros_like(g)"] * (2 - len(program.sums))
            lines = [*unpack, *self.elements_of(program.sums)]
            found.append(_function(f"measured_{k}", "p, g, s, c", lines, ", ".join(summed)))
        return found


def _function(name: str, arguments: str, lines: Sequence[str], result: str) -> str:
    body = "\n".join(f"    {line}" for line in (*lines, f"return {result}"))
    return f"\n\n@triton.jit\ndef {name}({arguments}):\n{body}\n"


def _choice(name: str, arguments: Sequence[str], variants: int) -> str:
    """Of the functions of that name, by the variant."""
    plain = ", ".join(x.partition(":")[0] for x in arguments)
    lines = []
    for k in range(variants):
        word = "if" if k == 0 else "elif" if k + 1 < variants else "else"
        test = "" if word == "else" else f" VARIANT == {k}"
        lines += [f"{word}{test}:", f"    return {name}_{k}({plain})"]
    if variants == 1:
        lines = [f"return {name}_0({plain})"]
    body = "\n".join(f"    {line}" for line in lines)
    return f"\n\n@triton.jit\ndef {name}({', '.join(arguments)}, VARIANT: tl.constexpr):\n{body}\n"


def sums_more_than_gradients(programs: Sequence[Program]) -> bool:
    """Whether a rule asks for any sum but that of the gradient, for which the kernels have a loop of their own."""
    return any([node.op for node in p.sums] != ["grad"] for p in programs if p.rule.sums)


def module(programs: Sequence[Program]) -> str:
    """The text of a module with the functions of a rule, whose variants are these programs."""
    rule = programs[0].rule
    parts = [_HEAD]
    more = sums_more_than_gradients(programs)
    for k, program in enumerate(programs):
        parts += TritonPrinter(program, k).functions(more)
    n = len(programs)
    parts.append(_choice("prepare", ["row", "inputs", "T: tl.constexpr"], n))
    parts.append(_choice("update", ["p", "g", "s", "c"], n))
    if rule.numbers:
        parts.append(_choice("next_numbers", ["row", "inputs"], n))
    if more:
        parts.append(_choice("measured", ["p", "g", "s", "c"], n))
    return "".join(parts)

"""Prints a program as a rule for the loops of csrc/cpu: the same struct that a header in csrc/rules has."""

from __future__ import annotations

import math
from typing import NamedTuple

from .nodes import Kind, Node
from .printer import OPERATORS, Printer, Scalar, name_of
from .programs import second_moment, states_mask, summed_mask
from .trace import Program

#: Of elements, as functions of the lanes, and of csrc/rules/printed.h.
_LANES = {"fma": "M::fma", "sqrt": "M::sqrt", "max": "M::max", "lerp": "lerp<M>"}
_PRINTED = ("abs", "sign", "min", "copysign", "where", "and", "or", "not")
_NUMBERS = {"neg": "-", "abs": "std::fabs", "sqrt": "std::sqrt", "fp32": "printed::fp32", "double": ""}
_TYPES = {"number": "T", "weight": "LerpWeight<T>", "condition": "bool"}


def constant(x: float) -> str:
    """With all its bits."""
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "INFINITY" if x > 0 else "(-INFINITY)"
    return f"({x.hex()})" if math.copysign(1.0, x) < 0 else x.hex()


class CppPrinter(Printer):
    def number_line(self, node: Node, expression: str) -> str:
        kind = "bool" if node.kind is Kind.CONDITION else "double"
        return f"const {kind} {name_of(node)} = {expression};"

    def element_line(self, node: Node, expression: str) -> str:
        kind = "auto" if node.kind is Kind.MASK else "typename M::V"
        return f"const {kind} {name_of(node)} = {expression};"

    def number(self, node: Node, use: int) -> str:
        args = [name_of(a) for a in node.args]
        match node.op:
            case "const":
                return constant(node.data)
            case "column":
                return f"in.hyper[kFirstRuleHyper + {self.columns[node.data]}]"
            case "number":
                return f"in.numbers[{self.numbers[node.data]}]"
            case "sum":
                return f"in.sums[{node.data}]"
            case "t":
                return "in.step"
            case "numel" | "first":
                return f"in.{node.op}"
            case "lr":
                return "lr.value"
            case "choose":
                return f"{args[0]} ? {args[1]} : {args[2]}"
            case "pow":
                return f"printed::power_of(in, {use}, {', '.join(args)})"
            case "add" | "sub" | "mul" | "div" if node.of_lr:
                return f"printed::lr_{node.op}(lr, {', '.join(args)})"
            case "div":
                return f"{args[0]} / {args[1]}"
        if node.op in OPERATORS:
            return f"{args[0]} {OPERATORS[node.op]} {args[1]}"
        return f"{_NUMBERS[node.op]}({args[0]})"

    def element(self, node: Node) -> str:
        args = [name_of(a) if a.kind.is_element else f"c.{name_of(a)}" for a in node.args]
        match node.op:
            case "param" | "grad":
                return node.op[0]
            case "state":
                return f"s[{self.slots[node.data]}]"
            case "spread":
                return f"M::set({args[0]})"
            case "choose":
                return f"{args[0]} ? {args[1]} : {args[2]}"
            case "lerp":
                args[2] = f"c.{Scalar('weight', node.args[2]).name}"
            case "neg":
                return f"-{args[0]}"
            case "div":
                return f"{args[0]} / {args[1]}"
        if node.op in OPERATORS:
            return f"{args[0]} {OPERATORS[node.op]} {args[1]}"
        function = f"printed::{node.op}_<M>" if node.op in _PRINTED else _LANES[node.op]
        return f"{function}({', '.join(args)})"

    def _given(self, scalar: Scalar) -> str:
        number = name_of(scalar.node)
        value = {"number": f"static_cast<T>({number})", "weight": f"LerpWeight<T>::of({number})"}
        return f"c.{scalar.name} = {value.get(scalar.kind, number)};"

    def rule(self) -> str:
        """The members of the struct."""
        program, rule = self.program, self.program.rule
        lr = "const Lr lr(in.hyper);"
        new_numbers = program.new_numbers
        kept = [f"out[{self.numbers[n]}] = static_cast<float>({name_of(x)});" for n, x in new_numbers.items()]
        stored = [f"s[{self.slots[n]}] = {name_of(x)};" for n, x in program.new_states.items()]
        summed = [f"x[{k}] = {name_of(x)};" for k, x in enumerate(program.sums)]
        summed += [f"x[{k}] = M::set(0);" for k in range(len(program.sums), rule.sums)]
        scalars = "const Scalars<typename M::T>& c"
        return "\n".join(
            [
                f"enum Slot {{ kSlots = {len(rule.states)} }};",
                f"enum Number {{ kNumbers = {len(rule.numbers)} }};",
                f"static constexpr int sums = {rule.sums}, second_moment = {second_moment(rule)};",
                "static constexpr bool uses(int, int slot) {",
                f"  return ({states_mask(program)}u >> slot & 1u) != 0;",
                "}",
                "template <class T>",
                "struct Scalars {",
                *(f"  {_TYPES[s.kind]} {s.name};" for s in self.scalars),
                "};",
                "template <class T>",
                "static Scalars<T> prepare(const StepInputs& in) {",
                *_indented(lr, *self.numbers_of(s.node for s in self.scalars)),
                *_indented("Scalars<T> c;", *map(self._given, self.scalars), "return c;"),
                "}",
                "static void next_numbers(const StepInputs& in, float* out) {",
                *_indented(lr, *self.numbers_of(new_numbers.values()), *kept),
                "}",
                "template <int, class M>",
                "FUSEDOPTIM_INLINE static void update(typename M::V& p, typename M::V g, typename M::V* s,",
                f"                                     {scalars}) {{",
                *_indented(*self.elements_of(self.results), *stored, f"p = {name_of(program.param)};"),
                "}",
                "static constexpr bool measures(int operand) {",
                f"  return ({summed_mask(program)}u >> operand & 1u) != 0;",
                "}",
                "template <class M>",
                "FUSEDOPTIM_INLINE static void measured(typename M::V p, typename M::V g, const typename M::V* s,",
                f"                                       {scalars}, typename M::V* x) {{",
                *_indented(*self.elements_of(program.sums), *summed),
                "}",
            ]
        )


def scalar_bytes(program: Program, wide: bool) -> int:
    """At most so many the struct of scalars has."""
    number = 8 if wide else 4
    size = {"number": number, "weight": 2 * number, "condition": number}
    return sum(size[scalar.kind] for scalar in CppPrinter(program).scalars)


class Loops(NamedTuple):
    """What a library is compiled for."""

    #: Whether it computes in fp64.
    wide: bool
    #: The storages of parameter, gradient, states and second moment that there are loops for, by their names in
    #: csrc/core/storage.h.
    mixes: tuple[tuple[str, str, str, str], ...] = ()
    #: Whether there is the loop over tiles, which takes all else.
    tiles: bool = False


def library(program: Program, loops: Loops) -> str:
    """The source of a library (csrc/cpu/own_program.h)."""
    mixes = ", ".join(f"Mix<{', '.join(f'Storage::{s}' for s in mix)}>" for mix in loops.mixes)
    members = [
        f"using Linear = MixList<{mixes}>;",
        "using Unencoded = MixList<>;",
        f"static constexpr bool kTiles = {str(loops.tiles).lower()};",
        *CppPrinter(program).rule().splitlines(),
    ]
    return "\n".join(
        [
            '#include "cpu/own_program.h"',
            '#include "rules/printed.h"',
            "namespace {",
            "using namespace fusedoptim;",
            "struct Own {",
            *_indented(*members),
            "};",
            "}  // namespace",
            f"FUSEDOPTIM_PROGRAM(Own, {'F64' if loops.wide else 'F32'})",
            "",
        ]
    )


def _indented(*lines: str) -> list[str]:
    return [f"  {line}" for line in lines]

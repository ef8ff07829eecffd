"""Prints a program as a rule for the loops of csrc/cpu: the same struct that a header in csrc/rules has."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .nodes import Kind, Node, in_order
from .trace import Program

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_SIGNS |= {"eq": "==", "ne": "!="}
#: Of elements, as functions of csrc/rules/printed.h or of the lanes.
_LANES = {"fma": "M::fma", "sqrt": "M::sqrt", "max": "M::max"}
_PRINTED = ("abs", "sign", "min", "copysign", "where", "and", "or", "not")


def number(x: float) -> str:
    """A constant with all its bits."""
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "INFINITY" if x > 0 else "(-INFINITY)"
    return f"({x.hex()})" if math.copysign(1.0, x) < 0 else x.hex()


class Printer:
    def __init__(self, program: Program) -> None:
        self.program, rule = program, program.rule
        self.slots = {s.name: k for k, s in enumerate(rule.states)}
        self.numbers = {s.name: k for k, s in enumerate(rule.numbers)}
        self.columns = {(h.key, h.index): k for k, h in enumerate(rule.hyper)}
        self.results = [program.param, *program.new_states.values()]
        elements = [n for n in in_order([*self.results, *program.sums]) if n.kind.is_element]
        #: What elements take of the numbers.
        self.scalars = list(dict.fromkeys(s for n in elements if (s := _scalar_of(n)) is not None))

    # ---- numbers ----

    def _leaf(self, node: Node) -> str | None:
        if node.op == "column":
            return f"in.hyper[kFirstRuleHyper + {self.columns[node.data]}]"
        if node.op == "number":
            return f"in.numbers[{self.numbers[node.data]}]"
        leaves = {"lr": "lr.value", "t": "in.step", "sum": f"in.sums[{node.data}]", "numel": "in.numel"}
        return "in.first" if node.op == "first" else leaves.get(node.op)

    def _number(self, node: Node, use: int) -> str:
        """An expression of numbers: what it takes has a name."""
        if node.op == "const":
            return number(node.data)
        if (leaf := self._leaf(node)) is not None:
            return leaf
        args = [f"n{a.order}" for a in node.args]
        if node.op == "choose":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if node.op == "pow":
            return f"printed::power_of(in, {use}, {', '.join(args)})"
        if node.of_lr and node.op in ("add", "sub", "mul", "div"):
            return f"printed::lr_{node.op}(lr, {', '.join(args)})"
        if node.op in _SIGNS:
            return f"{args[0]} {_SIGNS[node.op]} {args[1]}"
        functions = {"neg": "-", "abs": "std::fabs", "sqrt": "std::sqrt", "fp32": "printed::fp32", "double": ""}
        return f"{functions[node.op]}({args[0]})"

    def _numbers(self, roots: Iterable[Node]) -> list[str]:
        lines, powers = [], 0
        for node in in_order(roots):
            kind = "bool" if node.kind is Kind.CONDITION else "double"
            lines.append(f"const {kind} n{node.order} = {self._number(node, powers)};")
            powers += node.op == "pow"
        return lines

    # ---- elements ----

    def _element(self, node: Node) -> str:
        if node.op in ("param", "grad"):
            return node.op[0]
        if node.op == "state":
            return f"s[{self.slots[node.data]}]"
        if node.op == "spread":
            return f"M::set(c.n{node.args[0].order})"
        args = [f"v{a.order}" if a.kind.is_element else f"c.n{a.order}" for a in node.args]
        if node.op == "choose":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if node.op == "lerp":
            return f"lerp<M>({args[0]}, {args[1]}, c.w{node.args[2].order})"
        if node.op == "neg":
            return f"-{args[0]}"
        if node.op in _SIGNS:
            return f"{args[0]} {_SIGNS[node.op]} {args[1]}"
        name = f"printed::{node.op}_<M>" if node.op in _PRINTED else _LANES[node.op]
        return f"{name}({', '.join(args)})"

    def _elements(self, roots: Iterable[Node]) -> list[str]:
        nodes = [n for n in in_order(roots) if n.kind.is_element]
        return [
            f"const {'auto' if n.kind is Kind.MASK else 'typename M::V'} v{n.order} = {self._element(n)};"
            for n in nodes
        ]

    # ---- the rule ----

    def rule(self, name: str) -> str:
        program, rule = self.program, self.program.rule
        used = sum(1 << self.slots[s] for s in program.states)
        second = next((k for k, s in enumerate(rule.states) if s.kind == "squares"), -1)
        lr = ["const Lr lr(in.hyper);"]
        fields = [f"{_type_of(kind)} {prefix}{node.order};" for kind, prefix, node in self.scalars]
        given = [f"c.{prefix}{node.order} = {_value_of(kind, node)};" for kind, prefix, node in self.scalars]
        prepare = self._numbers(node for _, _, node in self.scalars)
        kept = [f"out[{self.numbers[n]}] = static_cast<float>(n{node.order});" for n, node in self._new_numbers()]
        update = self._elements(self.results)
        stored = [f"s[{self.slots[n]}] = v{node.order};" for n, node in program.new_states.items()]
        measured = [f"x[{k}] = v{node.order};" for k, node in enumerate(program.sums)]
        sections = [
            f"struct {name} {{",
            f'  static constexpr const char* name = "{rule.name}";' if rule.name.isidentifier() else "",
            f"  static constexpr int kSlots = {len(rule.states)}, second_moment = {second}, variants = 1;",
            f"  static constexpr int sums = {rule.sums}, numbers = {len(rule.numbers)};",
            f"  static constexpr bool uses(int, int slot) {{ return ({used}u >> slot & 1u) != 0; }}",
            "  template <class T>",
            "  struct Scalars {",
            *(f"    {line}" for line in fields),
            "  };",
            "  template <class T>",
            "  static Scalars<T> prepare(const StepInputs& in) {",
            *(f"    {line}" for line in (*lr, *prepare, "Scalars<T> c;", *given, "return c;")),
            "  }",
            "  static void next_numbers(const StepInputs& in, float* out) {",
            *(f"    {line}" for line in (*lr, *self._numbers(node for _, node in self._new_numbers()), *kept)),
            "  }",
            "  template <int, class M>",
            "  FUSEDOPTIM_INLINE static void update(typename M::V& p, typename M::V g, typename M::V* s,",
            "                                       const Scalars<typename M::T>& c) {",
            *(f"    {line}" for line in (*update, *stored, f"p = v{program.param.order};")),
            "  }",
            "  template <class M>",
            "  FUSEDOPTIM_INLINE static void measured(typename M::V p, typename M::V g, const typename M::V* s,",
            "                                         const Scalars<typename M::T>& c, typename M::V* x) {",
            *(f"    {line}" for line in (*self._elements(program.sums), *measured)),
            "  }",
        ]
        return "\n".join(line for line in sections if line)

    def _new_numbers(self) -> list[tuple[str, Node]]:
        return list(self.program.new_numbers.items())


Scalar = tuple[str, str, Node]


def _scalar_of(node: Node) -> Scalar | None:
    """What an operation on elements takes of the numbers: its kind, the prefix of its name, the number."""
    if node.op == "spread":
        return "number", "n", node.args[0]
    if node.op == "lerp":
        return "weight", "w", node.args[2]
    if node.op == "choose":
        return "condition", "n", node.args[0]
    return None


def _type_of(kind: str) -> str:
    return {"number": "T", "weight": "LerpWeight<T>", "condition": "bool"}[kind]


def _value_of(kind: str, node: Node) -> str:
    name = f"n{node.order}"
    return {"number": f"static_cast<T>({name})", "weight": f"LerpWeight<T>::of({name})", "condition": name}[kind]

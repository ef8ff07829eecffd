"""The programs of rules: made when a combination of a group's values first occurs, and kept."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from .._rule import SQUARES, Group, Reference, Rule
from .nodes import Kind, in_order, postfix
from .trace import Program, constants_of, needed, trace


def _none(*_: Any) -> None:
    pass


#: By a rule's function, and by all else of the rule: they go with the function, so none of them refers to it.
_known: weakref.WeakKeyDictionary[Reference, dict[Rule, list[Program]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def program_of(rule: Rule, group: Group) -> Program:
    """The program for a group, whose values have been checked.

    Raises:
        RuleError: for a function that cannot be traced.
    """
    without = dataclasses.replace(rule, reference=_none)
    with _lock:
        of_rule = _known.setdefault(rule.reference, {}).setdefault(without, [])
        found = next((p for p in of_rule if p.fits(group)), None)
        if found is None:
            found = dataclasses.replace(trace(rule, group), rule=without)
            of_rule.append(found)
        return found


def programs_of(rule: Rule, groups: Sequence[Group]) -> list[Program]:
    """Those of these groups, each once."""
    return list(dict.fromkeys(program_of(rule, group) for group in groups))


#: What csrc/core/guard.h knows of a group's constants, and of which states it needs, is one number.
_constants: dict[tuple[Any, ...], float] = {}


def constants_number(rule: Rule, group: Group) -> float:
    """A number for the values of a group that are none, and for the states it needs: the same for the same.

    Raises:
        RuleError: for values that can be no constants.
    """
    return _number_of(constants_of(rule, group), *needed(rule, group))


def _number_of(constants: tuple[Any, ...], states: tuple[str, ...], numbers: tuple[str, ...]) -> float:
    with _lock:
        return _constants.setdefault((constants, states, numbers), float(len(_constants)))


def guard(program: Program) -> list[tuple[str, float]]:
    """Of the rows of hyper-parameters that a program is for, as csrc/core/guard.h has it."""
    at = {(h.key, h.index): k for k, h in enumerate(program.rule.row)}

    def column(of: tuple[str, int]) -> int:
        return at[of] + 1  # behind lr comes its dtype

    found: list[tuple[str, float]] = []
    for k, (node, wanted) in enumerate(program.guards):
        found += postfix(node, column)
        found += [] if wanted else [("not", 0.0)]
        found += [("and", 0.0)] if k else []  # the stack stays low
    found += [("column", 1.0), ("constant", 0.0), ("ne" if program.lr_is_tensor else "eq", 0.0)]
    return [
        *found,
        ("constants", 0.0),
        ("constant", _number_of(program.constants, program.states, program.numbers)),
        ("eq", 0.0),
    ]


def states_mask(program: Program) -> int:
    """A bit for each state that its groups need."""
    return sum(1 << k for k, s in enumerate(program.rule.states) if s.name in program.states)


def summed_mask(program: Program) -> int:
    """A bit for each operand that a sum depends on, by OperandIndex (csrc/core/operand.h)."""
    slots = {s.name: k for k, s in enumerate(program.rule.states)}
    first = {"param": 0, "grad": 1, "state": 2}
    leaves = [n for n in in_order(program.sums) if n.op in first]
    return sum({1 << first[n.op] + (slots[n.data] if n.op == "state" else 0) for n in leaves})


def second_moment(rule: Rule) -> int:
    """The state that is one, or -1."""
    return next((k for k, s in enumerate(rule.states) if s.kind == SQUARES), -1)


def divides(programs: Sequence[Program]) -> bool:
    """Whether a rule takes roots or quotients of elements."""
    roots = [n for p in programs for n in (p.param, *p.new_states.values())]
    return any(n.op in ("div", "sqrt") and n.kind is Kind.TENSOR for n in in_order(roots))

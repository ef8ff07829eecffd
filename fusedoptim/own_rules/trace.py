"""Runs a rule's function on symbols, on every path, and makes one program of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._rule import LR, Group, Rule
from .._values import number
from . import operations  # noqa: F401 - which gives symbols their operators
from .given import GroupValues, States, traced_roots
from .nodes import Graph, Kind, Node, value_of
from .numbers import Number, node_of
from .paths import Path, explore
from .refusals import RuleError, blaming, call, first_line
from .tensors import Elements, tensor_node

Columns = Mapping[tuple[str, int], float]


@dataclass(frozen=True, eq=False)
class Program:
    """What a function computes for the groups whose values its guards hold for."""

    rule: Rule
    #: Conditions on the group's values, with what they have to be.
    guards: tuple[tuple[Node, bool], ...]
    #: The values of the rule's constants, and the names of the states that the group needs.
    constants: tuple[Any, ...]
    states: tuple[str, ...]
    numbers: tuple[str, ...]
    #: Whether the learning rate is a tensor.
    lr_is_tensor: bool
    #: New values: of the parameter, of states, of states that are numbers; and what is summed.
    param: Node
    new_states: Mapping[str, Node]
    new_numbers: Mapping[str, Node]
    sums: tuple[Node, ...]

    def fits(self, group: Group) -> bool:
        """Whether it is for a group, whose values have been checked."""
        if self.lr_is_tensor != isinstance(group[LR.key], Tensor) or self.constants != constants_of(self.rule, group):
            return False
        if (self.states, self.numbers) != needed(self.rule, group):
            return False
        columns = columns_of(self.rule, group)
        return all(bool(value_of(node, columns)) == wanted for node, wanted in self.guards)


def constants_of(rule: Rule, group: Group) -> tuple[Any, ...]:
    """What stands for the values of a group that are no numbers: equal where a function cannot tell them apart.

    Raises:
        RuleError: for values that may change within, or of which that is not known.
    """
    return tuple(_constant(key, group.get(key)) for key in rule.constants)


def _constant(key: str, value: Any) -> tuple[Any, ...]:
    """With its types: True, 1 and 1.0 are equal."""
    if type(value) is tuple:
        return (tuple, *(_constant(key, x) for x in value))
    if isinstance(value, float):
        return (type(value), value.hex())
    if value is None or isinstance(value, (str, bytes, bool, int, torch.dtype, Enum)):
        return (type(value), value)
    raise RuleError(
        f"the group's {key!r} is {value!r}: a rule's function takes numbers of a group, and as constants texts, None, "
        "dtypes, members of an Enum and tuples of such. Keep all else outside of the group, or pass "
        "backend='reference', to run it eagerly"
    )


def needed(rule: Rule, group: Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a group's states: of the parameter's shape, and those that are numbers."""
    states, numbers = ((s.name for s in all_ if s.needed_in(group)) for all_ in (rule.states, rule.numbers))
    return tuple(states), tuple(numbers)


def columns_of(rule: Rule, group: Group) -> Columns:
    """A group's numbers by key and index, but for the learning rate."""
    found = {}
    for hyper in rule.hyper:
        value = group.get(hyper.key, hyper.off)
        if value is not None:
            found[hyper.key, hyper.index] = number(value if hyper.index < 0 else value[hyper.index])
        else:
            found[hyper.key, hyper.index] = -1.0
    return found


# ---- one path, and all of them ----


@dataclass
class _Results:
    param: Node
    states: dict[str, Node]
    numbers: dict[str, Node]
    sums: list[Node] = field(default_factory=list)


def _call(rule: Rule, group: Group, path: Path) -> _Results:
    make = path.graph.make
    states, numbers = needed(rule, group)
    first = False
    absent = {s.name for s in rule.states if s.starts_absent} & {*states}
    if absent:
        first = path.decide(make("first", Kind.CONDITION))
    s = States({name: Elements(path, make("state", Kind.TENSOR, data=name)) for name in states})
    s.update({name: None for name in absent if first})
    s.update({name: Number(path, make("number", Kind.NUMBER, data=name)) for name in numbers})
    p, g = (Elements(path, make(leaf, Kind.TENSOR)) for leaf in ("param", "grad"))
    t = Number(path, make("t", Kind.NUMBER))
    function: Callable[..., Any] = rule.reference
    with blaming(function):
        try:
            result = call(function, p, g, s, t, GroupValues(path, rule, group))
        except (AttributeError, TypeError) as error:
            if not first or "None" not in str(error) or isinstance(error, RuleError):
                raise
            names = " and ".join(map(repr, sorted(absent)))
            raise RuleError(
                f"{_who(rule)} takes {names} for tensors in a step that may be a tensor's first, where they are None "
                f"({error}): ask `if s[name] is None`"
            ) from error
        return _results(rule, path, result, p, s, states, numbers)


def _results(
    rule: Rule,
    path: Path,
    result: Any,
    p: Elements,
    s: dict[str, Any],
    states: Sequence[str],
    numbers: Sequence[str],
) -> _Results:
    """Of what a function left."""
    who = _who(rule)
    if result is not None and result is not p:
        raise RuleError(f"{who} returns something: it has to write the parameter in place, as p.add_(...) does")
    results = _Results(p.node, {}, {}, path.sums)
    for name in states:
        if name not in set(s):
            raise RuleError(f"{who} removes the state {name!r}: write it in place, or set it to a tensor")
        if not isinstance(s[name], Elements):
            raise RuleError(f"{who} leaves the state {name!r} as {s[name]!r}: it has to be a tensor")
        results.states[name] = tensor_node(path, s[name])
    for name in numbers:
        if name not in set(s):
            raise RuleError(f"{who} removes {name!r}: set it to a number")
        node = node_of(path, s[name])
        if node is None:
            raise RuleError(f"{who} leaves {name!r} as {type(s[name]).__name__}: it is a number, so set it to one")
        if node.of_lr:
            raise RuleError(
                f"{who} leaves {name!r} as a tensor, as a learning rate that is one makes it: use double(lr), which is "
                "its number"
            )
        results.numbers[name] = node
    unknown = s.keys() - {*states, *numbers}
    if unknown:
        raise RuleError(f"{who} makes the states {sorted(unknown)}: name them in Rule(states=...)")
    return results


def _who(rule: Rule) -> str:
    return f"the function of rule {rule.name!r}{first_line(rule.reference)}"


def _merged(graph: Graph, paths: Sequence[tuple[Path, _Results]], depth: int = 0) -> _Results:
    """Paths that are decided alike up to a depth."""
    first, results = paths[0]
    if len(paths) == 1:
        return results
    condition = first.decisions[depth][0]
    sides = [[one for one in paths if one[0].decisions[depth][1] is value] for value in (True, False)]
    if not all(sides):
        return _merged(graph, paths, depth + 1)
    yes, no = (_merged(graph, side, depth + 1) for side in sides)

    def both(a: Mapping[str, Node], b: Mapping[str, Node]) -> dict[str, Node]:
        return {name: graph.select(condition, a[name], b[name]) for name in a}

    n = min(len(yes.sums), len(no.sums))  # a sum that one side does not ask for may be anything there
    sums = [graph.select(condition, a, b) for a, b in zip(yes.sums[:n], no.sums[:n], strict=True)]
    longer = yes.sums if len(yes.sums) > n else no.sums
    return _Results(
        graph.select(condition, yes.param, no.param),
        both(yes.states, no.states),
        both(yes.numbers, no.numbers),
        [*sums, *longer[n:]],
    )


def trace(rule: Rule, group: Group) -> Program:
    """The program of a group.

    Raises:
        RuleError: for a function that cannot be traced.
    """
    graph, found = Graph(), []
    guards: dict[Node, bool] = {}
    results: list[_Results] = []
    with traced_roots():
        for path in explore(graph, columns_of(rule, group), lambda path: results.append(_call(rule, group, path))):
            found.append((path, results.pop()))
            guards.update(path.guards)
    merged = _merged(graph, found)
    if merged.param.op == "param":
        raise RuleError(f"{_who(rule)} changes no parameter: it has to write p in place, as p.add_(...) does")
    if len(merged.sums) > rule.sums:
        raise RuleError(
            f"{_who(rule)} calls norm() or mean_square() {len(merged.sums)} times: say so with "
            f"Rule(sums={len(merged.sums)})"
        )
    for node in merged.sums:
        if node.needs_sums:
            raise RuleError(f"{_who(rule)} sums what depends on another sum")
    states, numbers = needed(rule, group)
    return Program(
        rule,
        tuple(guards.items()),
        constants_of(rule, group),
        states,
        numbers,
        isinstance(group[LR.key], Tensor),
        merged.param,
        merged.states,
        merged.numbers,
        tuple(merged.sums),
    )

"""Runs a rule's function on symbols, on every path, and makes one program of what it computes."""

from __future__ import annotations

import builtins
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._rule import LR, Group, Hyper, Rule
from .._values import number
from . import operations  # noqa: F401 - which gives symbols their operators
from .nodes import Graph, Kind, Node, value_of
from .numbers import Condition, Number, node_of
from .paths import Path, explore
from .refusals import RuleError, blaming, call, first_line, refuse
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


# ---- what the function gets ----


class _States(dict[str, Any]):
    """Says what there is, where a function asks for another."""

    def __contains__(self, name: object) -> bool:
        raise refuse("the question whether there is a state", "ask for the group's value that says so, or `is None`")

    def get(self, name: str, default: Any = None) -> Any:
        return name in self

    def __missing__(self, name: str) -> Any:
        raise refuse(
            f"the state {name!r}, which the rule does not declare for this group,", f"it has {', '.join(self)}"
        )


class _Group(Mapping[str, Any]):
    """A group's values as symbols."""

    def __init__(self, path: Path, rule: Rule, group: Group) -> None:
        self._there = {*group, *rule.constants}
        self._values: dict[str, Any] = {key: group.get(key) for key in rule.constants}
        self._path, self._optional = path, {h.key: h for h in rule.hyper if h.optional and h.index < 0}
        for hyper in rule.hyper:
            if group.get(hyper.key, hyper.off) is None:
                self._values[hyper.key] = None
            elif hyper.index < 0:
                self._values[hyper.key] = _column(path, hyper.key, -1)
            else:
                self._values[hyper.key] = tuple(_column(path, hyper.key, i) for i in range(hyper.count))
        lr_is_tensor = isinstance(group[LR.key], Tensor)
        self._values[LR.key] = Number(path, path.graph.make("lr", Kind.NUMBER, of_lr=lr_is_tensor))

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise refuse(f"the group's {key!r}", f"a function can read {', '.join(map(repr, self._values))}")
        if key in self._optional:
            _decide_whether_off(self._path, self._optional[key], self._values[key] is None)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._there

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._there else default

    def __iter__(self) -> Iterator[str]:
        raise refuse("a loop over a group's keys", f"a function can read {', '.join(map(repr, self._values))}")

    def __len__(self) -> int:
        return len([*self])


def _decide_whether_off(path: Path, hyper: Hyper, is_off: bool) -> None:
    """A row has -1 for None."""
    if is_off and hyper.off_number != -1.0:
        raise RuleError(f"the group's {hyper.key!r} is None, and Hyper({hyper.key!r}, ...) does not say off=None")
    if hyper.off_number == -1.0:
        if -1.0 in hyper.accepts:
            raise RuleError(
                f"the group's {hyper.key!r} may be None, which -1 stands for, and -1: let "
                f"Hyper({hyper.key!r}, accepts=...) leave that out"
            )
        column = path.graph.make("column", Kind.NUMBER, data=(hyper.key, -1))
        path.decide(path.graph.make("eq", Kind.CONDITION, column, path.graph.const(-1.0)))


def _column(path: Path, key: str, index: int) -> Number:
    return Number(path, path.graph.make("column", Kind.NUMBER, data=(key, index)))


_patching = threading.Lock()


def _stands_for(x: Any) -> type | None:
    """What a function gets in a symbol's place where it is not traced; None for what is no symbol."""
    kind = type(x)
    if kind is Elements or (kind is Number and x.node.of_lr):
        return Tensor
    return float if kind is Number else bool if kind is Condition else None


@contextmanager
def _traced_builtins() -> Iterator[None]:
    """math.sqrt takes nothing but a float, and isinstance() knows no symbol: for as long as a function is traced, they
    do. A symbol's __class__ must not be Tensor: torch's C++ code asks for that, and takes it for one."""
    with _patching:
        sqrt, is_instance = math.sqrt, isinstance

        def is_or_stands_for(x: Any, of: Any) -> bool:
            what = _stands_for(x)
            return is_instance(x, of) or (what is not None and issubclass(what, of))

        math.sqrt = lambda x: x.sqrt() if type(x) is Number else sqrt(x)  # type: ignore
        builtins.isinstance = is_or_stands_for
        try:
            yield
        finally:
            math.sqrt, builtins.isinstance = sqrt, is_instance


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
    s = _States({name: Elements(path, make("state", Kind.TENSOR, data=name)) for name in states})
    s.update({name: None for name in absent if first})
    s.update({name: Number(path, make("number", Kind.NUMBER, data=name)) for name in numbers})
    p, g = (Elements(path, make(leaf, Kind.TENSOR)) for leaf in ("param", "grad"))
    t = Number(path, make("t", Kind.NUMBER))
    function: Callable[..., Any] = rule.reference
    with blaming(function):
        try:
            result = call(function, p, g, s, t, _Group(path, rule, group))
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
    with _traced_builtins():
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

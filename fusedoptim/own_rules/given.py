"""What a rule's function gets for the duration of a trace: its states, a group's values, and roots of symbols."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._rule import LR, Group, Hyper, Rule
from .nodes import Kind
from .numbers import Number
from .paths import Path
from .refusals import RuleError, refuse


class States(dict[str, Any]):
    """Says what there is, where a function asks for another."""

    def __contains__(self, name: object) -> bool:
        raise refuse("the question whether there is a state", "ask for the group's value that says so, or `is None`")

    def get(self, name: str, default: Any = None) -> Any:
        return name in self

    def __missing__(self, name: str) -> Any:
        raise refuse(
            f"the state {name!r}, which the rule does not declare for this group,", f"it has {', '.join(self)}"
        )


class GroupValues(Mapping[str, Any]):
    """A group's values as symbols."""

    def __init__(self, path: Path, rule: Rule, group: Group) -> None:
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
        self._check_known(key)
        if key in self._optional:
            _decide_whether_off(self._path, self._optional[key], self._values[key] is None)
        return self._values[key]

    def _check_known(self, key: object) -> None:
        """Whether a group has another key is not known from one step to the next, so it is not to be asked either."""
        if key not in self._values:
            raise refuse(f"the group's {key!r}", f"a function can read {', '.join(map(repr, self._values))}")

    def __contains__(self, key: object) -> bool:
        self._check_known(key)
        return True

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]

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


@contextmanager
def traced_roots() -> Iterator[None]:
    """math.sqrt takes nothing but a float: for as long as a function is traced, it takes symbols."""
    with _patching:
        sqrt = math.sqrt
        math.sqrt = lambda x: x.sqrt() if isinstance(x, Number) else sqrt(x)  # type: ignore
        try:
            yield
        finally:
            math.sqrt = sqrt

"""The ways through a rule's function: conditions on the group's values choose one, those on numbers that change from
step to step, or from tensor to tensor, make it two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .nodes import Graph, Node, value_of
from .refusals import RuleError

#: Of one function, for one combination of a group's values.
MOST = 64


class Path:
    """One way through a function.

    Args:
        known: how the first conditions on changing numbers are decided; later ones are true.
        columns: the group's numbers, which decide all other conditions.
    """

    def __init__(self, graph: Graph, known: list[bool], columns: Mapping[tuple[str, int], float]) -> None:
        self.graph, self.columns = graph, columns
        self._known = known
        #: Conditions on changing numbers, in the order in which they were met, with what was decided.
        self.decisions: list[tuple[Node, bool]] = []
        #: Those on the group's values.
        self.guards: dict[Node, bool] = {}
        #: What sums of squares are asked for, in order.
        self.sums: list[Node] = []

    def decide(self, condition: Node) -> bool:
        if condition.is_static:
            return self.guards.setdefault(condition, bool(value_of(condition, self.columns)))
        for decided, value in self.decisions:
            if decided is condition:
                return value
        at = len(self.decisions)
        if at == MOST:
            raise too_many_ways()
        value = self._known[at] if at < len(self._known) else True
        self.decisions.append((condition, value))
        return value

    @property
    def depends_on_sums(self) -> bool:
        return any(condition.needs_sums for condition, _ in self.decisions)


def explore(graph: Graph, columns: Mapping[tuple[str, int], float], run: Callable[[Path], None]) -> Iterator[Path]:
    """Runs a function on every path, one after another."""
    known: list[bool] = []
    for _ in range(MOST):
        path = Path(graph, known, columns)
        run(path)
        yield path
        known = [value for _, value in path.decisions]
        while known and not known[-1]:
            known.pop()
        if not known:
            return
        known[-1] = False
    raise too_many_ways()


def too_many_ways() -> RuleError:
    return RuleError(
        f"a rule's function has more than {MOST} ways by its conditions on t, lr, norms and states that are numbers: "
        "use fewer of them, no loop until one holds, or torch.where. Or pass backend='reference', to run it eagerly"
    )

"""Agents as a Markdown table: a line per contender, over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..common.units import duration
from ..lowprec.table import spread
from ..measure.results import Result
from ..tables import header, line
from .contenders import OURS, WITNESS


def of(agents: Sequence[Result], contender: str) -> list[Result]:
    return [agent for agent in agents if agent["contender"] == contender]


def contenders(agents: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(agent["contender"] for agent in agents))


def _same(found: Sequence[Result]) -> str:
    """For how many updates losses had the bits of fusedoptim's, over seeds."""
    if all(agent["first_difference"] is None for agent in found):
        return f"all {found[0]['updates']}"
    first = [agent["updates"] if (n := agent["first_difference"]) is None else n for agent in found]
    return f"{min(first)} to {max(first)}" if min(first) < max(first) else str(first[0])


def table(agents: Sequence[Result]) -> str:
    """No times of the witness: its root is made of many operations."""
    names = ["RMSprop", "mean return", "with the likelier action", "clip + step", "share", "same losses"]
    lines = header(names, 1)
    for name in contenders(agents):
        found = of(agents, name)
        returns = [spread([agent[key] for agent in found]) for key in ("return", "evaluation")]
        timed = ["", ""]
        if name != WITNESS:
            us = statistics.median(agent["optimizer_us"] for agent in found)
            timed = [duration(us * 1e-6), f"{statistics.median(agent['share'] for agent in found):.1%}"]
        lines.append(line([name, *returns, *timed, "" if name == OURS else _same(found)]))
    return "\n".join(lines)

"""How times are taken: interleaved, in one process, so that what slows the machine down slows everything down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def interleaved(
    calls: dict[str, Callable[[], object]], budget: float, at_least: int = 7, at_most: int = 201
) -> dict[str, Times]:
    """Calls each in turn, A B C A B C ..., after three rounds that do not count, for about ``budget`` seconds."""
    for _ in range(3):
        for call in calls.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < at_least or (rounds < at_most and time.perf_counter() < end):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Times(seconds) for name, seconds in taken.items()}


def ratio(of: Times, to: Times) -> float:
    """How many times as long the one took as the other: the median over rounds, each of which ran under one weather."""
    return statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True))

"""How times are taken: interleaved, in one process, so that what slows the machine down slows everything down."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .devices import Call, Device, Sample

#: Slow is what takes so many times as long as the fastest, the limits included.
SLOW = 5


@dataclass(frozen=True)
class Budget:
    """Rounds go on for ``seconds``, but there are at least and at most so many; ``without_slow`` is the least number of
    rounds for those that are not slow, once the slow ones have stopped. ``row_seconds`` after fusedoptim's warm-up no
    further peer warms up, and the first round is the last."""

    seconds: float
    at_least: int = 5
    without_slow: int = 5
    at_most: int = 101
    row_seconds: float = math.inf


@dataclass(frozen=True)
class Contender:
    """``prepare`` makes ready for the call and is not timed; it gets the number of the call, counted from 0."""

    call: Call
    prepare: Callable[[int], None] = lambda number: None
    #: Takes part in every round; another one stops when it has had its share of the time, after enough rounds.
    throughout: bool = False


class Times:
    """Samples by round."""

    def __init__(self) -> None:
        self.rounds: dict[int, Sample] = {}
        self.error: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [s.seconds for s in self.rounds.values()]

    @property
    def host(self) -> list[float]:
        return [s.host for s in self.rounds.values()]


def interleaved(
    contenders: Mapping[str, Contender],
    device: Device,
    budget: Budget,
    evict: bool = True,
    first_number: int = 0,
    row_end: float = math.inf,
) -> dict[str, Times]:
    """Calls each in turn, in an order that is drawn anew for every round, so that nobody always follows the same one.

    Caches are evicted before every call, or filled by another call that is not timed. One that raises takes no further
    part; its error is kept. No round but the first begins after ``row_end``, of ``time.perf_counter()``. Python's
    garbage collector runs between rounds.
    """
    taken = {name: Times() for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    order, draw = list(contenders), random.Random(0)
    end = time.perf_counter() + budget.seconds
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(budget.at_most):
            if number > 0 and time.perf_counter() >= row_end:
                break
            if number >= budget.at_least:
                share = budget.seconds / len(contenders)
                swift = SLOW * min(spent.values()) if number < budget.without_slow else 0.0
                order = [n for n in order if contenders[n].throughout or spent[n] < max(share, swift)]
                if time.perf_counter() >= end and number >= budget.without_slow:
                    break
            draw.shuffle(order)
            for name in tuple(order):
                begun = time.perf_counter()
                try:
                    contenders[name].prepare(first_number + number)
                    if evict:
                        device.evict()
                    else:
                        contenders[name].call()
                    taken[name].rounds[number] = device.timed(contenders[name].call)
                except Exception as error:
                    taken[name].error = explain(error)
                    order.remove(name)
                spent[name] += time.perf_counter() - begun
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return taken


def explain(error: BaseException) -> str:
    """An error on one line, of a length that fits a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantiles, and the number of values, which must not be 0."""
    ordered = sorted(values)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"median": statistics.median(ordered), "q20": at(0.2), "q80": at(0.8), "n": len(ordered)}


def ratios(of: Times, to: Times) -> list[float]:
    """How many times as long the one took as the other, in each round that both took part in, under one weather."""
    return [of.rounds[r].seconds / to.rounds[r].seconds for r in of.rounds.keys() & to.rounds.keys()]

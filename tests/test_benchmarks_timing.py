"""How times are taken, and what is computed from them."""

from __future__ import annotations

import gc
import statistics
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.measure import scaling
from benchmarks.measure.devices import Cpu, Sample, device_events
from benchmarks.measure.results import COPY, OURS
from benchmarks.measure.timing import Budget, Contender, Times, interleaved, quantiles, ratios


class Clock:
    """A device whose calls take the seconds that they return."""

    name = "cpu"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def evict(self) -> None:
        self.calls.append("evict")

    def timed(self, call: Callable[[], Any]) -> Sample:
        name, seconds = call()
        self.calls.append(name)
        return Sample(seconds, seconds / 2)


def test_calls_are_interleaved_with_an_eviction_before_each() -> None:
    clock, prepared = Clock(), []
    contenders = {
        name: Contender(lambda n=name: (n, 1.0), lambda number, n=name: prepared.append((n, number)), throughout=True)
        for name in "abc"
    }
    times = interleaved(contenders, clock, Budget(60.0, at_most=40), first_number=3)
    assert clock.calls[::2] == ["evict"] * 120
    rounds = [tuple(clock.calls[i + 1 : i + 6 : 2]) for i in range(0, 240, 6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3, "the order never changes"
    assert {n for _, n in prepared} == set(range(3, 43))
    assert all(len(t.seconds) == 40 for t in times.values())
    clock.calls.clear()
    interleaved(contenders, clock, Budget(60.0, at_most=5), evict=False)
    assert "evict" not in clock.calls


def test_at_least_five_rounds_and_no_more_than_the_budget() -> None:
    contenders = {"a": Contender(lambda: ("a", 1.0), throughout=True)}
    assert len(interleaved(contenders, Clock(), Budget(0.0))["a"].seconds) == 5
    assert len(interleaved(contenders, Clock(), Budget(60.0, at_most=9))["a"].seconds) == 9


def test_one_that_raises_leaves_and_the_others_go_on() -> None:
    raised = []

    def bad() -> tuple[str, float]:
        if len(clock.calls) > 6:
            raised.append(1)
            raise ValueError("enough\nof this")
        return "bad", 1.0

    clock = Clock()
    contenders = {"good": Contender(lambda: ("good", 1.0), throughout=True), "bad": Contender(bad, throughout=True)}
    times = interleaved(contenders, clock, Budget(60.0, at_most=20))
    assert times["bad"].error == "ValueError: enough" and len(times["bad"].seconds) < 5
    assert times["good"].error is None and len(times["good"].seconds) == 20 and len(raised) == 1
    assert gc.isenabled()


def test_quantiles_and_ratios() -> None:
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q20": 2.0, "q80": 5.0, "n": 5}
    assert quantiles([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0, "n": 1}
    a, b = Times(), Times()
    for number, (x, y) in enumerate([(2.0, 1.0), (30.0, 10.0), (8.0, 2.0)]):
        a.rounds[number], b.rounds[number] = Sample(x, x), Sample(y, y)
    b.rounds[3] = Sample(9.0, 9.0)  # the other one was not there
    assert sorted(ratios(a, b)) == [2.0, 3.0, 4.0]
    # of medians it would be 4
    assert statistics.median(ratios(a, b)) == 3.0 != quantiles(a.seconds)["median"] / 2.0


def test_slope_of_a_curve() -> None:
    assert scaling.slope([(1, 2.0), (2, 2.5), (4, 3.5)]) == pytest.approx(0.5)
    assert scaling.slope([(1, 2.0), (2, 2.5)]) is None
    rows_ = [
        {
            "curve": "tensors",
            "over": "tensors",
            "tensors": n,
            "contenders": {OURS: {"ms": {"median": 1 + 3e-6 * n}}, COPY: {"ms": {"median": 1.0}}},
        }
        for n in (1, 100, 10_000)
    ]
    [(curve, name, what, seconds)] = scaling.slopes(rows_)
    assert (curve, name, what) == ("tensors", OURS, "tensor") and seconds == pytest.approx(3e-9)


def test_curves_vary_one_thing() -> None:
    tensors, elements = scaling.curves("cpu")
    assert len({c.elements for c in tensors.cases}) == 1 and len({len(c.shapes) for c in tensors.cases}) > 4
    assert len({len(c.shapes) for c in elements.cases}) == 1 and len({c.elements for c in elements.cases}) > 4


def test_a_profilers_events_are_counted() -> None:
    cuda, cpu = torch._C._autograd.DeviceType.CUDA, torch._C._autograd.DeviceType.CPU

    def event(name: str, where: object = cuda, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=where, is_user_annotation=note)

    events = [
        event("step_kernel"),
        event("step_kernel"),
        event("norm_step_kernel"),
        event("Memcpy HtoD (Pinned -> Device)"),
        event("Memset (Device)"),
        event("cudaLaunchKernel", cpu),
        event("Optimizer.step#AdamW.step", note=True),
    ]
    assert device_events(events) == {"launches": 3, "copies": 2}


def test_memory_of_cycles_is_given_back_between_rows() -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    gone = weakref.ref(node)
    gc.disable()
    try:
        del node
        Cpu().release()
        assert gone() is None
    finally:
        gc.enable()

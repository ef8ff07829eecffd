"""Contenders of one row that are in memory at the same time: fusedoptim, some peers, the limits of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import limits
from .check import complaint, difference
from .data import Data, Params, sample
from .devices import Call, Device
from .optimizers import Work
from .peers import PEERS, Groups, Peer, ours
from .plan import Row
from .results import COPY, OURS, STREAM, Result
from .timing import Budget, Contender, Times, explain, interleaved, quantiles, ratios

WARM_UP = 3


class Entrant:
    """An optimizer on parameters of its own that has made its first steps."""

    def __init__(self, row: Row, data: Data, make: Callable[[Work, Groups], Any]) -> None:
        self._give = data.renew_gradients if row.condition.renew else data.give_gradients
        self.params: Params = data.parameters()
        self.optimizer = make(row.work, data.groups(self.params, row.work.setting.options["lr"]))
        start = time.perf_counter()
        for number in range(WARM_UP):
            self.prepare(number)
            self.optimizer.step()
            if number == 0:
                #: States are created in the first step, and compilers run.
                self.first_step = time.perf_counter() - start

    def prepare(self, number: int) -> None:
        self._give(self.params, number)

    def step(self) -> object:
        return self.optimizer.step()


def excuse(error: Exception) -> Result:
    """What there is instead of times. A lack of memory is no failure."""
    text = str(error).lower()
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
    lacking = lacking or "out of memory" in text or "allocate memory" in text
    return {"skipped" if lacking else "failed": explain(error)}


class Contest:
    def __init__(self, row: Row, device: Device, peers: Sequence[Peer], budget: Budget) -> None:
        self.row, self.device, self.peers, self.budget = row, device, peers, budget
        self.end = math.inf
        self.results: dict[str, Result] = {}
        self.bytes = {OURS: int(row.case.elements * row.work.bytes_per_element)}

    def run(self) -> dict[str, Result]:
        row = self.row
        data = Data(row.case, row.work.dtypes.param, self.device.torch_device, row.gradient_sets)
        entrants = self._entrants(data)
        contenders = {n: Contender(e.step, e.prepare, throughout=n == OURS) for n, e in entrants.items()}
        contenders |= {n: Contender(call, throughout=True) for n, call in self._limits().items()}
        times = interleaved(contenders, self.device, self.budget, self.row.condition.evict, WARM_UP, self.end)
        for name, entrant in entrants.items():
            if times[name].error is None and not all(part.isfinite().all() for part in sample(entrant.params)):
                times[name].error = "parameters are not finite after the measurement"
        for name, t in times.items():
            self._summarise(name, t, times)
        entrants = {n: e for n, e in entrants.items() if "ms" in self.results[n]}
        for name, entrant in entrants.items():
            self._details(name, entrant, WARM_UP + self.budget.at_most)
        self._graphs(entrants)
        return self.results

    def _entrants(self, data: Data) -> dict[str, Entrant]:
        """Those that made the first steps, and as they should. fusedoptim comes first, and has to."""
        mine = Entrant(self.row, data, ours)
        start, now = sample(data.parameters()), sample(mine.params)
        wrong = complaint(self.row.work, mine.params, mine.optimizer, start, now, same_formula=True)
        if wrong is not None:
            raise RuntimeError(f"fusedoptim: {wrong}")
        self.results[OURS] = {"first_step_s": mine.first_step}
        self.end = time.perf_counter() + self.budget.row_seconds
        entrants = {OURS: mine}
        for peer in self.peers:
            if time.perf_counter() >= self.end:
                self.results[peer.name] = {"skipped": f"the row's {self.budget.row_seconds:g} s were up"}
                continue
            try:
                entrant = Entrant(self.row, data, peer.make)
            except Exception as error:
                self.results[peer.name] = excuse(error)
                continue
            formula = peer.differs.get(self.row.work.setting.name)
            wrong = complaint(self.row.work, entrant.params, entrant.optimizer, start, now, formula is None)
            if wrong is not None:
                self.results[peer.name] = {"failed": wrong}
                continue
            agrees = {"formula": formula} if formula else {"difference": difference(now, sample(entrant.params), start)}
            self.results[peer.name] = {"first_step_s": entrant.first_step, **agrees}
            entrants[peer.name] = entrant
        return entrants

    def _limits(self) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        makers: dict[str, Callable[[], limits.Limit]] = {
            COPY: lambda: limits.copy(self.device),
            STREAM: lambda: limits.stream(self.device, self.row.work, self.row.case.elements),
        }
        for name, make in makers.items():
            try:
                limit = make()
                limit.call()
            except Exception as error:
                self.results[name] = {"failed": explain(error)}
                continue
            self.results[name] = {}
            calls[name], self.bytes[name] = limit.call, limit.bytes
        return calls

    def _summarise(self, name: str, t: Times, times: dict[str, Times]) -> None:
        result = self.results[name]
        if t.error is not None:
            result["failed"] = t.error
            return
        moved = self.bytes.get(name, self.bytes[OURS])
        result["ms"] = {k: v * 1e3 if k != "n" else v for k, v in quantiles(t.seconds).items()}
        result["gb_s"] = moved / quantiles(t.seconds)["median"] * 1e-9
        if self.device.name != "cpu":
            result["host_ms"] = quantiles(t.host)["median"] * 1e3
        if name not in (OURS, COPY, STREAM):
            #: How many times as long as fusedoptim.
            result["ratio"] = quantiles(ratios(t, times[OURS]))
        for limit in (COPY, STREAM):
            if limit in times and times[limit].error is None and name not in (COPY, STREAM):
                scale = moved / self.bytes[limit]
                shares = [scale * r for r in ratios(times[limit], t)]
                result[f"share_of_{limit}"] = quantiles(shares)["median"]

    def _details(self, name: str, entrant: Entrant, number: int) -> None:
        def step() -> None:
            entrant.prepare(number)
            entrant.step()

        try:
            self.results[name].update(self.device.details(step))
        except Exception as error:
            self.results[name]["details"] = explain(error)

    def _graphs(self, entrants: dict[str, Entrant]) -> None:
        """Times of what can be captured in a graph, replayed."""
        replays: dict[str, Contender] = {}
        for name, entrant in entrants.items():
            if name != OURS and not PEERS[name].capturable:
                continue
            for group in entrant.optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = True
            try:
                replay = self.device.graph(entrant.step)
            except Exception as error:
                self.results[name]["graph_problem"] = explain(error)
                continue
            if replay is not None:
                replays[name] = Contender(replay, throughout=True)
        if not replays:
            return
        times = interleaved(replays, self.device, self.budget, self.row.condition.evict, row_end=self.end)
        for name, t in times.items():
            if t.error is None:
                self.results[name]["graph_ms"] = quantiles(t.seconds)["median"] * 1e3
            else:
                self.results[name]["graph_problem"] = t.error

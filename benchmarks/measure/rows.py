"""Measures one row: an optimizer in certain dtypes on a case, beside its peers and the limits of the machine."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import limits
from .cases import Case
from .check import complaint, difference
from .data import Data, Params, sample
from .devices import Call, Device
from .load import Others
from .optimizers import Work
from .peers import PEERS, Groups, Peer, ours
from .results import COPY, OURS, STREAM, Result
from .timing import Budget, Contender, Times, explain, interleaved, quantiles, ratios

WARM_UP = 3
#: Of the free memory; the rest is for what peers need beside their states, and for other processes.
MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class Condition:
    """What happens between two steps."""

    name: str
    says: str
    renew: bool = False
    evict: bool = True


CONDITIONS = {
    c.name: c
    for c in (
        Condition("kept", "gradients kept, caches evicted before every call"),
        Condition("recreated", "gradients set to None and created anew, caches evicted before every call", renew=True),
        Condition("warm", "gradients kept, a step that is not timed right before", evict=False),
    )
}


@dataclass(frozen=True)
class Row:
    work: Work
    case: Case
    condition: Condition

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.work.setting.name, self.work.dtypes.name, self.case.name, self.condition.name)

    def describe(self) -> Result:
        optimizer, dtype, case, condition = self.key
        return {
            "optimizer": optimizer,
            "dtype": dtype,
            "case": case,
            "condition": condition,
            "tensors": len(self.case.shapes),
            "groups": self.case.groups,
            "elements": self.case.elements,
            "bytes": self.case.elements * self.work.bytes_per_element,
        }


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


def measure(row: Row, device: Device, peers: Sequence[Peer], budget: Budget) -> Result:
    """The row's result. What could not be measured is in it with the reason; only an interrupt gets out of here."""
    result = row.describe()
    contenders: dict[str, Result] = {}
    able = []
    for peer in peers:
        problem = peer.problem(row.work, row.case, device.name)
        if problem is None:
            able.append(peer)
        else:
            contenders[peer.name] = {"skipped": problem}
    try:
        if row.condition.name == "warm" and not _fits_cache(row, device):
            return {**result, "skipped": f"does not fit half the caches of {device.cache_bytes() >> 20} MiB"}
        device.release()
        batches, too_large = _batches(row, device, able)
        contenders.update({name: {"skipped": "does not fit the memory beside fusedoptim"} for name in too_large})
        others = Others()
        for batch in batches:
            measured = _Batch(row, device, batch, budget).run()
            for name, value in measured.items():
                contenders.setdefault(name, value)
            _forget_compiled()
            device.release()
    except NoRoom as error:
        return {**result, "skipped": str(error)}
    except Exception as error:
        kind = "skipped" if is_out_of_memory(error) else "failed"
        return {**result, kind: explain(error)}
    result["others_cores"] = others.cores()
    order = [OURS, *(p.name for p in peers), COPY, STREAM]
    return {**result, "contenders": {n: contenders[n] for n in order if n in contenders}}


class NoRoom(Exception):
    """The case does not fit the memory."""


def _forget_compiled() -> None:
    """Compiled steps hold on to their parameters."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text
    )


def _fits_cache(row: Row, device: Device) -> bool:
    resident = row.work.resident_per_element + row.work.dtypes.param.itemsize
    return row.case.elements * resident <= device.cache_bytes() // 2


def _batches(row: Row, device: Device, peers: Iterable[Peer]) -> tuple[list[list[Peer]], list[str]]:
    """Peers that fit the memory together, always beside fusedoptim, and the names of those that never do."""
    elements, size = row.case.elements, row.work.dtypes.param.itemsize
    resident = elements * row.work.resident_per_element
    sets = 2 if row.condition.renew else 1
    fixed = sets * elements * size + resident + limits.memory(device, row.work)
    free = int(device.memory_free() * MEMORY_SHARE)
    if fixed > free:
        raise NoRoom(f"needs {fixed / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are free")
    batches: list[list[Peer]] = [[]]
    too_large, left = [], free - fixed
    for peer in peers:
        need = resident + peer.temporary * elements * size
        if need > free - fixed:
            too_large.append(peer.name)
            continue
        if need > left:
            batches.append([])
            left = free - fixed
        batches[-1].append(peer)
        left -= need
    return batches, too_large


class _Batch:
    """fusedoptim, some peers and the limits, in memory at the same time."""

    def __init__(self, row: Row, device: Device, peers: Sequence[Peer], budget: Budget) -> None:
        self.row, self.device, self.peers, self.budget = row, device, peers, budget
        self.end = math.inf
        self.results: dict[str, Result] = {}
        self.bytes = {OURS: row.case.elements * row.work.bytes_per_element}

    def run(self) -> dict[str, Result]:
        sets = 2 if self.row.condition.renew else 1
        data = Data(self.row.case, self.row.work.dtypes.param, self.device.torch_device, sets)
        entrants = self._entrants(data)
        contenders = {n: Contender(e.step, e.prepare, throughout=n == OURS) for n, e in entrants.items()}
        contenders |= {n: Contender(call, throughout=True) for n, call in self._limits().items()}
        times = interleaved(contenders, self.device, self.budget, self.row.condition.evict, WARM_UP, self.end)
        for name, entrant in entrants.items():
            if times[name].error is None and not all(part.isfinite().all() for part in sample(entrant.params)):
                times[name].error = "parameters are not finite after the measurement"
        for name, t in times.items():
            self._summarise(name, t, times)
        for name, entrant in entrants.items():
            if "ms" in self.results[name]:
                self._details(name, entrant, WARM_UP + self.budget.at_most)
        self._graphs({n: e for n, e in entrants.items() if "ms" in self.results[n]})
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
                kind = "skipped" if is_out_of_memory(error) else "failed"
                self.results[peer.name] = {kind: explain(error)}
                continue
            formula = peer.differs.get(self.row.work.setting.name)
            wrong = complaint(self.row.work, entrant.params, entrant.optimizer, start, now, formula is None)
            if wrong is not None:
                self.results[peer.name] = {"failed": wrong}
                continue
            self.results[peer.name] = {
                "first_step_s": entrant.first_step,
                **self._agreement(entrant, start, now, formula),
            }
            entrants[peer.name] = entrant
        return entrants

    def _agreement(self, entrant: Entrant, start: list[Tensor], mine: list[Tensor], formula: str | None) -> Result:
        if formula is not None:
            return {"formula": formula}
        return {"difference": difference(mine, sample(entrant.params), start)}

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

"""Measures one row: an optimizer in certain dtypes on a case, beside its peers and the limits of the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch

from . import limits
from .contest import Contest, excuse
from .devices import Device
from .load import Others
from .peers import Peer
from .plan import Row
from .results import COPY, OURS, STREAM, Result
from .timing import Budget

#: Of the free memory; the rest is for what peers need beside their states, and for other processes.
MEMORY_SHARE = 0.85


class NoRoom(Exception):
    """The case does not fit the memory."""


def measure(row: Row, device: Device, peers: Sequence[Peer], budget: Budget) -> Result:
    """The row's result. What could not be measured is in it with the reason; only an interrupt gets out of here."""
    result = row.describe()
    problems = {p.name: p.problem(row.work, row.case, device.name) for p in peers}
    contenders: dict[str, Result] = {name: {"skipped": why} for name, why in problems.items() if why is not None}
    able = [p for p in peers if problems[p.name] is None]
    try:
        if row.condition.name == "warm" and not _fits_cache(row, device):
            return {**result, "skipped": f"does not fit half the caches of {device.cache_bytes() >> 20} MiB"}
        device.release()
        batches, too_large = _batches(row, device, able)
        contenders.update({name: {"skipped": "does not fit the memory beside fusedoptim"} for name in too_large})
        others = Others()
        for batch in batches:
            contenders = Contest(row, device, batch, budget).run() | contenders  # of several times the first
            _forget_compiled()
            device.release()
    except NoRoom as error:
        return {**result, "skipped": str(error)}
    except Exception as error:
        return {**result, **excuse(error)}
    result["others_cores"] = others.cores()
    order = [OURS, *(p.name for p in peers), COPY, STREAM]
    return {**result, "contenders": {n: contenders[n] for n in order if n in contenders}}


def _forget_compiled() -> None:
    """Compiled steps hold on to their parameters."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _fits_cache(row: Row, device: Device) -> bool:
    resident = row.work.resident_per_element + row.work.dtypes.param.itemsize
    return row.case.elements * resident <= device.cache_bytes() // 2


def _batches(row: Row, device: Device, peers: Iterable[Peer]) -> tuple[list[list[Peer]], list[str]]:
    """Peers that fit the memory together, always beside fusedoptim, and the names of those that never do."""
    elements, size = row.case.elements, row.work.dtypes.param.itemsize
    resident = int(elements * row.work.resident_per_element)
    fixed = row.gradient_sets * elements * size + resident + limits.memory(device, row.work)
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

"""How many bytes an optimizer's tensors take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._dtensor import local
from ._states import HasStates, StateMaker
from ._storage import state_names


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory. Printed, a table.

    Memory that several tensors share, as the views of one buffer do, is counted once and whole, where it comes first
    below; so is a buffer of which one tensor is a small part.

    Attributes:
        parameters: of all groups.
        gradients: of these, as far as there are any now.
        states: by name, as in ``optimizer.state``.
        to_come: by name, the states that parameters which require a gradient lack so far, and get in their first step
            with one.
        elements: of the parameters, on this process.
    """

    parameters: int
    gradients: int
    states: dict[str, int]
    to_come: dict[str, int]
    elements: int = 0

    @property
    def total(self) -> int:
        """What there is now."""
        return self.parameters + self.gradients + sum(self.states.values())

    @property
    def rows(self) -> dict[str, int]:
        """What is printed: parameters, gradients, each state, their total, and what is to come."""
        rows = {"parameters": self.parameters, "gradients": self.gradients, **self.states, "total": self.total}
        return rows | {f"{name} (to come)": size for name, size in self.to_come.items()}

    @property
    def per_element(self) -> dict[str, float]:
        """The same, in bytes for each element of the parameters, as in ``params + states = 2 + 6 bytes``."""
        return {name: size / self.elements if self.elements else 0.0 for name, size in self.rows.items()}

    def __str__(self) -> str:
        rows, per_element = self.rows, self.per_element
        width = max(map(len, rows))
        return "\n".join(
            f"{name:<{width}} {_readable(size):>12} {per_element[name]:>8.2f} B/element" for name, size in rows.items()
        )


def measure(optimizer: HasStates) -> Footprint:
    """See :meth:`FusedOptimizer.memory`."""
    counted: set[int] = set()

    def size(tensors: Iterable[Tensor]) -> int:
        total = 0
        for t in tensors:
            for part in _parts(t):
                storage = part.untyped_storage()
                if storage._cdata not in counted and part.device.type != "meta":
                    counted.add(storage._cdata)
                    total += storage.nbytes()
        return total

    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_name: dict[str, list[Tensor]] = {name: [] for name in state_names(optimizer.rule)}
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor):
                by_name.setdefault(name, []).append(value)
    return Footprint(
        parameters=size(params),
        gradients=size(p.grad for p in params if not is_lazy(p) and p.grad is not None),
        states={name: size(tensors) for name, tensors in by_name.items() if tensors},
        to_come=_to_come(optimizer),
        elements=sum(local(p).numel() for p in params if not is_lazy(p)),
    )


def _parts(t: Tensor) -> Iterator[Tensor]:
    """The tensors in whose memory this one is."""
    if is_lazy(t):
        return
    if is_traceable_wrapper_subclass(t):
        for inner in (getattr(t, name) for name in t.__tensor_flatten__()[0]):
            if isinstance(inner, Tensor):  # a DTensor's mesh is none
                yield from _parts(inner)
    elif t.layout == torch.strided:
        yield t
    elif t.layout == torch.sparse_coo:
        yield from (t._indices(), t._values())
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (t.crow_indices(), t.col_indices(), t.values())
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (t.ccol_indices(), t.row_indices(), t.values())


def _to_come(optimizer: HasStates) -> dict[str, int]:
    """The sizes of states made for tensors like the parameters, but without memory."""
    maker = StateMaker.of(optimizer)
    sizes: defaultdict[str, int] = defaultdict(int)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if not p.requires_grad or is_lazy(p) or p.layout != torch.strided:
                    continue
                own = local(p)
                like = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta")
                for name, value in maker.missing(group, p, optimizer.state.get(p, {}), like):
                    sizes[name] += sum(part.untyped_storage().nbytes() for part in _parts(value))
    return dict(sizes)


def _readable(size: float) -> str:
    """As 1.50 GiB."""
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.2f} {unit}"
    return f"{size / 1024:.2f} TiB"

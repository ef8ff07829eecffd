"""The collectives that a piece of code asks for: their kinds, how many ranks take part, how many bytes each has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, REDUCE, SCATTER = "all-gather", "all-reduce", "reduce-scatter"
#: Methods of process groups, which the functions of torch.distributed call; versions of torch lack some.
METHODS = {
    "allgather": GATHER,
    "_allgather_base": GATHER,
    "all_gather_single": GATHER,
    "allgather_into_tensor_coalesced": GATHER,
    "allreduce": REDUCE,
    "allreduce_coalesced": REDUCE,
    "reduce_scatter": SCATTER,
    "_reduce_scatter_base": SCATTER,
    "reduce_scatter_single": SCATTER,
    "broadcast": "broadcast",
    "gather": "gather",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
}
#: Operators by which DTensors ask for them, which call a process group from C++.
OPERATORS = {"all_gather_into_tensor": GATHER, "all_reduce": REDUCE, "reduce_scatter_tensor": SCATTER}


@dataclass(frozen=True)
class Collective:
    """``bytes`` is what each of the ``ranks`` puts in."""

    kind: str
    ranks: int
    bytes: int


def _sent(args: Any) -> int:
    """Bytes of the last tensors among the arguments, behind those for what is received."""
    for a in reversed(args):
        if isinstance(a, Tensor):
            return a.numel() * a.element_size()
        if isinstance(a, list | tuple) and any(isinstance(x, Tensor) for x in a):
            return sum(map(_sent, ((x,) for x in a)))
    return 0


class _Functional(TorchDispatchMode):
    """Notes what DTensors ask for."""

    def __init__(self, found: list[Collective]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again for the shards
        library, _, name = func._schema.name.partition("::")
        if library == "_c10d_functional" and isinstance(group := args[-1], str):  # others wait or wrap
            ranks = dist.distributed_c10d._resolve_process_group(group).size()
            self.found.append(Collective(OPERATORS.get(name, name), ranks, _sent(args)))
        return func(*args, **(kwargs or {}))


def _noting(found: list[Collective], kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(Collective(kind, group.size(), _sent(args)))
        return method(group, *args, **kwargs)

    return call


@contextmanager
def collectives(of_dtensors: bool = False) -> Iterator[list[Collective]]:
    """A list that grows by every collective within. With ``of_dtensors`` also by those of operators on DTensors; a
    dispatch mode watches for them, which makes code take other ways than usual."""
    found: list[Collective] = []
    with ExitStack() as stack:
        for name, kind in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                method = getattr(dist.ProcessGroup, name)
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, _noting(found, kind, method)))
        if of_dtensors:
            stack.enter_context(_Functional(found))
        yield found

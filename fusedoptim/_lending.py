"""States that are a state_dict's own tensors until the first step: whether nobody else holds them, so that they can be
lent, and what becomes of them."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._dtensor import is_dtensor

#: Bytes; see is_large.
WORTH_LENDING = 1 << 14


class Lent(NamedTuple):
    """States of a parameter that are a state_dict's tensors."""

    #: In a list, so that one can count who holds it.
    entry: list[dict[str, Any]]
    names: set[str]


def held_alone(items: Any, key: Any) -> bool:
    """Whether nothing but this container holds an item: no variable, no other container; and, for a tensor, no autograd
    graph, no view of its memory and nobody its storage."""
    if sys.getrefcount(items[key]) > _ALONE:
        return False
    value = items[key]
    if not isinstance(value, Tensor):
        return True
    return type(value) is Tensor and value.layout == torch.strided and _uses_of(value) == _uses_of_one()


_ITEM = {0: object()}
#: What CPython counts for such a value, asked for as above: versions differ.
_ALONE = sys.getrefcount(_ITEM[0])


def _uses_of(t: Tensor) -> tuple[int, int]:
    """How many tensors use a tensor's memory, and how many variables hold its storage, with torch's own references."""
    storage = t.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


@functools.cache
def _uses_of_one() -> tuple[int, int]:
    return _uses_of(torch.empty(1, device="cpu"))


def is_large(value: Any) -> bool:
    """From 16 KiB on it costs less to ask who holds a tensor, 1.5 us, than to copy it."""
    return type(value) is Tensor and value.layout == torch.strided and value.nbytes >= WORTH_LENDING


def can_be_lent(saved: Tensor, p: Tensor) -> bool:
    """Whether a state_dict's tensor is as a copy of it would be, so that it can be the state itself. A state_dict that
    is still there at the first step gets a copy then (see :func:`take_over`); one that was let go of is loaded without
    a second copy of the states."""
    return bool(
        type(saved) is Tensor
        and not is_dtensor(p)
        and not saved.requires_grad
        and not saved.is_inference()
        and saved.device == p.device
        and not is_lazy(p)
        and saved.shape == p.shape
        and saved.stride() == p.stride()
        and saved.storage_offset() == 0
        and saved.untyped_storage().nbytes() == saved.numel() * saved.element_size()
        and _is_torchs(saved.untyped_storage())
    )


def _is_torchs(storage: torch.UntypedStorage) -> bool:
    """Whether its memory is of torch's allocators, and not NumPy's, a file's or anybody's who may still use it.

    ``torch.load`` makes storages that cannot be resized, as ``torch.from_numpy`` does. Within the storage, beside the
    memory's address, is what is to be freed: that very address for memory of the CPU's allocator, another object
    otherwise. If torch's storages look different one day, the address is found once, and states are copied.
    """
    if storage.resizable():
        return True
    words = (ctypes.c_size_t * 8).from_address(storage._cdata)
    return storage.device.type == "cpu" and list(words).count(storage.data_ptr()) == 2


def take_over(lent: dict[Tensor, Lent], state: dict[Any, Any]) -> None:
    """Before a step writes: where somebody still has the state_dict, its tensors become copies. The states stay the
    objects that they are. ``state`` may have some of the parameters."""
    for p in [p for p in lent if p in state]:
        entry, names = lent.pop(p)
        values = state[p]
        if held_alone(entry, 0) or not isinstance(values, dict):
            continue
        for name in names & values.keys():
            if entry[0].get(name) is values[name]:
                entry[0][name] = values[name].clone(memory_format=torch.preserve_format)

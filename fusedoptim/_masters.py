"""The fp32 numbers that 16-bit parameters stand for, and the states that keep what these lack of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._dtensor import alike, is_dtensor, local
from ._rule import Group
from ._storage import DTYPES_OF_MASTERS, MASTER, MASTERS, Stored, needs, stored_param


def new_master(name: str, p: Tensor) -> Tensor:
    """The state under this name of a parameter that is its number exactly."""
    if name == MASTER:
        return p.detach().to(torch.float32, copy=True, memory_format=torch.preserve_format)
    return torch.zeros_like(p, dtype=DTYPES_OF_MASTERS[name], memory_format=torch.preserve_format, requires_grad=False)


def stored_as(p: Tensor, values: Mapping[str, Any]) -> Stored | None:
    """How a parameter is stored that has one of these states."""
    for master, name in MASTERS.items():
        if isinstance(values.get(name), Tensor) and needs(name, p):
            return stored_param({"master": master}, p)
    return None


def number_of(p: Tensor, values: Mapping[str, Any], how: Stored | None) -> Tensor:
    """The fp32 number, contiguous: of this process's shard."""
    if how is None or how.extra is None:
        return local(p).detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return reference.decode(how.storage, local(p).detach(), local(values[how.extra]))


def converted(group: Group, p: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the master that a group asks for, where there is one of another kind, or in another memory order
    than the parameter's."""
    master = group.get("master")
    if master is None or not needs(MASTERS[master], p):
        return {}
    name = MASTERS[master]
    there = values.get(name)
    if isinstance(there, Tensor):
        if (
            there.shape != p.shape
            or local(there).stride() == local(p).stride()
            or there.dtype != DTYPES_OF_MASTERS[name]
        ):
            return {}
        return {name: _placed(p, local(there), there.dtype)}
    before = stored_as(p, values)
    how = stored_param(group, p)
    if before is None or how is None or values[before.extra or ""].shape != p.shape:
        return {}
    _, extra = reference.encode(how.storage, number_of(p, values, before), None)
    assert extra is not None
    return {name: _placed(p, extra, extra.dtype)}


def _placed(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """As the parameter lies."""
    own = torch.empty_like(local(p), dtype=dtype, requires_grad=False).copy_(value)
    return alike(p, own) if is_dtensor(p) else own

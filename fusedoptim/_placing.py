"""States of a checkpoint and where they belong: on the ranks that their parameter lies on, shard by shard."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ._dtensor import alike, is_dtensor, local, same_layout, wrapped


def check_place(p: Tensor, value: Any, name: str, who: str) -> None:
    """Whether a saved state can be placed as its parameter is.

    Raises:
        ValueError: if only somebody who knows how it was saved can tell.
    """
    by_dcp = "or load through torch.distributed.checkpoint, which places states as parameters are. Nothing was loaded"
    if is_dtensor(value) and not is_dtensor(p):
        raise ValueError(
            f"state {name!r} of {who} is a DTensor, which the parameter is not: load its full_tensor(), a collective "
            f"that every rank calls, {by_dcp}"
        )
    if not is_dtensor(p) or not isinstance(value, Tensor):
        return
    if is_dtensor(value) and not _on_the_same_ranks(p, value):
        raise ValueError(
            f"state {name!r} of {who} lies on the ranks {_ranks(value)}, the parameter on {_ranks(p)}: load its "
            f"full_tensor(), which the former call, {by_dcp}"
        )
    if not is_dtensor(value) and value.shape != p.shape and value.shape == local(p).shape:
        raise ValueError(
            f"state {name!r} of {who} is a plain tensor with the shape of this rank's shard, {tuple(value.shape)}: "
            f"load a DTensor or the whole tensor, {by_dcp}"
        )


def fits_in_place(p: Tensor, value: Tensor, shape: torch.Size) -> bool:
    """Whether :func:`placed` can be asked for a state that has to have this shape."""
    if value.shape != shape or value.layout != torch.strided:
        return False
    return not is_dtensor(value) or (is_dtensor(p) and _on_the_same_ranks(p, value))


def placed(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a state, placed as its parameter is, in its memory order and on its device. One of another shape, which
    is that of scales, is contiguous.

    Of a whole tensor every rank takes its part. A DTensor that is placed otherwise is redistributed: a collective, so
    that all ranks must load alike.
    """
    part = part_of(p, value)
    if value.shape != p.shape:
        own = torch.empty(part.shape, dtype=dtype, device=local(p).device).copy_(part)
        return wrapped(p, own, value.shape)
    own = torch.empty_like(local(p), dtype=dtype, requires_grad=False).copy_(part)
    return alike(p, own) if is_dtensor(p) else own


@torch.no_grad()
def part_of(p: Any, value: Any) -> Tensor:
    """This rank's shard of a state; it may lie in the state's own memory."""
    if not is_dtensor(p):
        return value  # type: ignore[no-any-return]
    mesh = p.device_mesh
    if is_dtensor(value):
        if same_layout(p, value):
            return local(value)
        if value.device.type != mesh.device_type:  # it was saved from the CPU, where a mesh of GPUs cannot send it from
            value = value.to(mesh.device_type)
        if value.device_mesh == mesh:
            return local(value.redistribute(mesh, p.placements))
        value = value.full_tensor()
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return local(distribute(value.detach(), mesh, p.placements, src_data_rank=None))


def _on_the_same_ranks(p: Any, value: Any) -> bool:
    return p.device_mesh == value.device_mesh or _ranks(p) == _ranks(value)


def _ranks(t: Any) -> list[int]:
    return sorted(t.device_mesh.mesh.flatten().tolist())

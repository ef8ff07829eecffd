"""DTensors, as FSDP2 (``fully_shard``) and tensor parallelism make them: their shards, and how these are placed.

Groups, gradients and ``optimizer.state`` hold DTensors; kernels and tables see the shards of this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dtensor_class() -> Any:
    """None for as long as nobody has imported it, so that there is none: that takes half a second, and torch does not
    do it by itself."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(t: object) -> bool:
    cls = dtensor_class()
    return cls is not None and isinstance(t, cls)


def local(t: Tensor) -> Tensor:
    """The shard of this process; a plain tensor is its own. ``to_local()``, which autograd sees, takes 9 us, this
    0.1."""
    if not is_dtensor(t):
        return t
    shard: Tensor | None = getattr(t, "_local_tensor", None)  # private
    return t.to_local() if shard is None else shard  # type: ignore[attr-defined]


def hides_shard(t: Tensor) -> bool:
    """Whether this is a DTensor of a torch that keeps its shard elsewhere, so that no table can follow it."""
    return is_dtensor(t) and getattr(t, "_local_tensor", None) is None


def same_layout(a: Any, b: Any) -> bool:
    """Whether two DTensors of one shape have their elements on the same ranks, in the same order."""
    of_a, of_b = getattr(a, "_spec", None), getattr(b, "_spec", None)  # private
    if of_a is of_b and of_a is not None:  # as those of FSDP2
        return True
    if a.placements != b.placements or a.device_mesh != b.device_mesh:
        return False
    # Of several mesh dimensions that shard one dimension; absent before it could be chosen.
    return bool(getattr(of_a, "shard_order", None) == getattr(of_b, "shard_order", None))


def has_shape_and_layout(a: Any, b: Any) -> bool:
    """Of two DTensors."""
    return bool(a.shape == b.shape) and same_layout(a, b)


def has_no_partial(p: Any) -> bool:
    """Whether a DTensor has its numbers, and no sum of them that is still to be made."""
    return not any(placement.is_partial() for placement in p.placements)


def same_placements(a: Any, b: Any) -> bool:
    """The same of DTensors of different shapes, by what they say."""
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh)


def aligned(p: Any, g: Any) -> Any:
    """A parameter's gradient, with its placements. Others are redistributed, a collective that every rank takes part
    in: norms of a sequence-parallel model have gradients that are ``Partial`` and parameters that are ``Replicate``.
    None if it cannot be: of another shape, or on another mesh."""
    if not is_dtensor(g) or g.shape != p.shape or g.device_mesh != p.device_mesh:
        return None
    if not same_layout(p, g):
        with torch.no_grad():
            g = g.redistribute(p.device_mesh, p.placements)
    shard = local(g)
    wait = getattr(shard, "wait", None)  # of an AsyncCollectiveTensor, which is still on its way
    if wait is not None:
        shard = wait()
    if shard.is_neg():  # lazily, which memory does not show
        shard = shard.resolve_neg()
    return g if shard is local(g) else alike(p, shard)


def alike(p: Any, shard: Tensor) -> Any:
    """A DTensor of this shard, placed as ``p`` is."""
    with torch.no_grad():
        return dtensor_class().from_local(
            shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )


def whole(t: Tensor) -> Tensor:
    """A plain tensor with all elements: all ranks have to ask for it."""
    return t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def wrapped(p: Any, shard: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape with this shard, placed as ``p`` is; plain if that is plain."""
    if not is_dtensor(p):
        return shard
    with torch.no_grad():
        made: Tensor = dtensor_class().from_local(
            shard, p.device_mesh, p.placements, run_check=False, shape=shape, stride=row_major(shape)
        )
    return made

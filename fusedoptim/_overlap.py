"""Finds tensors that share memory. The tensors of a step are updated side by side, in no order."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def _extent(t: Tensor) -> int:
    """How many elements of its storage a tensor spans."""
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(t.shape, t.stride(), strict=True))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of a strided tensor lie at one place."""
    if t.is_contiguous() or t.numel() == 0:
        return False
    reach = 0  # how far the dimensions so far go, the innermost first
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride == 0:
            return True
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    # Number the elements in a map of the memory: where two lie at one place, a number is lost.
    numbers = torch.arange(t.numel(), device="cpu").view(t.shape)
    places = torch.empty(_extent(t), dtype=torch.int64, device="cpu").as_strided(t.shape, t.stride())
    return not torch.equal(places.copy_(numbers), numbers)


def sharing(tensors: Iterable[Tensor]) -> tuple[int, int] | None:
    """The positions of two tensors that have memory in common, or None. No tensor may overlap itself.

    What counts is the address, not the storage: two of ``torch.from_numpy`` may lie in one array. Costs about a
    microsecond per tensor where, as usual, each has memory or a range of it for itself. For ranges that intersect, as
    those of interleaved views do, a map of the memory decides.
    """
    by_device: dict[torch.device, list[tuple[int, int, int, Tensor]]] = {}
    for i, t in enumerate(tensors):
        if t.numel() == 0 or t.device.type == "meta":
            continue
        begin = t.data_ptr()
        by_device.setdefault(t.device, []).append((begin, begin + _extent(t) * t.element_size(), i, t))
    for ranges in by_device.values():
        ranges.sort(key=lambda r: r[:3])
        cluster: list[tuple[int, Tensor]] = []  # neighbours whose ranges intersect
        end = 0
        for begin, stop, i, t in ranges:
            if begin >= end:
                if (found := _in_common(cluster)) is not None:
                    return found
                cluster = []
            cluster.append((i, t))
            end = max(end, stop)
        if (found := _in_common(cluster)) is not None:
            return found
    return None


def _in_common(views: list[tuple[int, Tensor]]) -> tuple[int, int] | None:
    """The numbers of two of these numbered views of one range of memory that have some in common, or None."""
    if len(views) < 2:
        return None
    first = min(t.data_ptr() for _, t in views)
    last = max(t.data_ptr() + _extent(t) * t.element_size() for _, t in views)
    unit = math.gcd(*(x for _, t in views for x in (t.element_size(), t.data_ptr() - first)))
    owners = torch.full(((last - first) // unit,), -1, dtype=torch.int32, device="cpu")
    for k, (i, t) in enumerate(views):
        n = t.element_size() // unit
        strides = [stride * n for stride in t.stride()]
        own = owners.as_strided((*t.shape, n), (*strides, 1), (t.data_ptr() - first) // unit)
        taken = int(own.max())
        if taken >= 0:
            return views[taken][0], i
        own.fill_(k)
    return None

"""The plain pass of stream.c for a GPU. A module of its own, because it needs Triton to be imported."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _stream(p, g, a, b, n, states: tl.constexpr, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < n
    w = tl.load(g + i, inside)
    tl.store(p + i, tl.load(p + i, inside) + w, inside)
    if states > 0:
        tl.store(a + i, tl.load(a + i, inside) + w, inside)
    if states > 1:
        tl.store(b + i, tl.load(b + i, inside) + w, inside)


def stream(written: list[Tensor], gradient: Tensor, n: int) -> None:
    """Adds the gradient, as integers, to the parameter and to up to two states."""
    integers = [t.view(torch.int16 if t.dtype.itemsize == 2 else torch.int32) for t in (*written, gradient)]
    p, *states = integers[:-1]
    a, b = (*states, p, p)[:2]
    _stream[(triton.cdiv(n, BLOCK),)](p, integers[-1], a, b, n, len(states), BLOCK, num_warps=8)

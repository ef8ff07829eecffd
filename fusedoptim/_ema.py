"""The moving averages of the parameters, in the parameters' place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def in_place_of(params: list[Tensor], averages: list[Tensor]) -> Iterator[None]:
    """Within it the parameters have the averages' values, rounded to their dtype. Values are copied, so that addresses
    stay; it takes memory for a copy of the parameters."""
    with torch.no_grad():
        own = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            torch._foreach_copy_(params, averages)
        yield
    finally:
        with torch.no_grad():
            try:
                torch._foreach_copy_(params, own)
            except RuntimeError:  # of one that was resized meanwhile: the others are to be restored
                for p, value in zip(params, own, strict=True):
                    if p.shape == value.shape:
                        p.copy_(value)
                raise

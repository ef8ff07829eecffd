"""torch.optim as the witness of the numerical contract: its own for-loop code, with an IEEE square root.

torch's square root on the CPU is MKL's, which is off by one unit in the last place for a fifth of all fp32 values.
Every other operation of the for-loop code is what the contract says, so for the time of a step that one is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fusedoptim.reference import correctly_rounded_sqrt

_sqrt, _sqrt_ = Tensor.sqrt, Tensor.sqrt_


@contextmanager
def _original_sqrt() -> Iterator[None]:
    patched = Tensor.sqrt
    Tensor.sqrt = _sqrt  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.sqrt = patched  # type: ignore[method-assign]


@contextmanager
def ieee_sqrt() -> Iterator[None]:
    """Within it, ``Tensor.sqrt`` and ``sqrt_`` round correctly."""

    def sqrt(x: Tensor) -> Tensor:
        with _original_sqrt():
            return correctly_rounded_sqrt(x)

    def sqrt_(x: Tensor) -> Tensor:
        return x.copy_(sqrt(x))

    Tensor.sqrt, Tensor.sqrt_ = sqrt, sqrt_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.sqrt, Tensor.sqrt_ = _sqrt, _sqrt_  # type: ignore[method-assign]


def witness_step(optimizer: torch.optim.Optimizer) -> None:
    """Steps with a correctly rounded square root."""
    with ieee_sqrt():
        optimizer.step()

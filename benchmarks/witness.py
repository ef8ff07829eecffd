"""torch.optim as the witness of the numerical contract: its own for-loop code, with an IEEE square root.

torch's square root on the CPU is MKL's, which is off by one unit in the last place for a fifth of all fp32 values.
Every other operation of the for-loop code is what the contract says, so for the time of a step that one is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fusedoptim._dtensor import alike, is_dtensor, local
from fusedoptim.reference import correctly_rounded_sqrt

Root = Callable[[Tensor], Tensor]
_sqrt, _sqrt_ = Tensor.sqrt, Tensor.sqrt_


@contextmanager
def _with(sqrt: Root, sqrt_: Root) -> Iterator[None]:
    before = Tensor.sqrt, Tensor.sqrt_
    Tensor.sqrt, Tensor.sqrt_ = sqrt, sqrt_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.sqrt, Tensor.sqrt_ = before  # type: ignore[method-assign]


def _rounded(x: Tensor) -> Tensor:
    """Of a DTensor, its shard's."""
    if is_dtensor(x):
        return alike(x, _rounded(local(x)))
    with _with(_sqrt, _sqrt_):  # which this is made of
        return correctly_rounded_sqrt(x)


def ieee_sqrt() -> AbstractContextManager[None]:
    """Within it, ``Tensor.sqrt`` and ``sqrt_`` round correctly."""
    return _with(_rounded, lambda x: x.copy_(_rounded(x)))


def witness_step(optimizer: torch.optim.Optimizer) -> None:
    """Steps with a correctly rounded square root."""
    with ieee_sqrt():
        optimizer.step()

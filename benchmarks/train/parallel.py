"""Training in several processes, which ``torchrun`` starts: each takes its part of every batch.

Without ``torchrun`` each function here is that of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import UsageError


def launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _rank() == 0


def say(*values: Any, **options: Any) -> None:
    if is_first():
        print(*values, **options)


def check(batch: int) -> None:
    """Parts of different sizes would weigh differently in the mean of the gradients."""
    if batch % world():
        raise UsageError(f"a batch of {batch} must be a multiple of the number of processes, {world()}")


@contextmanager
def joined() -> Iterator[None]:
    """Within it, this process belongs to torchrun's group, or to the one that its caller has made."""
    if not launched() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")  # models are trained on the CPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def part(batch: Tensor) -> Tensor:
    return batch.chunk(world())[_rank()]


def mean(value: float) -> float:
    """The mean over the processes: the same number in each."""
    if not launched():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world()

"""What tests of steps within DistributedDataParallel's backward pass share: models, with parameters that are used or
not, and their losses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SMALL = {"bucket_cap_mb": 1e-4}  # a bucket has a few parameters


class Branches(nn.Module):
    """One layer is used twice; of the others some are used in every pass, by one process, by none, or never."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.twice, self.last = (nn.Linear(*n, dtype=dtype) for n in ((6, 17), (17, 17), (17, 1)))
            self.some, self.never = nn.Linear(17, 17, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
            self.frozen = nn.Linear(2, 2, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor, with_some: bool) -> Tensor:
        x = self.twice(self.twice(self.first(x).tanh()))
        return self.last(self.some(x) if with_some else x)


class Plain(nn.Sequential):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(*(nn.Linear(*n, dtype=dtype) for n in ((6, 17), (17, 3), (3, 1))))

    def forward(self, x: Tensor, with_some: bool) -> Tensor:
        return super().forward(x)


def uses_some(step: int, static: bool) -> bool:
    """By both processes, by one, by the other, by none."""
    return static or step % 4 == 0 or step % 4 == 1 + dist.get_rank()


def losses(model: nn.Module, step: int, passes: int, static: bool = False) -> list[Tensor]:
    """The last in a list of functions is that whose pass exchanges gradients."""
    found = []
    for i in range(passes):
        generator = torch.Generator().manual_seed(100 * step + 10 * i + dist.get_rank())
        dtype = next(model.parameters()).dtype
        x = torch.randn(5, 6, generator=generator, dtype=torch.float32).to(dtype)
        inner = i < passes - 1
        with model.no_sync() if inner else nullcontext():
            loss = model(x, uses_some(step, static)).square().mean()
            if inner:
                loss.backward()
        found.append(loss)
    return found


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in model.parameters() for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*model.parameters(), *states]]

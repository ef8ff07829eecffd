"""What the tests of other people's training loops share: a tiny model, its two groups and its batches."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

WIDTH = 6


def make_model(seed: int = 0) -> nn.Sequential:
    """Sizes that are no multiple of a vector, and a parameter of one element."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 17), nn.Tanh(), nn.Linear(17, 1))


def two_groups(model: nn.Sequential, case: Case) -> list[dict[str, Any]]:
    """Two groups, of which the first has another learning rate than the case's own."""
    head = [p for n, p in model.named_parameters() if n.startswith("0.")]
    tail = [p for n, p in model.named_parameters() if not n.startswith("0.")]
    return [{"params": head, "lr": 0.003}, {"params": tail}]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, WIDTH, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

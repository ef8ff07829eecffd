"""What tests of whatever surrounds a step share: torch's AdamW and this package's, and hooks that note their calls."""

from __future__ import annotations

import pytest
import torch
from cases import parameters, set_gradients

import fusedoptim

Class = type[torch.optim.Optimizer]
both = pytest.mark.parametrize("cls", [torch.optim.AdamW, fusedoptim.AdamW], ids=["torch", "fusedoptim"])


def make(cls: Class, steps: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = parameters([(5,), (2, 3)])
    optimizer = cls(params)
    set_gradients(params, 0)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def count(optimizer: torch.optim.Optimizer) -> list[str]:
    """A list that grows with every call of a hook before or after the step."""
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    return calls

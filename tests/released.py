"""What tests of steps within the backward pass share: a loss with chosen gradients, and both ways to step."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, assert_same_bits, gradient, parameters

import fusedoptim
from fusedoptim import step_in_backward

Params = list[torch.nn.Parameter]
SHAPES = [(5,), (3, 4), (1025,), (), (0,), (17,), (6,)]
#: Of SHAPES: used twice in the graph, left out of it in every other pass, never in it, frozen.
TWICE, SOMETIMES, NEVER, FROZEN = 1, 2, 5, 6


def loss_of(params: Params, step: int) -> torch.Tensor:
    """Its gradients are :func:`cases.gradient`'s, and a sum of two for the parameter that is used twice."""
    total = torch.zeros(())
    for i, p in enumerate(params):
        if i == NEVER or (i == SOMETIMES and step % 2):
            continue
        total = total + (p * gradient(p, step, i)).sum()
        if i == TWICE:
            total = total + (p * gradient(p, step + 100, i)).sum()
    return total


def in_groups(params: Params) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:4], "lr": 0.02}, {"params": params[4:], "weight_decay": 0.3}]


def make(case: Case, **more: Any) -> tuple[Params, fusedoptim.FusedOptimizer]:
    params = parameters(SHAPES)
    params[FROZEN].requires_grad_(False)
    return params, case.make(in_groups(params), **more)


def ordinary(o: torch.optim.Optimizer, params: Params, step: int) -> None:
    loss_of(params, step).backward()
    o.step()
    o.zero_grad()


def released(params: Params, step: int) -> None:
    loss_of(params, step).backward()
    assert all(p.grad is None for p in params)


def both_ways(one: Params, a: fusedoptim.FusedOptimizer, two: Params, b: fusedoptim.FusedOptimizer, steps: int) -> None:
    """Steps the first in the backward pass, the second after it."""
    step_in_backward(a)
    for step in range(steps):
        released(one, step)
        ordinary(b, two, step)


def assert_same_state_dicts(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for k, values in one["state"].items():
        assert list(values) == list(two["state"][k])
        for name, value in values.items():
            assert_same_bits(value, two["state"][k][name], name)


def stack(layers: int, width: int = 8) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))

"""RMSprop with eps inside the root, as TensorFlow has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same_optimizers, gradient, parameters, set_gradients
from test_gallery_formulas import of_timm

from fusedoptim import RMSprop

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
SHAPES, STEPS = [(40, 13), (300,)], 50
OPTIONS = [
    {},
    {"centered": True},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.5, "centered": True, "alpha": 0.4},
]


def start_with_ones(optimizer: RMSprop, params: list[torch.nn.Parameter]) -> None:
    """As the docstring has it; the states that are not given start as ever."""
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": torch.ones_like(p)}


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["zeros", "ones"])
@pytest.mark.parametrize("given", OPTIONS, ids=str)
@BACKENDS
def test_the_formula(backend: str, given: dict[str, Any], start: float) -> None:
    """In NumPy's fp64."""
    o = {"lr": 0.01, "alpha": 0.99, "eps": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "maximize": False, **given}
    params = parameters(SHAPES, torch.float64)
    expected = [p.detach().numpy().copy() for p in params]
    square, average, buffer = ([np.full_like(x, value) for x in expected] for value in (start, 0.0, 0.0))
    optimizer = RMSprop(params, eps_inside_root=True, backend=backend, **o)
    if start:
        start_with_ones(optimizer, params)
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
        for i, x in enumerate(expected):
            g = gradient(params[i], step, i).numpy() * (-1 if o["maximize"] else 1) + o["weight_decay"] * x
            square[i] = o["alpha"] * square[i] + (1 - o["alpha"]) * g**2
            average[i] = o["alpha"] * average[i] + (1 - o["alpha"]) * g
            variance = square[i] - average[i] ** 2 if o.get("centered") else square[i]
            buffer[i] = o["momentum"] * buffer[i] + g / np.sqrt(variance + o["eps"])
            expected[i] = x - o["lr"] * buffer[i]
    for p, x in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=1e-13 * np.abs(x).max())


@BACKENDS
def test_a_negative_variance_is_a_nan_where_eps_does_not_outweigh_it(backend: str) -> None:
    """Centered, with constant gradients: the two averages are rounded apart, and their difference falls below 0."""
    made = {}
    for eps, inside in ((1e-3, True), (1e-9, True), (1e-3, False)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = RMSprop([p], lr=0.5, eps=eps, eps_inside_root=inside, centered=True, backend=backend)
        square = torch.tensor([1.0, 1.0 - 1e-4, 4.0])
        optimizer.state[p] = {"step": torch.tensor(9.0), "square_avg": square, "grad_avg": torch.ones(3)}
        p.grad = torch.ones(3)
        optimizer.step()
        made[eps, inside] = p.detach()
    expected = 1 - 0.5 / (0.99 * (torch.tensor([1.0, 1.0 - 1e-4, 4.0]).double() - 1) + 1e-3).sqrt()
    torch.testing.assert_close(made[1e-3, True].double(), expected, rtol=1e-5, atol=0)
    for key in ((1e-9, True), (1e-3, False)):
        assert made[key].isnan().tolist() == [False, True, False]


def test_the_option_is_a_groups_and_travels_with_checkpoints() -> None:
    params = parameters([(5,), (6,)])
    plain = RMSprop(params)
    assert "eps_inside_root" not in plain.param_groups[0]  # torch's keys, as long as it is off
    saved = RMSprop([{"params": params[:1], "eps_inside_root": True}, {"params": params[1:]}], eps=0.1)
    assert [g.get("eps_inside_root") for g in saved.param_groups] == [True, None]
    loaded = RMSprop([{"params": [p]} for p in parameters([(5,), (6,)])])
    theirs = torch.optim.RMSprop([{"params": [p]} for p in parameters([(5,), (6,)])])
    for other in (loaded, theirs):
        other.load_state_dict(saved.state_dict())
        assert other.param_groups[0]["eps_inside_root"] is True
    for optimizer in (saved, loaded):
        for i, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = gradient(group["params"][0], 0, i)
        optimizer.step()
    assert_same_optimizers(loaded, saved)
    loaded.load_state_dict(plain_groups := RMSprop([{"params": [p]} for p in params]).state_dict())
    assert all("eps_inside_root" not in g for g in plain_groups["param_groups"])
    assert loaded.param_groups[0]["eps_inside_root"] is True  # what a checkpoint does not carry stays


@pytest.mark.parametrize("given", [{}, {"centered": True, "momentum": 0.9}], ids=str)
def test_timms_rmsprop_tf(given: dict[str, Any]) -> None:
    mine, theirs = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    a = RMSprop(mine, eps=1e-3, eps_inside_root=True, backend="cpu", **given)
    start_with_ones(a, mine)
    b = of_timm("rmsprop_tf", "RMSpropTF")(theirs, lr=1e-2, alpha=0.99, eps=1e-3, **given)
    for step in range(STEPS):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)

"""Steps while a TorchDispatchMode watches what torch does: never lost, and never half made."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import ALL, FULL, Case, assert_same_optimizers, parameters, set_gradients
from modes import SHAPES, Log, pair

import fusedoptim

pytestmark = pytest.mark.filterwarnings("ignore:.*non-leaf Tensor")


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_mode_sees_the_step_and_nothing_changes(case: Case, backend: str, options: dict[str, Any]) -> None:
    mine, theirs, a, b = pair(case, backend=backend, **options)
    for step in range(4):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 3:
            mine[1].grad = theirs[1].grad = None
        with Log() as log, Log() if step == 2 else nullcontext() as inner:
            a.step()
        b.step()
        name = "fusedoptim.step_and_zero_.default" if options else "fusedoptim.step_.default"
        assert log.names == [name] and (step != 2 or inner.names == [name])
    assert_same_optimizers(a, b)


def test_a_mode_sees_steps_in_the_backward_pass() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with fusedoptim.step_in_backward(fusedoptim.SGD([p], lr=0.5)):
        for _ in range(2):
            with Log() as log:
                p.sum().backward()
            assert log.names.count("fusedoptim.step_.default") == 1
    assert torch.equal(p.detach(), torch.zeros(3))


def test_an_error_under_a_mode_is_the_ordinary_one() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    params[0].grad = torch.ones(5).to_sparse()
    with Log(), pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    assert not optimizer.state
    set_gradients(params, 0)
    optimizer.add_param_group({"params": parameters([(2,)], seed=3)})
    optimizer.param_groups[0]["params"].pop()
    with Log():
        optimizer.step()
    assert len(optimizer.state) == 2


def test_a_scaler_and_a_closure_under_a_mode() -> None:
    mine, theirs, a, b = pair(FULL[1], amp_in_step=True)
    for params, o, mode in ((mine, a, Log()), (theirs, b, nullcontext())):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            set_gradients(params, step)
            scaler.scale(torch.ones(()))
            if step == 1:
                params[0].grad[0] = math.inf
            with mode:
                scaler.step(o)
            scaler.update()
    assert_same_optimizers(a, b)

    def closure() -> float:
        set_gradients(mine, 9)
        return 2.0

    with Log() as log:
        assert a.step(closure) == 2.0
    assert "fusedoptim.step_.default" in log.names


def test_the_step_of_an_average_in_place_is_refused_under_a_mode() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params, ema_decay=0.9)
    set_gradients(params, 0)
    optimizer.step()
    with optimizer.ema_weights(), Log() as log, pytest.raises(RuntimeError, match="within ema_weights"):
        optimizer.step()
    assert not any("fusedoptim" in name for name in log.names)


def test_within_a_function_that_functorch_transforms() -> None:
    mine, theirs, a, b = pair(FULL[1])
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)

        def stepped(x: torch.Tensor) -> torch.Tensor:
            a.step()
            return x.sin().sum()

        transform = (torch.func.grad, torch.vmap, torch.func.functionalize)[step]
        transform(stepped)(torch.ones(3))
        b.step()
    assert_same_optimizers(a, b)

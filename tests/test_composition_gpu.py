"""What surrounds a step's rule, on a GPU: bits, launches, synchronisation, whole training steps in a CUDA graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import ALL, FULL, SHAPES, Case, assert_same_bits, assert_same_optimizers, gradient
from gpu import DTYPES, backend, kernels_of, pair, set_both, steady

import fusedoptim

pytestmark = pytest.mark.gpu
__all__ = ["backend"]  # a fixture, which every test here uses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_all_options_have_the_cpu_kernels_bits(backend: str, case: Case, dtype: torch.dtype) -> None:
    mine, theirs, a, b = pair(backend, case, [*SHAPES, (70_001,), (300_000,)], dtype, **ALL)
    for step in range(8):
        set_both(mine, theirs, step)
        if step in (0, 4):  # skipped, also as the first step
            mine[-1].grad[7] = theirs[-1].grad[7] = math.inf
        if step == 5:
            mine[3].grad = theirs[3].grad = None
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm.cpu(), b.last_grad_norm)
        assert all(p.grad is None or not p.grad.any() for p in mine)
    assert a.skipped_steps.item() == b.skipped_steps.item() == 2
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_limits_of_groups(backend: str, case: Case) -> None:
    mine, theirs, a, b = pair(backend, case, [(5,), (40_000,), (33, 7)], torch.float32)
    for params, o in ((mine, a), (theirs, b)):
        o.param_groups[0]["params"] = params[:2]
        o.param_groups[0]["max_grad_norm"] = 0.3
        o.add_param_group({"params": params[2:], "lr": 0.02, "clip_grad_value": 0.1})
    for step in range(6):
        set_both(mine, theirs, step)
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm.cpu(), b.last_grad_norm)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_two_launches(backend: str, case: Case) -> None:
    mine, theirs, a, _ = pair(backend, case, [(1000,)] * 50, torch.float32, **ALL)
    set_both(mine, theirs, 0)
    steady(a)
    assert len(kernels_of(a.step)) == 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("case", FULL, ids=str)
def test_nothing_synchronises(backend: str, case: Case) -> None:
    mine, theirs, a, _ = pair(backend, case, [(1000,)] * 50, torch.float32, **ALL)
    set_both(mine, theirs, 0)
    steady(a)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(5):
            a.param_groups[0]["max_grad_norm"] = 1e-3 * (step + 1)
            a.step()
            norm, skipped = a.last_grad_norm, a.skipped_steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() == 0.0 and skipped.item() == 0  # of gradients that the step before zeroed


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_whole_training_step_in_a_graph(backend: str, case: Case) -> None:
    """Forward, backward and step, with a scheduler's learning rate between replays, beside the same without a graph."""

    def learner() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).cuda()
        lr = torch.tensor(0.01, device="cuda")
        optimizer = case.make(model.parameters(), backend=backend, lr=lr, **ALL)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

    def train(model: Any, optimizer: Any) -> None:
        model(data).square().mean().backward()
        optimizer.step()

    data = torch.zeros(8, 16, device="cuda")
    (model, mine, schedule), (witness, theirs, other) = learner(), learner()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            data.copy_(gradient(torch.empty(8, 16), step, 0))
            train(model, mine)
            train(witness, theirs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, mine)
    for step in range(3, 20):
        data.copy_(gradient(torch.empty(8, 16), step, 0))
        if step == 9:
            data[0, 0] = math.nan
        graph.replay()
        train(witness, theirs)
        schedule.step()
        other.step()
    torch.cuda.synchronize()
    assert mine.param_groups[0]["lr"].item() < 0.005
    assert mine.skipped_steps.item() == theirs.skipped_steps.item() == 1
    assert_same_optimizers(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_outside_of_a_step(backend: str, dtype: torch.dtype) -> None:
    mine, theirs, _, _ = pair(backend, FULL[1], [*SHAPES, (70_001,)], dtype)
    for clip in (
        lambda params, **how: fusedoptim.clip_grad_norm_(params, 0.3, **how),
        lambda params, **how: fusedoptim.clip_grad_norm_(params, math.inf, **how),
        lambda params, **how: fusedoptim.clip_grad_value_(params, 0.01, **how),
    ):
        set_both(mine, theirs, 0)
        a, b = clip(mine, backend=backend), clip(theirs)
        if b is not None:
            assert_same_bits(a.cpu(), b)
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.grad.cpu(), q.grad)

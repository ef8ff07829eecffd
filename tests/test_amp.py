"""GradScaler's protocol: gradients unscaled and steps skipped, by the step itself or in the ordinary way."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, FULL, Case, assert_same_bits, assert_same_optimizers, parameters

from benchmarks.witness import ieee_sqrt


def train(optimizer: torch.optim.Optimizer, params: list, steps: int, overflow: set[int]) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(step)
        loss = sum((p * torch.randn(p.shape, generator=g)).sum() for p in params)
        scaler.scale(loss).backward()
        if step in overflow:
            params[step % len(params)].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "before the step"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [c for c in CASES if c.in_torch], ids=str)
def test_the_same_as_torch_under_the_same_scaler(case: Case, backend: str, in_step: bool) -> None:
    mine, theirs = parameters([(5,), (40,)]), parameters([(5,), (40,)])
    a, b = case.make(mine, backend=backend), case.make_torch(theirs, foreach=False)
    a._step_supports_amp_scaling = in_step
    overflow = {0, 4, 5}
    scales = train(a, mine, 12, overflow)
    with ieee_sqrt():
        assert scales == train(b, theirs, 12, overflow)
    assert scales[0] < 1024.0 < max(scales[3:]) * 4
    assert_same_optimizers(a, b)
    assert not hasattr(a, "found_inf")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_overflow_on_the_first_step_leaves_nothing(case: Case) -> None:
    params = parameters([(5,), (40,)])
    before = [p.detach().clone() for p in params]
    optimizer = case.make(params)
    optimizer._step_supports_amp_scaling = True
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    train(optimizer, params, 1, {0})
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert optimizer.state.keys() == states.keys()  # Adagrad's exist from the start
    for p, state in states.items():
        for name, value in state.items():
            assert_same_bits(optimizer.state[p][name], value)

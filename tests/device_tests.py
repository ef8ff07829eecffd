"""What every backend with tables on a device has to do. A test module that imports this one's names defines the fixture
``kernels``; every result is compared with the CPU's kernels, bit for bit, and every launch is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ALL,
    BY_NAME,
    CASES,
    FULL,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    parameters,
    set_gradients,
)
from device import DTYPES, Kernels, pair
from scaled import train
from versions import check_versions

import fusedoptim


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    if kernels.slow and case not in FULL and dtype != torch.float32:
        pytest.skip("takes too long where programs take milliseconds")
    shapes = [(0,), (), (3,), (7, 11), (1025,)] if kernels.slow else SHAPES
    mine, theirs, a, b = pair(kernels, case, shapes, dtype)
    for step in range(2 if kernels.slow else 6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_versions_of_all_that_a_step_writes(kernels: Kernels, case: Case, options: dict[str, Any]) -> None:
    check_versions(case, kernels.backend, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_state_dtype(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    if case.optimizer == "NormAdaptive":
        pytest.skip("has no state of the parameter's shape")
    for state_dtype in (torch.float32, torch.bfloat16):
        mine, theirs, a, b = pair(kernels, case, [(9,), (1500,)], dtype, state_dtype=state_dtype)
        for step in range(4):
            set_gradients(mine, step)
            set_gradients(theirs, step)
            a.step()
            b.step()
        assert_same_optimizers(a, b)


def any_magnitude(n: int, seed: int, largest: float) -> torch.Tensor:
    """Zeros of both signs, subnormal numbers and all up to the largest; a NaN and infinities."""
    draw = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-149, 1, (n,), generator=draw).double()
    x = torch.exp2(exponent + largest) * (1 + torch.rand(n, generator=draw)) * torch.randn(n, generator=draw).sign()
    x[::7] = 0.0
    x[3::70] = -0.0
    x[n // 2 : n // 2 + 3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x.float()


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["adamw", "adam_amsgrad_decay_max", "rmsprop_momentum", "rmsprop_all", "adagrad_all"])
def test_numbers_of_all_magnitudes(kernels: Kernels, case: str, dtype: torch.dtype, eps: float) -> None:
    """Roots and quotients that take a way of their own where they are ordinary have to notice where they are not."""
    n = 260 if kernels.slow else 2100
    mine, theirs, a, b = pair(kernels, BY_NAME[case], [(n,), (n,)], dtype, eps=eps)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(any_magnitude(n, 1, 20.0))
            q.copy_(p)
    for step in range(2 if kernels.slow else 4):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            q.grad = any_magnitude(n, step // 2 if i else step, 127.0 if step == 1 else 0.0).to(dtype)
            p.grad = q.grad.clone()
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_lr_is_read_from_the_device(kernels: Kernels, case: Case, lr_dtype: torch.dtype) -> None:
    """By its address: here the device's memory is the host's."""
    mine, theirs, a, b = pair(kernels, case, [(50,), (3,)], torch.float32, lr=torch.tensor(0.01, dtype=lr_dtype))
    for step in range(4):
        for o in (a, b):
            o.param_groups[0]["lr"].fill_(0.01 / (step + 1))
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def test_scalars_agree_with_the_cpu_over_many_steps(kernels: Kernels) -> None:
    """Powers are computed in another way than the C library's."""
    shapes = [(1,)] * 12
    betas = [(0.9, 0.999), (0.5, 0.9), (0.95, 0.98), (0.0, 0.9999), (0.99, 0.9), (0.123, 0.77)]
    both = []
    for backend in (kernels.backend, "cpu"):
        params = parameters(shapes)
        groups = [{"params": params[i::6], "betas": b} for i, b in enumerate(betas)]
        both.append((params, fusedoptim.Adam(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    for step in range(15 if kernels.slow else 300):  # up to more than 1,500,000
        a.step()
        b.step()
        if step % 5 == 0:
            for optimizer in (a, b):
                for state in optimizer.state.values():
                    state["step"] += step * (7 if kernels.slow else 177)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_unscaling_and_skipping_in_the_kernel(kernels: Kernels, case: Case) -> None:
    mine, theirs, a, b = pair(kernels, case, [(5,), (40,), (20_000,)], torch.float32, amp_in_step=True)
    overflow = {0, 4, 5}
    assert train(a, mine, 10, overflow) == train(b, theirs, 10, overflow)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_steps_in_the_backward_pass(kernels: Kernels, case: Case) -> None:
    """A table of its own for every parameter, and shared states."""
    mine, theirs, a, b = pair(kernels, case, [(3,), (7, 11), ()], torch.float32)
    fusedoptim.step_in_backward(a)
    for step in range(3):
        set_gradients(theirs, step)
        sum((p * q.grad).sum() for p, q in zip(mine, theirs, strict=True)).backward()
        assert all(p.grad is None for p in mine)
        b.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_outside_of_a_step(kernels: Kernels, dtype: torch.dtype) -> None:
    shapes = [(3,), (7, 11), (1025,)] if kernels.slow else [*SHAPES, (70_001,)]
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    for max_norm, limit in ((0.3, None), (float("inf"), None), (None, 0.01)):
        set_gradients(mine, 0)
        set_gradients(theirs, 0)
        for p in (mine[1], theirs[1]):  # dense, in another order
            p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
        norms = []
        for params, backend in ((mine, kernels.backend), (theirs, "cpu")):
            if max_norm is not None:
                norms.append(fusedoptim.clip_grad_norm_(params, max_norm, backend=backend))
            else:
                fusedoptim.clip_grad_value_(params, limit, backend=backend)
        if norms:
            assert_same_bits(*norms)
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.grad, q.grad)

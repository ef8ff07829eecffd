"""What every backend with tables on a device has to do. A test module that imports this one's names defines the fixture
``kernels``; every result is compared with the CPU's kernels, bit for bit, and every launch is counted."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from cases import (
    CASES,
    FULL,
    SHAPES,
    Case,
    assert_same_optimizers,
    gradient,
    parameters,
    set_gradients,
)
from test_amp import train

import fusedoptim

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Kernels(Protocol):
    backend: str
    #: Programs take milliseconds: sizes and steps have to be small.
    slow: bool

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        """Makes a step. How many kernels it launched."""


def pair(
    kernels: Kernels, case: Case, shapes: list, dtype: torch.dtype, **options: object
) -> tuple[list, list, object, object]:
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    return (
        mine,
        theirs,
        case.make(mine, backend=kernels.backend, **options),
        case.make(theirs, backend="cpu", **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    shapes = [(0,), (), (3,), (7, 11), (1025,)] if kernels.slow else SHAPES
    mine, theirs, a, b = pair(kernels, case, shapes, dtype)
    for step in range(2 if kernels.slow else 6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_mixed_dtypes_take_one_launch_and_fp64_a_second(kernels: Kernels, case: Case) -> None:
    for dtypes, expected in ((DTYPES[2:] + DTYPES[:1], 1), (DTYPES, 2)):
        both = []
        for backend in (kernels.backend, "cpu"):
            params = [p for d in dtypes for p in parameters([(5,), (300,), (33, 40)], d)]
            both.append((params, case.make(params, backend=backend)))
        (mine, a), (theirs, b) = both
        for step in range(4):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                # the gradient's dtype goes round as well
                p.grad, q.grad = (torch.nn.Parameter(gradient(x, step, i)).detach() for x in (p, q))
                if step > 1 and expected == 2:
                    p.grad = torch.Tensor.clone(p.grad)
            assert kernels.launches(a) == expected
            b.step()
        assert_same_optimizers(a, b)


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


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_alignment(kernels: Kernels, case: Case) -> None:
    """Heads of every length; operands that agree in their alignment and that do not."""

    def at(x: torch.Tensor, offset: int) -> torch.Tensor:
        return torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:].copy_(x)

    for dtype in (torch.float32, torch.bfloat16):
        offsets = [(p, g) for p in range(0, 9, 3 if kernels.slow else 1) for g in (p, 0, p + 1)]
        mine = [
            torch.nn.Parameter(at(gradient(torch.empty(2100), 9, i).to(dtype), p)) for i, (p, _) in enumerate(offsets)
        ]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = case.make(mine, backend=kernels.backend), case.make(theirs, backend="cpu")
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = at(q.grad, offsets[i][1])
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("count", [(1 << 14) + 1, 100_003, (1 << 20) + 5, 2_200_000])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_tensors_are_cut_into_chunks_and_parts(kernels: Kernels, case: Case, count: int) -> None:
    """Above 1,048,576 elements a sum of squares has a third level."""
    if kernels.slow and count != {"NormAdaptive": (1 << 20) + 5}.get(case.optimizer, (1 << 14) + 1):
        pytest.skip("takes too long where programs take milliseconds")
    if count > 1 << 20 and case.optimizer != "NormAdaptive":
        count //= 8
    mine, theirs, a, b = pair(kernels, case, [(count,), (17,), (count // 3,)], torch.float32)
    for step in range(2):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_more_groups_than_fit_the_arguments(kernels: Kernels, case: Case) -> None:
    groups_in_all, both = 21 if kernels.slow else 465, []
    for backend in (kernels.backend, "cpu"):
        params = parameters([(7,)] * groups_in_all)
        groups = [{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)]
        both.append((params, case.make(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for i in range(groups_in_all):
            a.param_groups[i]["lr"] = b.param_groups[i]["lr"] = 1e-3 * (1 + (i + step) % 7)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_without_gradients_and_late_ones(kernels: Kernels, case: Case) -> None:
    mine, theirs, a, b = pair(kernels, case, [(5,), (40_000,), (33,)], torch.float32)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[step % 3].grad = theirs[step % 3].grad = None
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
    for step in range(15 if kernels.slow else 1500):
        a.step()
        b.step()
        if step % 5 == 0:
            for optimizer in (a, b):
                for state in optimizer.state.values():
                    state["step"] += step * 7
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_unscaling_and_skipping_in_the_kernel(kernels: Kernels, case: Case) -> None:
    mine, theirs, a, b = pair(kernels, case, [(5,), (40,), (20_000,)], torch.float32)
    a._step_supports_amp_scaling = b._step_supports_amp_scaling = True
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
    assert_same_optimizers(a, b)

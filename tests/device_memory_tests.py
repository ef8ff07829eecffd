"""Where tensors lie and how many there are, for every backend with tables on a device. See device_tests.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    FULL,
    Case,
    assert_same_optimizers,
    force_grad,
    gradient,
    parameters,
    set_gradients,
)
from device import DTYPES, Kernels, moved, pair


@pytest.mark.parametrize("case", FULL, ids=str)
def test_mixed_dtypes_take_one_launch_and_fp64_a_second(kernels: Kernels, case: Case) -> None:
    if kernels.slow and case.optimizer not in ("AdamW", "NormAdaptive"):
        pytest.skip("takes too long where programs take milliseconds")
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


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_alignment(kernels: Kernels, case: Case) -> None:
    """Heads of every length; operands that agree in their alignment and that do not."""
    if kernels.slow and case.optimizer not in ("AdamW", "NormAdaptive"):
        pytest.skip("heads know no rule, but for sums of squares")
    for dtype in (torch.float32, torch.bfloat16):
        offsets = [(p, g) for p in ((1, 3) if kernels.slow else range(9)) for g in (p, 0, p + 1)]
        mine = [
            torch.nn.Parameter(moved(gradient(torch.empty(2100), 9, i).to(dtype), p))
            for i, (p, _) in enumerate(offsets)
        ]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = case.make(mine, backend=kernels.backend), case.make(theirs, backend="cpu")
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = moved(q.grad, offsets[i][1])
            a.step()
            b.step()
        assert_same_optimizers(a, b)


#: Of tensors in ranges, of which the smallest have 2048 elements and the largest 16384.
LENGTHS = [(1 << 15) + more for more in (1, 7, 2500)]


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "zero_grad_in_step": True}], ids=["plain", "surrounded"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_misaligned_tensors_of_several_ranges(kernels: Kernels, case: Case, options: dict[str, Any]) -> None:
    """Parameters, gradients and states alike, so that every range is moved up by the head, and cut at the end: with
    more elements than the head behind whole ranges, as many, and fewer."""
    if case.optimizer != "AdamW" and (kernels.slow or options):
        pytest.skip("the ranges know no rule")
    for dtype in (torch.float32, torch.bfloat16):
        lengths = [(4096 + 1, 1), (4096 + 5, 3)] if kernels.slow else [(n, at) for n in LENGTHS for at in (1, 3)]
        mine = [torch.nn.Parameter(moved(gradient(torch.empty(n), 9, at).to(dtype), at)) for n, at in lengths]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = (case.make(x, backend=k, **options) for x, k in ((mine, kernels.backend), (theirs, "cpu")))
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = moved(q.grad, lengths[i][1])
            if step == 1:
                for (_, at), p in zip(lengths, mine, strict=True):
                    a.state[p].update({k: moved(s, at) for k, s in a.state[p].items() if s.dim() > 0})
                    assert all(s.data_ptr() % (4 * s.itemsize) for s in a.state[p].values() if s.dim() > 0)
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_gradient_of_another_dtype_than_before(kernels: Kernels, case: Case) -> None:
    """At the address of the one before."""
    if kernels.slow and case.optimizer != "AdamW":
        pytest.skip("the tables know no rule")
    mine, theirs, a, b = pair(kernels, case, [(100,), (33, 5)], torch.float32)
    memories = [torch.zeros(p.numel(), dtype=torch.float64) for p in mine]
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32)):
        set_gradients(theirs, step)
        for p, q, memory in zip(mine, theirs, memories, strict=True):
            g = q.grad.to(dtype)
            p.grad = q.grad = None
            force_grad(q, g)
            force_grad(p, memory.view(dtype)[: g.numel()].view(g.shape).copy_(g))
        a.step()
        b.step()
        assert_same_optimizers(a, b, f"step {step}: ")


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
    mine, theirs, a, b = pair(kernels, case, [(5,), (5_000 if kernels.slow else 40_000,), (33,)], torch.float32)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[step % 3].grad = theirs[step % 3].grad = None
        a.step()
        b.step()
    assert_same_optimizers(a, b)

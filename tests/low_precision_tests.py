"""Steps in fewer bits on every backend: the bits of the CPU's kernels, and theirs those of the reference. A test module
that imports this one's names defines the fixture ``kernels`` (see device.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALL, LOW, LOW_SHAPES, Case, assert_same_optimizers, assert_same_raw, force_grad, gradient, parameters
from device import Kernels, moved
from layouts import LAYOUTS

DTYPES = [torch.bfloat16, torch.float32]


def compared_with(kernels: Kernels) -> str:
    return "reference" if kernels.backend == "cpu" else "cpu"


def pair(kernels: Kernels, case: Case, params: list[torch.nn.Parameter], **options: Any) -> list[tuple[list, Any]]:
    """The same parameters and an optimizer of theirs, for the kernels under test and for those they are compared
    with."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return [
        (own, case.make(own, backend=backend, **options))
        for own, backend in ((params, kernels.backend), (copies, compared_with(kernels)))
    ]


def shapes(kernels: Kernels) -> list[tuple[int, ...]]:
    return [(), (17,), (3, 1370), (4, 1024)] if kernels.slow else LOW_SHAPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOW, ids=str)
def test_every_way_to_store_has_the_same_bits(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    if kernels.slow and dtype == torch.float32:
        pytest.skip("takes too long where programs take milliseconds")
    both = pair(kernels, case, parameters(shapes(kernels), dtype))
    for step in range(2 if kernels.slow else 4):
        for params, o in both:
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            o.step()
    assert_same_optimizers(*(o for _, o in both))


@pytest.mark.parametrize("case", LOW, ids=str)
def test_with_all_options_and_gradients_of_another_dtype(kernels: Kernels, case: Case) -> None:
    if kernels.slow and case.name != "adamw_8_bits":
        pytest.skip("takes too long where programs take milliseconds")
    both = pair(kernels, case, parameters(shapes(kernels), torch.bfloat16), **ALL)
    for step in range(2 if kernels.slow else 4):
        for params, o in both:
            for i, p in enumerate(params):
                p.grad = None
                if i != step:
                    force_grad(p, gradient(p, step, i, DTYPES[(step + i) % 2]))
            o.step()
    (_, a), (_, b) = both
    assert_same_optimizers(a, b)
    assert_same_raw(a.last_grad_norm, b.last_grad_norm)


def test_groups_that_store_in_different_ways(kernels: Kernels) -> None:
    """Side by side, also with one that does not, in one launch."""
    options: list[dict[str, Any]] = [
        {},
        {"master": "remainder", "state_dtype": torch.bfloat16},
        {"state_dtype": "int8", "rounding": "stochastic", "rounding_seed": 9},
        {"master": "remainder8", "state_dtype": {"exp_avg": "int8"}},
        {"master": torch.float32, "rounding": {"exp_avg_sq": "nearest"}},
    ]
    found = []
    for backend in (kernels.backend, compared_with(kernels)):
        sizes = [(3, 70), (3, 1370) if kernels.slow else (64, 65)]
        groups = [{"params": parameters(sizes, torch.bfloat16, i), **o} for i, o in enumerate(options)]
        params = [p for group in groups for p in group["params"]]
        found.append((params, Case("mixed", "AdamW").make(groups, backend=backend)))
    for step in range(2 if kernels.slow else 4):
        for k, (params, o) in enumerate(found):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            if k == 0 and hasattr(kernels, "launches"):
                assert kernels.launches(o) == 1
            else:
                o.step()
    assert_same_optimizers(*(o for _, o in found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LOW, ids=str)
def test_memory_orders_change_nothing(kernels: Kernels, case: Case, layout: str) -> None:
    """Of parameters and gradients: the bits of contiguous ones, in rows and blocks of the logical order."""
    if kernels.slow and (case.name not in ("adamw_low", "rmsprop_8_bits") or layout not in ("transposed", "slice")):
        pytest.skip("takes too long where programs take milliseconds")
    made = [(4, 3, 5, 6), (4, 11, 12, 8) if kernels.slow else (16, 3, 17, 9)]
    values = [gradient(torch.empty(s), 99, i).to(torch.bfloat16) for i, s in enumerate(made)]
    plain, other = ([torch.nn.Parameter(how(x.clone())) for x in values] for how in (torch.clone, LAYOUTS[layout]))
    a, b = case.make(plain, backend="cpu"), case.make(other, backend=kernels.backend)
    orders = list(LAYOUTS.values())
    for step in range(2 if kernels.slow else 4):
        for i, (p, q) in enumerate(zip(plain, other, strict=True)):
            p.grad = gradient(p, step, i)
            q.grad = orders[(step + i + len(layout)) % len(orders)](p.grad)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", LOW[:5:2], ids=str)
def test_any_alignment(kernels: Kernels, case: Case) -> None:
    if kernels.slow and case.optimizer == "RMSprop":
        pytest.skip("takes too long where programs take milliseconds")
    offsets = [(p, g) for p in ([1] if kernels.slow else range(9)) for g in (p, 0)]
    rows, row = (3, 1370) if kernels.slow else (33, 130)
    params = [
        torch.nn.Parameter(moved(gradient(torch.empty(rows * row), 9, i).to(torch.bfloat16), p).view(rows, row))
        for i, (p, _) in enumerate(offsets)
    ]
    both = pair(kernels, case, params)
    for step in range(2):
        (mine, a), (theirs, b) = both
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            q.grad = gradient(q, step, i)
            p.grad = moved(q.grad.view(-1), offsets[i][1]).view(rows, row)
        a.step()
        b.step()
    assert_same_optimizers(a, b)

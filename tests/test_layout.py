"""Memory layout never changes a result."""

from __future__ import annotations

import pytest
import torch
from cases import COVERING, FULL, Case, assert_same_bits, gradient
from layouts import LAYOUTS

SHAPES = [(4, 3, 5, 6), (2, 8, 17, 9), (1, 3, 1, 700)]


@pytest.mark.parametrize(
    ("case", "param_layout", "grad_layout", "dtype"),
    [
        (case, param_layout, grad_layout, dtype)
        for i, case in enumerate(FULL)
        for j, param_layout in enumerate(LAYOUTS)
        for k, grad_layout in enumerate(LAYOUTS)
        for m, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64))
        if not (COVERING or case.own)
        or i == (j + k + m) % len(FULL)  # all but the rule in all combinations, and the rule in turn
    ],
    ids=str,
)
def test_layouts_of_parameter_and_gradient(case: Case, param_layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    plain, other = [], []
    for i, shape in enumerate(SHAPES):
        x = gradient(torch.empty(shape), 99, i).to(dtype)
        plain.append(torch.nn.Parameter(x.clone()))
        other.append(torch.nn.Parameter(LAYOUTS[param_layout](x)))
    a, b = case.make(plain), case.make(other)
    pointers = [p.data_ptr() for p in other]
    for step in range(4):
        for i, (p, q) in enumerate(zip(plain, other, strict=True)):
            g = gradient(p, step, i)
            p.grad = g
            q.grad = LAYOUTS[grad_layout](g) if step != 2 else g  # the layout changes between steps, too
        a.step()
        b.step()
    assert [p.data_ptr() for p in other] == pointers
    for p, q in zip(plain, other, strict=True):
        assert_same_bits(p.detach(), q.detach().contiguous())
        for name, s in a.state[p].items():
            assert_same_bits(s, b.state[q][name].contiguous(), name)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_what_lies_between_the_elements_is_not_written(case: Case) -> None:
    big = torch.full((40, 50), 7.0)
    p = torch.nn.Parameter(big[::2, 5:45:4])
    o = case.make([p])
    for step in range(3):
        p.grad = gradient(p, step, 0)
        o.step()
    mask = torch.ones_like(big, dtype=torch.bool)
    mask[::2, 5:45:4] = False
    assert (big[mask] == 7.0).all() and not (p == 7.0).all()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_expanded_gradient(case: Case) -> None:
    p, q = torch.nn.Parameter(torch.ones(6, 7)), torch.nn.Parameter(torch.ones(6, 7))
    a, b = case.make([p]), case.make([q])
    for _ in range(3):
        p.grad = torch.full((6, 1), 0.25).expand(6, 7)
        q.grad = p.grad.contiguous()
        a.step()
        b.step()
    assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 5)], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_gradients_that_are_negated_lazily(case: Case, shape: tuple[int, ...]) -> None:
    """As the backward pass of complex numbers makes them."""
    p, q = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape))
    a, b = case.make([p]), case.make([q])
    for step in range(4):
        g = gradient(p, step, 0).float()
        lazy = torch.complex(torch.zeros_like(g), -g).conj().imag
        assert lazy.is_neg()
        p.grad, q.grad = (lazy, g) if step != 1 else (g.clone(), g)
        a.step()
        b.step()
    assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_empty_tensors_anywhere(case: Case) -> None:
    """Also last, where a trailing launch can get lost."""
    shapes = [(0,), (3,), (0, 5), (2, 2), (4, 0)]
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    alone = [torch.nn.Parameter(torch.ones(s)) for s in [(3,), (2, 2)]]
    a, b = case.make(params), case.make(alone)
    for _ in range(2):
        for p in params + alone:
            p.grad = torch.full(p.shape, 0.5)
        a.step()
        b.step()
    assert_same_bits(params[1].detach(), alone[0].detach())
    assert_same_bits(params[3].detach(), alone[1].detach())
    for p in params:
        if "step" in a.state[p]:
            assert a.state[p]["step"].item() == 2


@pytest.mark.parametrize("case", FULL, ids=str)
def test_only_empty_tensors(case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(0))
    p.grad = torch.ones(0)
    case.make([p]).step()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_ten_thousand_tensors(case: Case) -> None:
    shapes = [(1 + i % 7,) for i in range(10_000)]
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    single = [torch.nn.Parameter(torch.ones(1 + i)) for i in range(7)]
    a, b = case.make(params, backend="cpu"), case.make(single, backend="cpu")
    for _ in range(2):
        for p in params + single:
            p.grad = torch.full(p.shape, 0.5)
        a.step()
        b.step()
    for i, p in enumerate(params):
        assert torch.equal(p.detach(), single[i % 7].detach())

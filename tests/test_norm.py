"""NormAdaptive and the sum of squares, against an independent NumPy version of their definition."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BACKEND, CAPABILITIES, COVERING, assert_same_bits, gradient, parameters, set_gradients

import fusedoptim
from fusedoptim import _native
from fusedoptim.reference import sum_of_squares

np = pytest.importorskip("numpy")


def numpy_sum_of_squares(x: np.ndarray) -> float:
    level = [float(v) * float(v) for v in x.astype(np.float64).ravel()]
    if not level:
        return 0.0
    while True:
        sums = []
        for at in range(0, len(level), 1024):
            tile = level[at : at + 1024] + [0.0] * (1024 - len(level[at : at + 1024]))
            while len(tile) > 1:
                half = len(tile) // 2
                tile = [tile[i] + tile[i + half] for i in range(half)]
            sums.append(tile[0])
        level = sums
        if len(level) == 1:
            return level[0]


def fma32(a: np.float32, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b is exact in double; the sum is rounded to odd there, so that the rounding to fp32 is the only one."""
    product = np.float64(a) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    bits = total.view(np.int64)
    odd = (bits & 1) == 1
    toward = np.where(error > 0, np.nextafter(total, np.inf), np.nextafter(total, -np.inf))
    fixed = np.where((error != 0) & ~odd, np.where((toward.view(np.int64) & 1) == 1, toward, total), total)
    return fixed.astype(np.float32)


class NumpyNormAdaptive:
    def __init__(self, p: np.ndarray, lr: float, beta: float, eps: float, weight_decay: float) -> None:
        self.p, self.a = p.copy(), np.float32(0)
        self.lr, self.beta, self.eps, self.weight_decay = lr, beta, eps, weight_decay

    def step(self, g: np.ndarray) -> None:
        n = np.float32(math.sqrt(numpy_sum_of_squares(g)))
        self.a = np.float32(self.beta * float(self.a) + (1 - self.beta) * float(n))
        s = np.float32(self.lr / (float(self.a) + self.eps))
        p = self.p
        if self.weight_decay != 0:
            p = p * np.float32(1 - self.lr * self.weight_decay)
        self.p = fma32(-s, g, p)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 70_001])
def test_equals_numpy(size: int, weight_decay: float) -> None:
    p = torch.nn.Parameter(gradient(torch.empty(size), 77, 0).float())
    o = fusedoptim.NormAdaptive([p], lr=0.05, beta=0.8, weight_decay=weight_decay, backend=BACKEND)
    n = NumpyNormAdaptive(p.detach().numpy(), 0.05, 0.8, 1e-8, weight_decay)
    for step in range(4):
        p.grad = gradient(p, step, 0)
        o.step()
        n.step(p.grad.numpy())
        assert o.state[p]["avg_grad_norm"].item() == float(n.a)
        assert_same_bits(p.detach(), torch.from_numpy(n.p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 5000, 1024 * 1024 + 1])
def test_reference_sum_of_squares(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, dtype=torch.float64).to(dtype)
    expected = numpy_sum_of_squares(x.double().numpy())
    assert sum_of_squares(x).item() == expected
    assert expected == pytest.approx((x.double() ** 2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("threads", [1] if COVERING else [1, 2, 5])
def test_bits_of_large_norms(capability: str, threads: int) -> None:
    """Three levels of tiles, gradients of every dtype and memory order."""
    _native._C.set_cpu_capability(capability)
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ps, qs = parameters([(1100, 1030), (3,)], dtype), parameters([(1100, 1030), (3,)], dtype)
        a, b = fusedoptim.NormAdaptive(ps, backend=BACKEND), fusedoptim.NormAdaptive(qs, backend="reference")
        for step in range(2):
            set_gradients(ps, step)
            set_gradients(qs, step)
            if step == 1:
                ps[0].grad = ps[0].grad.t().contiguous().t()
            a.step()
            b.step()
        for p, q in zip(ps, qs, strict=True):
            assert_same_bits(p.detach(), q.detach())
            assert_same_bits(a.state[p]["avg_grad_norm"], b.state[q]["avg_grad_norm"])


def test_invalid_values() -> None:
    with pytest.raises(ValueError, match="Invalid epsilon value: -1"):
        fusedoptim.NormAdaptive(parameters([(2,)]), eps=-1)
    with pytest.raises(ValueError, match="Invalid beta"):
        fusedoptim.NormAdaptive(parameters([(2,)]), beta=1.0)

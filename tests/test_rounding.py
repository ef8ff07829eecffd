"""The rounding to 16 bits, over every fp32 exponent and the cases that matter, and the reading of every 16-bit value.

Through the public door: SGD with lr 1 that goes up from zero stores exactly its gradient, rounded."""

from __future__ import annotations

import pytest
import torch
from cases import CAPABILITIES, assert_same_bits

import fusedoptim
from fusedoptim import _native


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    p = torch.nn.Parameter(torch.zeros(x.shape, dtype=dtype))
    data = p.data
    p.data = data.to(x.dtype)
    p.grad = x
    p.data = data
    fusedoptim.SGD([p], lr=1.0, maximize=True).step()
    return p.detach()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(dtype: torch.dtype, capability: str) -> None:
    _native._C.set_cpu_capability(capability)
    high = torch.arange(0, 1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] | low[None, :]).reshape(-1)
    x = bits.to(torch.int32).view(torch.float32)
    assert_same_bits(stored(x, dtype), (x + 0.0).to(dtype))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_every_value(dtype: torch.dtype, capability: str) -> None:
    _native._C.set_cpu_capability(capability)
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    assert_same_bits(stored(x, torch.float32), x.float() + 0.0)
    assert_same_bits(stored(x, torch.float64), x.double() + 0.0)
    assert_same_bits(stored(x, dtype), x)

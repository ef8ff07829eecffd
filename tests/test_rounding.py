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


# ---- what a 16-bit parameter keeps of a step ----


def decayed(dtype: torch.dtype, options: dict, steps: int, gradient: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights over several powers of two, of both signs, before and after."""
    before = torch.linspace(-3, 3, 1000).to(dtype)
    p = torch.nn.Parameter(before.clone())
    o = fusedoptim.AdamW([p], **options)
    for _ in range(steps):
        p.grad = torch.full_like(p, gradient)
        o.step()
    return before, p.detach()


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decay_below_half_a_unit_is_lost(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    options = {"lr": 1e-3, "weight_decay": 0.1, "state_dtype": state_dtype}
    assert_same_bits(*reversed(decayed(dtype, options, 1000)))


def test_the_same_decay_moves_wider_parameters() -> None:
    before, after = decayed(torch.float32, {"lr": 1e-3, "weight_decay": 0.1}, 1000)
    torch.testing.assert_close(after, 0.9999**1000 * before, rtol=1e-4, atol=0)  # 9.5 percent are gone


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_half_a_unit_is_between_half_of_this_and_this(dtype: torch.dtype, most: float) -> None:
    """Of a weight's value: 0.2 to 0.4 percent in bfloat16, 0.02 to 0.05 in float16."""
    for share, moved in ((0.49 * most, False), (1.01 * most, True)):
        before, after = decayed(dtype, {"lr": 1.0, "weight_decay": share}, 1)
        normal = before.abs() > 1e-2
        assert torch.all((before != after)[normal]) if moved else torch.equal(before, after)


def test_update_and_decay_count_together() -> None:
    """Neither exceeds half a unit, their sum does: in torch, which rounds after the decay, nothing moves."""
    before = torch.full((8,), 0.375, dtype=torch.bfloat16)  # half a unit is 2**-10
    found = []
    for module, decay, sign in (
        (fusedoptim, 0.5, 1),
        (fusedoptim, 0.0, 1),
        (fusedoptim, 0.5, 0),
        (torch.optim, 0.5, 1),
    ):
        p = torch.nn.Parameter(before.clone())
        p.grad = torch.full_like(p, float(sign))
        module.AdamW([p], lr=9e-4, weight_decay=decay).step()
        found.append((before - p.detach()).unique().tolist())
    assert found == [[2.0**-9], [0.0], [0.0], [0.0]]

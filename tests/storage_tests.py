"""How numbers are stored in fewer bits than they are computed in, on every backend: the reference's bits, for all kinds
of numbers. A test module that imports this one's names defines the fixture ``kernels`` (see device.py).

Through the public door: a step of SGD with lr 1 that goes up from -0 stores exactly its gradient, and so does the first
step of a momentum; Adam with a second beta of 0 stores its square. What was stored is read in the same way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import spelled
import torch
from cases import COVERING, assert_same_numbers, assert_same_raw, force_grad
from device import Kernels
from torch import Tensor

import fusedoptim
from fusedoptim import reference

SEED = 77
#: Storages of a parameter: its dtype, its options, and the state that keeps the rest.
OF_PARAMETERS: dict[str, tuple[torch.dtype, dict[str, Any], str | None]] = {
    "bf16_stochastic": (torch.bfloat16, {"rounding": {"param": "stochastic"}, "rounding_seed": SEED}, None),
    "bf16_remainder": (torch.bfloat16, {"master": "remainder"}, "param_remainder"),
    "bf16_remainder8": (torch.bfloat16, {"master": "remainder8"}, "param_remainder8"),
    "bf16_master": (torch.bfloat16, {"master": torch.float32}, "param_master"),
    "f16_master": (torch.float16, {"master": torch.float32}, "param_master"),
}
BLOCKS = ("q8", "q8_stochastic", "q8_squares", "q8_squares_stochastic")
#: Rows of whole blocks; with a short last one, even of one element; that begin at any address.
SHAPES_IN_BLOCKS = [(96, 1024), (7, 1000), (3, 2049), (5, 1003), (65, 64), (33, 2, 65)]
FEW_SHAPES_IN_BLOCKS = [(4, 1024), (5, 1003)]


def f32(bits: Tensor) -> Tensor:
    """Numbers from their bits, int64."""
    return ((bits & 0xFFFFFFFF) - ((bits & 0x80000000) << 1)).to(torch.int32).view(torch.float32)


#: How many numbers to go through, by how long a backend takes: every how many upper halves, and the logarithm of the
#: number of those at random.
Extent = tuple[int, int]
FEW, MANY, ALL_HALVES = (97, 14), (5, 18), (1, 22)


def extent(kernels: Kernels) -> Extent:
    if kernels.slow or COVERING:
        return FEW
    return ALL_HALVES if kernels.backend == "cpu" else MANY


@cache
def any_bits(extent: Extent = ALL_HALVES) -> Tensor:
    """fp32 numbers: upper halves with lower halves about which roundings differ, and others at random."""
    every, logarithm = extent
    lower = torch.tensor([0, 1, 0x7F, 0x80, 0x81, 0x17F, 0x180, 0x7FFF, 0x8000, 0x8001, 0x8080, 0xFF80, 0xFFFF])
    upper = torch.arange(0, 1 << 16, every) << 16
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 32, (1 << logarithm,), generator=draw)
    special = torch.tensor([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 1])
    return f32(torch.cat([(upper[:, None] | lower).reshape(-1), special, drawn]))


@cache
def for_blocks(shape: tuple[int, ...]) -> Tensor:
    """Of all magnitudes that meet in a block, with zeros, denormals, the largest, ties, and a few that are none."""
    draw = torch.Generator().manual_seed(shape[-1])
    rows, row = shape[0], torch.Size(shape[1:]).numel()
    exponents = torch.randint(-150, 128, (rows, 1), generator=draw) - torch.randint(0, 26, (rows, row), generator=draw)
    x = (
        torch.ldexp(1 + torch.rand(rows, row, generator=draw).double(), exponents)
        * torch.randn(rows, row, generator=draw).sign()
    )
    x[torch.rand(rows, row, generator=draw) < 0.05] = 0.0
    x[0] = torch.arange(row) % 97 / 64.0 - 0.25  # halfway between two codes, where the largest is what blocks scale to
    x[0, ::128] = 14.75
    x[1, ::2], x[1, 1::2] = -0.0, 0.0
    x[2, 1] = torch.nan
    x = x.float()
    if rows > 4:
        x[3, 5], x[4, 7] = -torch.inf, 3.4028234663852886e38
    return x.view(shape)


def random_bits(x: Tensor, half: int) -> Tensor:
    """Of the first step of an optimizer's first parameter."""
    return torch.from_numpy(spelled.random_halves(x.numel(), spelled.stream(SEED, 0, 1), half)).view(x.shape)


@cache
def encoded(storage: str, extent: Extent, half: int = 0) -> tuple[Tensor, Tensor | None]:
    """What is not in blocks."""
    x = any_bits(extent)
    if storage.endswith("_master"):
        return reference.encode(storage, x, None)
    elements, extra = spelled.encode(storage, spelled.bits(x), random_bits(x, half).numpy())
    return as_bf16(elements), None if extra is None else as_bf16(extra) if extra.itemsize == 2 else as_int8(extra)


def as_bf16(u: np.ndarray) -> Tensor:
    return torch.from_numpy(u.view(np.int16)).view(torch.bfloat16)


def as_int8(u: np.ndarray) -> Tensor:
    return torch.from_numpy(u.view(np.int8))


@cache
def encoded_in_blocks(storage: str, shape: tuple[int, ...], half: int) -> tuple[Tensor, Tensor | None]:
    x = for_blocks(shape)
    return reference.encode(storage, x * x if storage.startswith("q8_squares") else x, random_bits(x, half))


# ---- what is stored ----


@pytest.mark.parametrize("storage", OF_PARAMETERS)
def test_what_a_parameter_keeps(kernels: Kernels, storage: str) -> None:
    """Also the average, which takes all of it."""
    dtype, options, beside = OF_PARAMETERS[storage]
    x = any_bits(extent(kernels))
    p = torch.nn.Parameter(torch.full_like(x, -0.0, dtype=dtype))
    force_grad(p, x)
    o = fusedoptim.SGD([p], lr=1.0, maximize=True, ema_decay=0.0, backend=kernels.backend, **options)
    o.step()
    elements, extra = encoded(storage, extent(kernels))
    assert_same_numbers(p.detach(), elements)
    if beside is not None:
        assert extra is not None
        (assert_same_numbers if beside == "param_master" else assert_same_raw)(o.state[p][beside], extra)
    average = reference.decode(storage, elements, extra)
    finite = average.isfinite()
    assert torch.equal(o.state[p]["ema"][finite], average[finite])


def test_what_a_state_of_16_bits_keeps(kernels: Kernels) -> None:
    x = any_bits(extent(kernels))
    options = {"state_dtype": torch.bfloat16, "rounding": "stochastic", "rounding_seed": SEED}
    p = torch.nn.Parameter(torch.zeros_like(x))
    p.grad = x
    o = fusedoptim.SGD([p], lr=0.0, momentum=0.9, backend=kernels.backend, **options)
    o.step()
    elements, _ = encoded("bf16_stochastic", extent(kernels), half=2)
    assert_same_raw(o.state[p]["momentum_buffer"], elements)


@pytest.mark.parametrize("storage", BLOCKS)
def test_what_a_state_in_blocks_keeps(kernels: Kernels, storage: str) -> None:
    rounding = "stochastic" if storage.endswith("_stochastic") else "nearest"
    options = {"state_dtype": "int8", "rounding": rounding, "rounding_seed": SEED, "backend": kernels.backend}
    for shape in FEW_SHAPES_IN_BLOCKS if kernels.slow else SHAPES_IN_BLOCKS:
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = for_blocks(shape)
        if storage.startswith("q8_squares"):
            o, name, half = fusedoptim.Adam([p], betas=(0.9, 0.0), **options), "exp_avg_sq", 1
        else:
            o, name, half = fusedoptim.SGD([p], lr=0.0, momentum=0.9, **options), "momentum_buffer", 2
        o.step()
        codes, scales = encoded_in_blocks(storage, shape, half)
        assert_same_raw(o.state[p][name + "_q8"], codes, f"codes of {shape}")
        assert_same_raw(o.state[p][name + "_scale"], scales, f"scales of {shape}")


def test_a_state_of_16_bits_beside_numbers_of_64(kernels: Kernels) -> None:
    """These are rounded to fp32 first."""
    x = any_bits(FEW).double() * (1 + 2.0**-30)  # fp32 rounds it back
    p = torch.nn.Parameter(torch.zeros_like(x))
    p.grad = x
    options = {"state_dtype": torch.bfloat16, "rounding": "stochastic", "rounding_seed": SEED}
    o = fusedoptim.SGD([p], lr=0.0, momentum=0.9, backend=kernels.backend, **options)
    o.step()
    elements, _ = reference.encode("bf16_stochastic", x, random_bits(x, 2))
    assert_same_raw(o.state[p]["momentum_buffer"], elements)


# ---- what is read ----


def halves(every: int) -> tuple[Tensor, Tensor]:
    """16-bit numbers, with remainders: those about which signs and zeros differ, and others at random. int16."""
    upper = torch.arange(-(1 << 15), 1 << 15, every)
    lower = torch.tensor([0, 1, 0x7FFF, -0x8000, -0x7FFF, -1, 0xFF, 0x80, 0x7F00])
    drawn = torch.randint(-(1 << 15), 1 << 15, (len(upper), 7), generator=torch.Generator().manual_seed(1))
    rest = torch.cat([lower.expand(len(upper), -1), drawn], 1)
    return upper[:, None].expand_as(rest).reshape(-1).to(torch.int16), rest.reshape(-1).to(torch.int16)


@pytest.mark.parametrize("storage", OF_PARAMETERS)
def test_what_is_read_of_a_parameter(kernels: Kernels, storage: str) -> None:
    """Its decay is added to a gradient of -0, which is the momentum's first."""
    dtype, options, beside = OF_PARAMETERS[storage]
    upper, rest = halves(extent(kernels)[0])
    p = torch.nn.Parameter(upper.view(dtype))
    extra = {
        None: None,
        "param_remainder": rest.view(torch.bfloat16),
        "param_remainder8": rest.to(torch.int8),
        # Half of them are what the parameter is rounded from, the others not.
        "param_master": torch.where(rest % 2 == 0, p.detach().float() * (1 + 2.0**-13), f32(upper.long() << 16 ^ rest)),
    }[beside]
    o = fusedoptim.SGD(
        [p], weight_decay=1.0, momentum=0.9, state_dtype=torch.float32, backend=kernels.backend, **options
    )
    p.grad = torch.full_like(p, -0.0)
    if extra is not None:
        o.state[p] = {beside: extra.clone()}
    expected = reference.decode(storage, p.detach(), extra)
    o.step()
    assert_same_numbers(o.state[p]["momentum_buffer"], expected)


def blocks_to_read() -> tuple[Tensor, Tensor]:
    """Every byte, under every exponent that a scale can have. A block of zeros has no other code than 0."""
    scales = torch.ldexp(torch.full((228,), 1.37), torch.arange(-100, 128))
    scales = torch.cat([scales, torch.tensor([2.0**-100, 3.4e38, torch.nan, 0.0])])
    codes = torch.arange(256).repeat(len(scales), 1)
    codes[-1] = 0
    return codes, scales[:, None].expand(-1, 2).contiguous()


def test_what_is_read_of_blocks(kernels: Kernels) -> None:
    codes, scales = blocks_to_read()
    if kernels.slow:
        codes, scales = codes[-18:], scales[-18:]
    codes = (codes - ((codes & 128) << 1)).to(torch.int8)
    p = torch.nn.Parameter(torch.full(codes.shape, -0.0))
    o = fusedoptim.SGD([p], lr=1.0, momentum=1.0, state_dtype="int8", backend=kernels.backend)
    o.state[p] = {"momentum_buffer_q8": codes.clone(), "momentum_buffer_scale": scales.clone()}
    p.grad = torch.full_like(p, -0.0)
    o.step()
    assert_same_numbers(-p.detach(), reference.decode("q8", codes, scales))


def test_what_is_read_of_squares_in_blocks(kernels: Kernels) -> None:
    """The largest so far is half of it, by a beta of a half."""
    codes, scales = blocks_to_read()
    if kernels.slow:
        codes, scales = codes[-18:], scales[-18:]
    codes = codes.to(torch.uint8)
    p = torch.nn.Parameter(torch.zeros(codes.shape))
    o = fusedoptim.Adam(
        [p], betas=(0.5, 0.5), amsgrad=True, state_dtype={"exp_avg_sq": "int8"}, backend=kernels.backend
    )
    o.state[p] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq_q8": codes.clone(),
        "exp_avg_sq_scale": scales.clone(),
        "max_exp_avg_sq": torch.zeros_like(p),
    }
    p.grad = torch.zeros_like(p)
    o.step()
    assert_same_numbers(o.state[p]["max_exp_avg_sq"], reference.decode("q8_squares", codes, scales) * 0.5)

"""The random bits that numbers are rounded with, on every backend. A test module that imports this one's names defines
the fixture ``kernels`` (see device.py).

A step does not show its bits, but whether the carry of a sum with them rounds up. A step that is taken again, its
count as it was, has them again: 16 steps find 16 bits by halving."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import spelled
import torch
from cases import assert_same_optimizers
from device import Kernels
from layouts import LAYOUTS
from torch import Tensor

import fusedoptim
from fusedoptim import _members
from fusedoptim._random_places import Place

Made = tuple[list[torch.nn.Parameter], fusedoptim.FusedOptimizer]
BASE = 0x3F800000  # of 1, above which the lower half decides
ROUNDED = {"state_dtype": torch.bfloat16, "rounding": "stochastic"}


def made(kernels: Kernels, tensors: list[Tensor], **options: Any) -> Made:
    """A parameter and a momentum each, which are rounded with the first half of their first words and the first of
    their second."""
    params = [torch.nn.Parameter(t) for t in tensors]
    return params, fusedoptim.SGD(params, lr=1.0, momentum=0.9, backend=kernels.backend, **{**ROUNDED, **options})


def bits_used(made: Made, step: int) -> list[tuple[Tensor, Tensor]]:
    """Of each parameter and of its momentum in the step of this number, int64, contiguous."""
    params, optimizer = made
    found = [[torch.zeros(p.shape, dtype=torch.int64) for _ in range(2)] for p in params]
    for k in reversed(range(16)):
        shown = [[torch.zeros(0)] * 2 for _ in params]
        for which in range(2):  # what the gradient is made for
            for i, p in enumerate(params):
                with torch.no_grad():
                    p.fill_(-0.0)
                optimizer.state[p] = {"step": torch.tensor(float(step - 1))}
                below = BASE + (1 << 16) - (found[i][which] | 1 << k)
                g = -below.to(torch.int32).view(torch.float32)
                p.grad = None
                data, p.data = p.data, p.data.float()
                p.grad, p.data = torch.empty_like(p).copy_(g), data
            optimizer.step()
            for i, p in enumerate(params):
                shown[i][which] = (p if which == 0 else optimizer.state[p]["momentum_buffer"]).detach().clone()
        for i in range(len(params)):
            for which in range(2):
                found[i][which] |= (shown[i][which].contiguous().abs() > 1).long() << k
    return [(a, b) for a, b in found]


def expected(p: Tensor, half: int, place: Place, step: int, seed: int) -> Tensor:
    """By the other spelling, element by element."""
    index = np.full(tuple(p.shape), place.first, np.int64)
    strides = place.strides or tuple(torch.empty(p.shape, device="meta").stride())
    for d, n in enumerate(p.shape):
        index += (np.arange(n) * strides[d]).reshape([-1 if k == d else 1 for k in range(p.dim())])
    words, stream = np.zeros(index.shape, np.uint32), spelled.stream(seed, place.id, step)
    for upper in np.unique(index >> 32).tolist():
        there = index >> 32 == upper
        words[there] = spelled.random_words(upper, index[there] & 0xFFFFFFFF, stream, half // 2)
    return torch.from_numpy((words >> half % 2 * 16 & 0xFFFF).astype(np.int64))


def check(made: Made, places: list[Place], step: int, seed: int = 0) -> None:
    for p, place, found in zip(made[0], places, bits_used(made, step), strict=True):
        for half, bits in zip((0, 2), found, strict=True):
            assert torch.equal(bits, expected(p, half, place, step, seed)), (tuple(p.shape), half, place)


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("step", "seed", "threads"), [(1, 0, 1), (2, 0, 2), (65_537, 5, 3), (16_777_215, 2**53 - 1, 7)]
)
def test_the_bits_of_the_counter(kernels: Kernels, step: int, seed: int, threads: int) -> None:
    """Of every parameter by its number, for vectors' bodies and tails, and tensors that several threads share."""
    if kernels.slow and step != 65_537:
        pytest.skip("takes too long where programs take milliseconds")
    torch.set_num_threads(threads)
    sizes = [1, 0, 33] if kernels.slow else [1, 0, 17, 1023, 4099, 70_001]
    found = made(kernels, [bf16(n) for n in sizes], rounding_seed=seed)
    check(found, [Place(i, 0, None) for i in range(len(sizes))], step, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_count_in_logical_order(kernels: Kernels, layout: str) -> None:
    if kernels.slow and layout not in ("channels_last", "slice"):
        pytest.skip("takes too long where programs take milliseconds")
    shapes = [(2, 3, 4, 5)] if kernels.slow else [(2, 3, 4, 5), (4, 8, 17, 9), (1, 3, 1, 700)]
    found = made(kernels, [LAYOUTS[layout](bf16(*s)) for s in shapes])
    check(found, [Place(i, 0, None) for i in range(len(shapes))], 3)


#: Where shards begin in their whole tensors: below, at and above the borders of the counter's upper half.
FIRST = [2**32 - 500, 2**32, 3 * 2**32 - 1, 2**40 + 12_345]


@pytest.mark.parametrize("first", FIRST)
def test_indices_of_more_than_32_bits(kernels: Kernels, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.slow and first not in FIRST[::3]:
        pytest.skip("takes too long where programs take milliseconds")
    place = Place(2**64 - 3, first, None)
    monkeypatch.setattr(_members, "place_of", lambda p, its_id: place)
    n = 1030 if kernels.slow else 20_011
    check(made(kernels, [bf16(n)]), [place], 1)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_beyond_32_bits(
    kernels: Kernels, param: torch.dtype, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a loop of its own steps the parameter and draws bits for the moment: all have the gradient's dtype."""
    if kernels.slow and first not in FIRST[::3]:
        pytest.skip("takes too long where programs take milliseconds")
    monkeypatch.setattr(_members, "place_of", lambda p, its_id: Place(7, first, None))
    draw, rounding = torch.Generator().manual_seed(first), "stochastic" if param == torch.bfloat16 else "auto"
    shape = (10, 500) if kernels.slow else (40, 500)
    x, *gradients = (torch.randn(shape, generator=draw).to(param) for _ in range(3))
    a, b = (
        fusedoptim.AdamW([torch.nn.Parameter(x.clone())], backend=backend, state_dtype="int8", rounding=rounding)
        for backend in (kernels.backend, "reference")
    )
    for g in gradients:
        for o in (a, b):
            o.param_groups[0]["params"][0].grad = g.clone()
            o.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
@pytest.mark.parametrize("first", FIRST[::2])
def test_shards_of_an_inner_dimension(
    kernels: Kernels, first: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose rows are apart in the whole tensor, some of them on either side of a border."""
    if kernels.slow and (first != FIRST[0] or layout == "slice"):
        pytest.skip("takes too long where programs take milliseconds")
    place = Place(7, first, (5_001, 1_000, 1))
    monkeypatch.setattr(_members, "place_of", lambda p, its_id: place)
    check(made(kernels, [LAYOUTS[layout](bf16(*((3, 2, 40) if kernels.slow else (9, 5, 333))))]), [place], 1)


def test_a_seed_a_parameter_and_a_step_have_bits_of_their_own(kernels: Kernels) -> None:
    if kernels.slow:
        pytest.skip("takes too long where programs take milliseconds")
    found = bits_used(made(kernels, [bf16(256), bf16(256)]), 1)
    found += bits_used(made(kernels, [bf16(256), bf16(256)]), 2)
    found += bits_used(made(kernels, [bf16(256), bf16(256)], rounding_seed=1), 1)
    distinct = [bits for pair in found for bits in pair]
    for i, a in enumerate(distinct):
        for b in distinct[:i]:
            assert (a == b).float().mean() < 0.05

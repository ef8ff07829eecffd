"""What the ways to store numbers in fewer bits promise whoever trains with them."""

from __future__ import annotations

import pytest
import spelled
import torch
from cases import force_grad
from storage_tests import BLOCKS, SEED, any_bits, assert_same_numbers, f32, random_bits

import fusedoptim
from fusedoptim import reference


def round_trip(storage: str, x: torch.Tensor, random: torch.Tensor | None = None) -> torch.Tensor:
    return reference.decode(storage, *reference.encode(storage, x, random))


def test_a_remainder_keeps_every_number() -> None:
    """Infinities and zeros of both signs included. Every NaN is one, and none an infinity or 0."""
    x = any_bits()[: 1 << 20]
    found = round_trip("bf16_remainder", x)
    assert_same_numbers(found, x)
    assert (spelled.bits(found[x.isnan()]) == 0x7FC00000).all()
    elements, _ = reference.encode("bf16_remainder", f32(torch.tensor([0x7FFFFFFF, 0xFFFFFFFF])), None)
    assert elements.isnan().all()


def test_the_upper_part_is_the_nearest_16_bits() -> None:
    """Ties go away from zero."""
    x = any_bits()[: 1 << 20]
    x = x[x.isfinite()].double()
    elements, _ = reference.encode("bf16_remainder", x.float(), None)
    moved = (elements.double() - x).abs()
    half = torch.ldexp(torch.ones_like(x), torch.frexp(x)[1].clamp(min=-125) - 9)
    assert (moved <= half).logical_or(elements.isinf()).all()
    tied = (moved == half) & elements.isfinite()
    assert tied.sum() > 1000 and (elements.double().abs() > x.abs())[tied].all()


def test_8_bits_more_keep_24() -> None:
    x = any_bits()[: 1 << 20]
    found = round_trip("bf16_remainder8", x)
    keeps = x.isfinite() & found.isfinite()
    off = (found.double() - x.double()).abs()[keeps]
    assert (off <= torch.ldexp(torch.ones_like(off), torch.frexp(x[keeps].double())[1].clamp(min=-125) - 17)).all()
    assert torch.equal(found.isnan(), x.isnan()) and (found[x.isinf()] == x[x.isinf()]).all()
    assert_same_numbers(round_trip("bf16_remainder8", found), found)


@pytest.mark.parametrize("master", ["remainder", "remainder8", torch.float32], ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_weight_that_is_set_to_zero_is_zero(master: object, zero: float) -> None:
    """Whatever the state had of it: also where that was negative, from which a sum would make a NaN."""
    for value in (1.0 - 2.0**-12, 1.0 + 2.0**-12):
        p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        o = fusedoptim.SGD([p], lr=1.0, master=master)
        force_grad(p, torch.full((40,), 1 - value))
        o.step()
        if master == "remainder":
            assert o.state[p]["param_remainder"].view(torch.int16).unique().tolist() != [0]
        p.data.fill_(zero)
        force_grad(p, torch.zeros(40))
        o.step()
        rest = 0.0 if master is torch.float32 or value < 1 else 2.0**-126  # below every number that is not denormal
        assert p.detach().abs().max() <= rest
        force_grad(p, torch.full((40,), -0.5))
        o.step()
        assert (p == 0.5).all()


@pytest.mark.parametrize("storage", ["bf16_stochastic", "q8_stochastic", "q8_squares_stochastic"])
def test_stochastic_rounding_is_right_on_average(storage: str) -> None:
    """Every number by itself, over 2^12 roundings; to nearest most are off."""
    draw = torch.Generator().manual_seed(3)
    magnitudes = torch.ldexp(1 + torch.rand(1024, generator=draw), torch.randint(-9, 0, (1024,), generator=draw))
    x = magnitudes if storage.startswith("q8_squares") else magnitudes * torch.randn(1024, generator=draw).sign()
    x[::128] = 1.0
    x, rounds = x.view(8, 128), 1 << 12
    rare = (x.abs() + 0.07) / 16 * 8 / rounds  # a step up that hardly ever comes has hardly any spread
    total, squares = torch.zeros(8, 128).double(), torch.zeros(8, 128).double()
    for step in range(rounds // 256):
        many = x.repeat(256, 1)
        bits = torch.from_numpy(spelled.random_halves(many.numel(), spelled.stream(SEED, 0, step), 1))
        found = round_trip(storage, many, bits.view(many.shape)).double().view(256, 8, 128)
        total += found.sum(0)
        squares += found.square().sum(0)
    mean = total / rounds
    spread = (squares / rounds - mean.square()).clamp(min=0).sqrt()
    most = 5 * spread / rounds**0.5 + rare
    assert ((mean - x).abs() <= most).all()
    to_nearest = storage.removesuffix("_stochastic")
    nearest = round_trip(to_nearest, x) if to_nearest != "bf16" else x.to(torch.bfloat16).float()
    assert ((nearest - x).abs() > most).float().mean() > 0.5


@pytest.mark.parametrize("storage", BLOCKS)
def test_the_steps_of_codes(storage: str) -> None:
    """Each is a 16th or a 32nd of a number and a unit, to nearest half of that; 0 is 0, and no square above it is."""
    squares, stochastic = storage.startswith("q8_squares"), storage.endswith("_stochastic")
    mantissa, _, top = spelled.FORMATS[squares]
    draw = torch.Generator().manual_seed(4)
    x = torch.ldexp(1 + torch.rand(64, 1280, generator=draw), torch.randint(-40, 0, (64, 1280), generator=draw))
    x = x if squares else x * torch.randn(64, 1280, generator=draw).sign()
    x[::3, ::7] = 0.0
    found = round_trip(storage, x, random_bits(x, 1))
    unit = (x.view(64, -1, 128).abs().amax(2) / top).repeat_interleave(128, 1)
    assert (found[x == 0] == 0).all()
    step = (torch.maximum(x.abs(), found.abs()) + unit) / 2**mantissa * (1 + 1e-6)
    least = unit / 2**mantissa * (1 + 1e-6)  # which no square is below
    raised = (x < least) & (found <= least)
    within = (found - x).abs() <= step * (1 if stochastic else 0.5)
    assert (within | raised if squares else within).all()


def test_no_square_is_lost_whatever_its_block() -> None:
    """Not even the smallest number beside the largest, hence no quotient by 0."""
    x = torch.tensor([1e-45, 1e-38, 1e-30, 1e-12, 1.0, 1e10, 3.4e38, 0.0])
    for largest in x[x > 0]:
        block = x.clamp(max=largest).repeat(4, 16)
        for storage in ("q8_squares", "q8_squares_stochastic"):
            found = round_trip(storage, block, torch.zeros(block.shape, dtype=torch.int64))
            assert torch.equal(found > 0, block > 0)


@pytest.mark.parametrize("squares", [False, True])
def test_no_code_is_beyond_the_largest(squares: bool) -> None:
    """Whatever the largest number of a block and the random bits, so that kernels need not look. Exponents change
    nothing: all is scaled by powers of two."""
    mantissa, largest, top = spelled.FORMATS[squares]
    x = f32(torch.arange(1 << 23) | 127 << 23)
    scaled = x * (torch.tensor(top, dtype=torch.float32) / x) + 1
    codes = spelled.bits(scaled) - 0x3F800000 + (0xFFFF << 7 - mantissa) >> 23 - mantissa
    assert (codes == largest).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_one_number_that_is_none_makes_its_block_loud_and_no_other(bad: float) -> None:
    p = torch.nn.Parameter(torch.ones(4, 1100))
    o = fusedoptim.AdamW([p], state_dtype="int8")
    p.grad = torch.full_like(p, 0.5)
    o.step()
    p.grad[2, 700] = bad
    o.step()
    loud = torch.zeros(4, 9, dtype=torch.bool)
    loud[2, 700 // 128] = True
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(o.state[p][name + "_scale"].isnan(), loud)
    p.grad = torch.full_like(p, 0.5)
    o.step()
    of_elements = loud.repeat_interleave(128, 1)[:, :1100]
    assert torch.equal(p.isnan(), of_elements)

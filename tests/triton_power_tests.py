"""The powers that rules take of numbers, in Triton's language, against the C library's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusedoptim.triton_kernels.arithmetic import general_power

_DRAW = np.random.default_rng(0)
_N = 100
BASES = {
    "decays": 1 - 10 ** _DRAW.uniform(-5, -1, _N),
    "0.96": np.full(_N, 0.96),
    "large": 10 ** _DRAW.uniform(0, 6, _N),
    "tiny": 10 ** _DRAW.uniform(-307, -300, _N),
}
EXPONENTS = {
    "steps": np.floor(10 ** _DRAW.uniform(0, 5, _N)),
    "any": 10 ** _DRAW.uniform(-2.4, 5, _N),
    "0.004": np.full(_N, 0.004),
    "0.5": np.full(_N, 0.5),
    "0.75": np.full(_N, 0.75),
    "-0.8": np.full(_N, -0.8),
    "negative": -(10 ** _DRAW.uniform(-2.4, 3.4, _N)),
}


@triton.jit
def powers(x, y, out, n):
    for i in range(n):
        tl.store(out + i, general_power(tl.load(x + i), tl.load(y + i)))


def power(x: float, y: float) -> float:
    try:
        return math.pow(x, y)
    except OverflowError:
        return math.inf


def of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = torch.zeros(len(x), dtype=torch.float64)
    powers[(1,)](torch.from_numpy(x.copy()), torch.from_numpy(y.copy()), out, len(x))
    return out.numpy()


@pytest.mark.parametrize("exponents", EXPONENTS)
@pytest.mark.parametrize("bases", BASES)
def test_powers_are_within_four_units(bases: str, exponents: str) -> None:
    x, y = BASES[bases], EXPONENTS[exponents]
    got, wanted = of(x, y), np.array([power(a, b) for a, b in zip(x, y, strict=True)])
    with np.errstate(all="ignore"):
        assert np.array_equal(got.astype(np.float32), wanted.astype(np.float32))
        normal = np.isfinite(wanted) & (wanted > 1e-290)
        error = np.abs(got - wanted)[normal] / np.spacing(wanted[normal])
    assert error.max(initial=0.0) <= 4


def test_powers_of_what_is_no_ordinary_number() -> None:
    x = np.array([0.0, 0.0, 0.0, math.inf, math.inf, -2.0, -2.0, -1e200, math.nan, 2.0, 1.0, 5e-324])
    y = np.array([0.25, -0.25, 0.0, 0.25, -3.0, 3.0, 2.0, 3.0, 1.5, 5000.0, 0.3, 0.25])
    with np.errstate(all="ignore"):
        got = of(x, y)
    assert np.array_equal(
        got, [0.0, math.inf, 1.0, math.inf, 0.0, -8.0, 4.0, -math.inf, math.nan, math.inf, 1.0, 5e-324**0.25], True
    )

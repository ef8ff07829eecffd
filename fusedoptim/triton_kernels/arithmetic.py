"""Operations with one stated rounding each, and the arithmetic that rules share (csrc/rules/common.h)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .codec import bf16_bits, load_f64, load_i64, load_where


@triton.jit
def divide(a, b):
    """Triton's own ``/`` is not IEEE's for fp32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    """NaN if either is."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def minimum(a, b):
    """NaN if either is."""
    return tl.where((a != a) | (a < b), a, b)


@triton.jit
def sign(x):
    """0 for a zero of either sign and for a NaN, as torch.sign."""
    one = tl.full(x.shape, 1.0, x.dtype)
    return tl.where(x > 0.0, one, 0.0) - tl.where(x < 0.0, one, 0.0)


@triton.jit
def copysign(size, sign):
    if size.dtype == tl.float64:
        bits = (size.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) | (sign.to(tl.int64, bitcast=True) & (-1 << 63))
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (sign.to(tl.int32, bitcast=True) & -0x80000000)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def double(x: tl.constexpr):
    return tl.full((), x, tl.float64)


# ---- powers, as csrc/core/power.h works them out on a device: in double-double, rounded once ----


@triton.jit
def _multiply(a_hi, a_lo, b_hi, b_lo):
    p = a_hi * b_hi
    e = tl.fma(a_hi, b_hi, p * -1.0)
    e = tl.fma(a_hi, b_lo, e)
    e = tl.fma(a_lo, b_hi, e)
    s = p + e
    return s, e - (s - p)


@triton.jit
def power(x, n):
    """x**n for a whole number n >= 0, both fp64. What overflows is infinite."""
    hi, lo = double(1.0), double(0.0)
    square_hi, square_lo = tl.abs(x), double(0.0)
    count = n.to(tl.int64)
    left = count
    while left > 0:
        if left % 2 == 1:
            hi, lo = _multiply(hi, lo, square_hi, square_lo)
        left = left // 2
        square_hi, square_lo = _multiply(square_hi, square_lo, square_hi, square_lo)
    hi = tl.where((hi != hi) & (x == x), float("inf"), hi)  # the lower part of an infinity is NaN
    return tl.where((x < 0.0) & (count % 2 == 1), hi * -1.0, hi)


@triton.jit
def _scaled_by_power_of_two(x, k):
    return x * ((k + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _small_power(x, y):
    """x**y for |y| <= 1/2. x is m * 2**e, sqrt(1/2) <= m < sqrt(2), and y*e exact as the sum of two: the logarithm of a
    large x by itself would lose as many bits as it has before the point."""
    tiny = x < 2.2250738585072014e-308
    bits = tl.where(tiny, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)  # 2^54
    e = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (e << 52)).to(tl.float64, bitcast=True)
    e = tl.where(tiny, e - 54, e).to(tl.float64)
    hi = y * e
    lo = tl.fma(y, e, hi * -1.0)
    whole = tl.floor(hi + 0.5)
    result = tl.exp2((hi - whole) + (lo + y * tl.log2(m)))
    result = _scaled_by_power_of_two(result, whole.to(tl.int64))
    return tl.where((x > 0.0) & (x < float("inf")), result, tl.exp2(y * tl.log2(x)))


@triton.jit
def general_power(x, y):
    """x**y, both fp64: the whole part of y as above, what is left of it by logarithms. Within four units in the last
    place of fp64: of 10^8 results that are rounded to fp32 one may be another. What overflows is infinite."""
    whole = tl.floor(y + 0.5)
    result = power(x, tl.abs(whole))
    if whole < 0.0:
        result = 1.0 / result
    rest = y - whole
    if rest != 0.0:
        result *= _small_power(x, rest)
    return result


# ---- hyper-parameters: a group's row starts with lr, the dtype that lr has, and what every group can have ----


@triton.jit
def hyper(row, COLUMN: tl.constexpr):
    return load_f64(row + 8 * COLUMN)


@triton.jit
def lr_dtype(row):
    """0: a Python number; else that of a tensor."""
    return hyper(row, L.LR_DTYPE).to(tl.int32) % L.LR_ON_DEVICE


@triton.jit
def lr_value(row):
    value = hyper(row, L.LR)
    if hyper(row, L.LR_DTYPE) >= L.LR_ON_DEVICE:
        address = load_i64(row + 8 * L.LR)
        dtype = lr_dtype(row)
        if dtype == L.LR_F32:
            value = load_where(address, 0, True, L.F32, tl.float64)
        elif dtype == L.LR_F64:
            value = load_where(address, 0, True, L.F64, tl.float64)
        elif dtype == L.LR_BF16:
            value = load_where(address, 0, True, L.BF16, tl.float64)
        else:
            value = load_where(address, 0, True, L.F16, tl.float64)
    return value


@triton.jit
def _lr_rounded(x, dtype):
    """An fp32 result in the dtype of lr."""
    as_bf16 = bf16_bits(x).to(tl.float32, bitcast=True)
    return tl.where(dtype == L.LR_BF16, as_bf16, tl.where(dtype == L.LR_F16, x.to(tl.float16).to(tl.float32), x))


# What is computed with a learning rate that is a tensor, or a number that follows from it: rounded to its dtype, as
# torch does. With one that is a number, rules compute in double.


@triton.jit
def _lr_result(row, in_double, in_fp32):
    dtype = lr_dtype(row)
    return tl.where(dtype == L.LR_F64, in_double, _lr_rounded(in_fp32, dtype).to(tl.float64))


@triton.jit
def lr_add(row, x, y):
    return _lr_result(row, x + y, x.to(tl.float32) + y.to(tl.float32))


@triton.jit
def lr_sub(row, x, y):
    return _lr_result(row, x - y, x.to(tl.float32) - y.to(tl.float32))


@triton.jit
def lr_mul(row, x, y):
    return _lr_result(row, x * y, x.to(tl.float32) * y.to(tl.float32))


@triton.jit
def lr_div(row, x, y):
    return _lr_result(row, x / y, tl.div_rn(x.to(tl.float32), y.to(tl.float32)))


# ---- what updates share ----


@triton.jit
def lerp_weight(weight, T: tl.constexpr):
    """torch.lerp's two formulas: the coefficient, and whether it starts from ``start``."""
    w = weight.to(T)
    small = tl.abs(w) < 0.5
    return tl.where(small, w, w - 1.0), small


@triton.jit
def lerp(start, end, coefficient, from_start):
    return tl.fma(spread(coefficient, end), end - start, tl.where(from_start, start, end))


@triton.jit
def spread(x, like):
    """A scalar in every element, for functions that do not do it themselves."""
    return tl.broadcast_to(x, like.shape)

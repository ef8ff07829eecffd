"""Elements in storages that are no dtype and have no blocks, as values of the compute type: see csrc/core/storage.h.
What a storage keeps beside an element is called its rest here."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .codec import decode, encode


@triton.jit
def rest_pointer(address, D: tl.constexpr):
    if D == L.BF16_REMAINDER:
        return address.to(tl.pointer_type(tl.int16))
    elif D == L.BF16_REMAINDER8:
        return address.to(tl.pointer_type(tl.int8))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def join(x, rest):
    """An element of 16 bits, and what is to be added to it, int32. A weight that somebody set to 0 is 0."""
    upper = x.to(tl.int32) << 16
    rest = tl.where(((upper & 0x7FFFFFFF) == 0) & (rest < 0), 0, rest)
    return (upper + rest).to(tl.float32, bitcast=True)


@triton.jit
def decode_stored(x, rest, D: tl.constexpr, T: tl.constexpr):
    if D == L.BF16_STOCHASTIC:
        return decode(x, L.BF16, T)
    elif D == L.BF16_REMAINDER:
        return join(x, rest.to(tl.int32)).to(T)
    elif D == L.BF16_REMAINDER8:
        return join(x, rest.to(tl.int32) << 8).to(T)
    elif D == L.BF16_MASTER:  # where somebody wrote another element since, that is the number
        return tl.where(encode(rest, L.BF16) == x, rest, decode(x, L.BF16, tl.float32)).to(T)
    elif D == L.F16_MASTER:
        rounded = encode(rest, L.F16).to(tl.int16, bitcast=True)
        return tl.where(rounded == x, rest, x.to(tl.float16, bitcast=True).to(tl.float32)).to(T)
    else:
        return decode(x, D, T)


@triton.jit
def _is_nan(u):
    return (u & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def rounded_stochastically(x, random):
    """The result in the upper half of a uint32. random: 16 bits. A NaN is made quiet."""
    u = x.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(_is_nan(u), u | 0x400000, u + random)


@triton.jit
def splittable(x, D: tl.constexpr):
    """The bits that two parts keep; all NaNs become one."""
    u = x.to(tl.float32).to(tl.uint32, bitcast=True)
    u = tl.where(_is_nan(u), 0x7FC00000, u)
    return (u + 0x7F + ((u >> 8) & 1)) & 0xFFFFFF00 if D == L.BF16_REMAINDER8 else u


@triton.jit
def encode_stored(x, random, D: tl.constexpr):
    """Elements and rests; where nothing is kept beside, the rests are the elements. random: 16 bits, for what is
    rounded stochastically."""
    if D == L.BF16_STOCHASTIC:
        element = (rounded_stochastically(x, random) >> 16).to(tl.int16)
        return element, element
    elif D == L.BF16_REMAINDER:
        u = splittable(x, D)
        return ((u + 0x8000) >> 16).to(tl.int16), u.to(tl.int16)
    elif D == L.BF16_REMAINDER8:
        u = splittable(x, D)
        return ((u + 0x8000) >> 16).to(tl.int16), (u >> 8).to(tl.int8)
    elif D == L.BF16_MASTER:
        return encode(x, L.BF16), x.to(tl.float32)
    elif D == L.F16_MASTER:
        return encode(x, L.F16).to(tl.int16, bitcast=True), x.to(tl.float32)
    else:
        element = encode(x, D)
        return element, element


@triton.jit
def as_stored(x, random, D: tl.constexpr, T: tl.constexpr):
    """A parameter as it reads once it was stored."""
    if D == L.BF16_STOCHASTIC:
        return (rounded_stochastically(x, random) & 0xFFFF0000).to(tl.float32, bitcast=True).to(T)
    elif (D == L.BF16_REMAINDER) | (D == L.BF16_REMAINDER8):
        return splittable(x, D).to(tl.float32, bitcast=True).to(T)
    elif (D == L.BF16_MASTER) | (D == L.F16_MASTER):
        return x
    else:
        return decode(encode(x, D), D, T)

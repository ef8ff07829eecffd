"""Numbers in 8 bits: codes, and a scale for each block of a row. See csrc/core/block.h. Here blocks are the rows of two
dimensions, whatever the tensor's are."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import divide


@triton.jit
def scale_pointer(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def decode_blocks(codes, scales, D: tl.constexpr):
    """codes: int8, also where they stand for uint8. scales: of each, or of their rows, with a second dimension of 1."""
    code = codes.to(tl.int32)
    if D >= L.Q8_SQUARES:
        unit = scales * (1.0 / 63487.0)
        size = (0x3F800000 + ((code & 0xFF) << 19)).to(tl.float32, bitcast=True) - 1.0
        return size * unit
    else:
        unit = scales * (1.0 / 14.75)
        size = (0x3F800000 + (tl.abs(code) << 18)).to(tl.float32, bitcast=True) - 1.0
        x = (size * unit).to(tl.int32, bitcast=True)
        return (x ^ (code & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def encode_blocks(x, random, D: tl.constexpr):
    """Codes, as int8, and scales. x: fp32, zeros where a block has no elements. random: 16 bits, for what is rounded
    stochastically."""
    u = x.to(tl.int32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    largest = tl.max(magnitude, 1)
    scale = largest.to(tl.float32, bitcast=True)
    tiny = tl.full(scale.shape, 7.888609052210118e-31, tl.float32)  # 2^-100
    scale = tl.where(largest == 0, 0.0, tl.where(scale < tiny, tiny, scale))
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)  # loud: all of the block is NaN
    empty = (largest == 0) | (largest >= 0x7F800000)
    if D >= L.Q8_SQUARES:
        TOP: tl.constexpr = 63487.0
        SHIFT: tl.constexpr = 19  # 23 less the bits of a code's mantissa
        LARGEST: tl.constexpr = 255
    else:
        TOP: tl.constexpr = 14.75
        SHIFT: tl.constexpr = 18
        LARGEST: tl.constexpr = 127
    top = tl.full(scale.shape, TOP, tl.float32)
    inverse = tl.where(empty, 0.0, divide(top, tl.where(empty, 1.0, scale)))
    rounding = 1 << (SHIFT - 1)
    if (D == L.Q8_STOCHASTIC) | (D == L.Q8_SQUARES_STOCHASTIC):
        rounding = (random << (SHIFT - 16)).to(tl.int32)
    scaled = magnitude.to(tl.float32, bitcast=True) * inverse[:, None] + 1.0
    code = (scaled.to(tl.int32, bitcast=True) - 0x3F800000 + rounding) >> SHIFT
    code = tl.minimum(code, LARGEST)
    if D >= L.Q8_SQUARES:
        code = tl.where((code == 0) & (magnitude > 0), 1, code)
    else:
        code = tl.where(u < 0, 0 - code, code)
    return tl.where(empty[:, None], 0, code).to(tl.int8), scale


# ---- where they are ----


@triton.jit
def blocks_of_row(row):
    return (row + L.BLOCK - 1) // L.BLOCK


@triton.jit
def blocks_before(i, row):
    """How many blocks begin before element i of a tensor."""
    return i // row * blocks_of_row(row) + (i % row + L.BLOCK - 1) // L.BLOCK


@triton.jit
def block_of(i, row):
    """The block of element i of a tensor."""
    return i // row * blocks_of_row(row) + i % row // L.BLOCK


@triton.jit
def elements_of(block, row):
    """The elements of blocks, and which of them exist: the last block of a row may be shorter."""
    per_row = blocks_of_row(row)
    within = (block % per_row * L.BLOCK)[:, None] + tl.arange(0, L.BLOCK)[None, :]
    return (block // per_row * row)[:, None] + within, within < row

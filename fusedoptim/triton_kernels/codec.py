"""Between memory and registers: words of tables, and elements of a dtype as values of the compute type."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from . import layout as L

#: Elements are read and written once per step.
EVICT = tl.constexpr("evict_first")
#: Triton's interpreter truncates where devices round. (Triton reads the variable when it is imported.)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_i64(address):
    return tl.load(address.to(tl.pointer_type(tl.int64)))


@triton.jit
def load_i32(address):
    return tl.load(address.to(tl.pointer_type(tl.int32)))


@triton.jit
def load_f32(address):
    return tl.load(address.to(tl.pointer_type(tl.float32)))


@triton.jit
def load_f64(address):
    return tl.load(address.to(tl.pointer_type(tl.float64)))


@triton.jit
def pointer(address, D: tl.constexpr):
    """Of elements. bf16 is handled as integers, which neither interpreters nor compilers do arithmetic of their own
    with, and so is what is no number by itself."""
    if D == L.F32:
        return address.to(tl.pointer_type(tl.float32))
    elif D == L.F64:
        return address.to(tl.pointer_type(tl.float64))
    elif D == L.F16:
        return address.to(tl.pointer_type(tl.float16))
    else:
        return address.to(tl.pointer_type(tl.int8 if D >= L.Q8 else tl.int16))


@triton.jit
def decode(x, D: tl.constexpr, T: tl.constexpr):
    if D == L.BF16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(T)
    else:
        return x.to(tl.float32).to(T) if D == L.F16 else x.to(T)


@triton.jit
def bf16_bits(x):
    """An fp32 value rounded to bf16, nearest, ties to even, in the upper half of a uint32. NaNs stay NaNs."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = u + 0x7FFF + ((u >> 16) & 1)
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, u | 0x400000, rounded) & 0xFFFF0000


@triton.jit
def encode(x, D: tl.constexpr):
    """fp64 goes to 16 bits through fp32, as torch converts it. The device's conversion to bf16 is one instruction for
    two elements, where rounding in integers takes a dozen."""
    if D == L.F64:
        return x.to(tl.float64)
    elif D == L.F32:
        return x.to(tl.float32)
    elif D == L.BF16:
        if INTERPRETED:
            return (bf16_bits(x.to(tl.float32)) >> 16).to(tl.int16)
        else:
            return x.to(tl.float32).to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        return x.to(tl.float32).to(tl.float16)


@triton.jit
def load_where(address, offsets, inside, D: tl.constexpr, T: tl.constexpr):
    """Elements of a dtype at offsets, 0 outside."""
    return decode(tl.load(pointer(address, D) + offsets, mask=inside, other=0), D, T)


@triton.jit
def strided_offsets(layout, i, K: tl.constexpr):
    """Where operand K keeps the logical elements i. A layout is the number of dimensions, then for each, the innermost
    first, its size and the strides of all operands and of the index (L.INDEX)."""
    offsets = i * 0
    dims = load_i64(layout)
    dim = layout + 8
    for d in range(dims):
        size = load_i64(dim)
        index = tl.where(d + 1 < dims, i % size, i)
        offsets += index * load_i64(dim + 8 + 8 * K)
        i = i // size
        dim += 8 * L.LAYOUT_WORDS_PER_DIM
    return offsets

"""All operands of an entry, between memory and registers. What is not used is zeros.

The elements of a tile lie side by side, at an aligned address; those of a piece may lie anywhere, and some may be
missing. Where an operand is in blocks, tiles and pieces have two dimensions, and a block is a row."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .blocks import decode_blocks, encode_blocks, scale_pointer
from .codec import EVICT, load_i64, pointer, strided_offsets
from .random_bits import random_half
from .storages import decode_stored, encode_stored, rest_pointer


@triton.jit
def addresses_of(entry, grad):
    """Of the elements."""
    found = (load_i64(entry + L.ENTRY_OPERANDS + L.OPERAND_DATA), grad)
    for k in tl.static_range(L.FIRST_STATE, L.OPERANDS):
        found = found + (load_i64(entry + L.ENTRY_OPERANDS + k * L.OPERAND_BYTES + L.OPERAND_DATA),)
    return found


@triton.jit
def rests_of(entry, addresses, KIND: tl.constexpr):
    """The addresses of what is kept beside them; where nothing is, those of the elements."""
    found = ()
    for k in tl.static_range(L.OPERANDS):
        if ((KIND >> L.WIDTH * k) & L.MASK) >= L.BF16_REMAINDER:
            found = found + (load_i64(entry + L.ENTRY_OPERANDS + k * L.OPERAND_BYTES + L.OPERAND_EXTRA),)
        else:
            found = found + (addresses[k],)
    return found


@triton.jit
def are_aligned(addresses, rests, KIND: tl.constexpr):
    """Whether all begin at multiples of 16 bytes, but for the scales of blocks."""
    every = addresses[0]
    for k in tl.static_range(1, L.OPERANDS):
        every |= addresses[k]  # what is not used has a null address
    for k in tl.static_range(L.OPERANDS):
        if (((KIND >> L.WIDTH * k) & L.MASK) >= L.BF16_REMAINDER) & (((KIND >> L.WIDTH * k) & L.MASK) < L.Q8):
            every |= rests[k]
    return (every & 15) == 0


# ---- tiles ----


@triton.jit
def tile_index(N: tl.constexpr, KIND: tl.constexpr):
    """The N elements of a tile, from 0 on."""
    if (KIND >> L.IN_BLOCKS) & 1:
        return tl.arange(0, N // L.BLOCK)[:, None] * L.BLOCK + tl.arange(0, L.BLOCK)[None, :]
    else:
        return tl.arange(0, N)


@triton.jit
def tile_blocks(N: tl.constexpr, KIND: tl.constexpr):
    """Of the elements of tile_index() their blocks, from 0 on, where there are any."""
    if (KIND >> L.IN_BLOCKS) & 1:
        return tl.arange(0, N // L.BLOCK)[:, None]
    else:
        return tl.arange(0, N)


@triton.jit
def load_tile(address, rest, first, index, block, D: tl.constexpr, T: tl.constexpr, POLICY: tl.constexpr):
    """The elements from ``first`` on, whose address is a multiple of 16."""
    x = tl.load(tl.multiple_of(pointer(address, D) + first, 16) + index, eviction_policy=POLICY)
    if D >= L.Q8:
        return decode_blocks(x, tl.load(scale_pointer(rest) + first // L.BLOCK + block), D)
    elif D >= L.BF16_REMAINDER:
        start = tl.multiple_of(rest_pointer(rest, D) + first, 16)
        return decode_stored(x, tl.load(start + index, eviction_policy=POLICY), D, T)
    else:
        return decode_stored(x, x, D, T)


@triton.jit
def store_tile(address, rest, first, index, x, random, D: tl.constexpr):
    start = tl.multiple_of(pointer(address, D) + first, 16)
    if D >= L.Q8:
        codes, scale = encode_blocks(x, random, D)
        tl.store(start + index, codes, eviction_policy=EVICT)
        tl.store(scale_pointer(rest) + first // L.BLOCK + tl.arange(0, index.shape[0]), scale)
    else:
        element, beside = encode_stored(x, random, D)
        tl.store(start + index, element, eviction_policy=EVICT)
        if D >= L.BF16_REMAINDER:
            start = tl.multiple_of(rest_pointer(rest, D) + first, 16)
            tl.store(start + index, beside, eviction_policy=EVICT)


@triton.jit
def load_tiles(
    addresses, rests, first, index, block, KIND: tl.constexpr, T: tl.constexpr, POLICY: tl.constexpr = EVICT
):
    """block: of each element the number of its block, that of the first being 0; or what broadcasts to it."""
    found = ()
    for k in tl.static_range(L.OPERANDS):
        if (KIND >> L.USED + k) & 1:
            found = found + (
                load_tile(addresses[k], rests[k], first, index, block, (KIND >> L.WIDTH * k) & L.MASK, T, POLICY),
            )
        else:
            found = found + (tl.zeros(index.shape, T),)
    return found


@triton.jit
def store_tiles(addresses, rests, first, index, x, words, zero_grad, KIND: tl.constexpr, T: tl.constexpr):
    for k in tl.static_range(L.OPERANDS):
        if k == L.GRAD:
            if zero_grad:
                zeros = tl.zeros(index.shape, T)
                store_tile(addresses[k], rests[k], first, index, zeros, words[0], (KIND >> L.WIDTH * k) & L.MASK)
        elif (KIND >> L.USED + k) & 1:
            random = random_half(words, KIND, k)
            store_tile(addresses[k], rests[k], first, index, x[k], random, (KIND >> L.WIDTH * k) & L.MASK)


# ---- pieces ----


@triton.jit
def offset_of(header, layout, i, K: tl.constexpr):
    """Where an operand keeps the logical elements i."""
    offsets = i
    if layout >= 0:
        offsets = strided_offsets(load_i64(header + L.HEADER_LAYOUTS) + 8 * layout, i, K)
    return offsets


@triton.jit
def offsets_of(header, layout, i, KIND: tl.constexpr):
    found = (offset_of(header, layout, i, 0),)
    for k in tl.static_range(1, L.OPERANDS):
        if (KIND >> L.USED + k) & 1:
            found = found + (offset_of(header, layout, i, k),)
        else:
            found = found + (found[0],)
    return found


@triton.jit
def load_piece(address, rest, offsets, inside, block, exists, D: tl.constexpr, T: tl.constexpr):
    """The elements at offsets, 0 where none is inside. block: of each the number of its block, or what broadcasts to
    it; exists: which of these there are."""
    x = tl.load(pointer(address, D) + offsets, mask=inside, other=0)
    if D >= L.Q8:
        return decode_blocks(x, tl.load(scale_pointer(rest) + block, mask=exists, other=0.0), D)
    elif D >= L.BF16_REMAINDER:
        return decode_stored(x, tl.load(rest_pointer(rest, D) + offsets, mask=inside, other=0), D, T)
    else:
        return decode_stored(x, x, D, T)


@triton.jit
def store_piece(address, rest, offsets, inside, block, exists, x, random, D: tl.constexpr):
    """block: the numbers of the rows that are blocks and exist."""
    if D >= L.Q8:
        codes, scale = encode_blocks(tl.where(inside, x, 0.0), random, D)
        tl.debug_barrier()  # every thread has read the scales
        tl.store(pointer(address, D) + offsets, codes, mask=inside)
        tl.store(scale_pointer(rest) + block, scale, mask=exists)
    else:
        element, beside = encode_stored(x, random, D)
        tl.store(pointer(address, D) + offsets, element, mask=inside)
        if D >= L.BF16_REMAINDER:
            tl.store(rest_pointer(rest, D) + offsets, beside, mask=inside)


@triton.jit
def load_pieces(addresses, rests, offsets, inside, block, exists, KIND: tl.constexpr, T: tl.constexpr):
    found = ()
    for k in tl.static_range(L.OPERANDS):
        if (KIND >> L.USED + k) & 1:
            found = found + (
                load_piece(
                    addresses[k], rests[k], offsets[k], inside, block, exists, (KIND >> L.WIDTH * k) & L.MASK, T
                ),
            )
        else:
            found = found + (tl.zeros(inside.shape, T),)
    return found


@triton.jit
def store_pieces(
    addresses, rests, offsets, inside, block, exists, x, words, zero_grad, KIND: tl.constexpr, T: tl.constexpr
):
    for k in tl.static_range(L.OPERANDS):
        if k == L.GRAD:
            if zero_grad:
                store_piece(
                    addresses[k], rests[k], offsets[k], inside, block, exists, tl.zeros(inside.shape, T), words[0],
                    (KIND >> L.WIDTH * k) & L.MASK,
                )  # fmt: skip
        elif (KIND >> L.USED + k) & 1:
            store_piece(
                addresses[k], rests[k], offsets[k], inside, block, exists, x[k], random_half(words, KIND, k),
                (KIND >> L.WIDTH * k) & L.MASK,
            )  # fmt: skip

"""Sums of squares of tiles, as csrc/core/sum_of_squares.h defines them: of gradients, and of what a rule asks for."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .blocks import block_of
from .codec import decode, load_i64, load_where, pointer, strided_offsets
from .operands import addresses_of, are_aligned, load_pieces, load_tiles, offsets_of, rests_of
from .transforms import grad_transform, row_of, transform_grad
from .update import inputs_of


@triton.jit
def tile_indices(TILES: tl.constexpr):
    """Of the elements of TILES tiles: 8 rows of each, side by side. From Triton 3.8 on a warp gets a tile, a thread all
    eight elements of a column, and the lanes a row, so that sums need no memory. Two dimensions, because with a third
    for the tiles Triton 3.6 gave the rows to the warps."""
    row, column = tl.arange(0, 8), tl.arange(0, TILES * 128)
    return row[:, None] * 128 + (column // 128 * L.TILE + column % 128)[None, :]


@triton.jit
def sum_by_halving(x, TILES: tl.constexpr):
    """Each tile's 1024 numbers, as tile_indices() has them: every i with i+512, then with i+256, and so on."""
    for k in tl.static_range(3):
        x = tl.sum(tl.reshape(x, (2, 4 >> k, TILES * 128)), 0)
    return sum_of_columns(tl.reshape(x, (TILES * 128,)), TILES)


@triton.jit
def sum_of_columns(x, TILES: tl.constexpr):
    """The last seven steps, of the sums of the columns."""
    x = tl.reshape(x, (TILES, 128))
    for k in tl.static_range(7):
        x = tl.sum(tl.reshape(x, (TILES, 2, 64 >> k)), 1)
    return tl.reshape(x, (TILES,))


@triton.jit
def leave_squares(x, sums, TILES: tl.constexpr):
    """Writes the sums of squares of tiles to consecutive places in memory."""
    x = x.to(tl.float64)
    to = sums.to(tl.pointer_type(tl.float64))
    tl.store(to + tl.arange(0, TILES), sum_by_halving(x * x, TILES))


@triton.jit
def gradient_sums(header, entry, grad, begin, end, transforms, sums, KIND: tl.constexpr):
    """Writes the tile sums of a part of the gradient, as `transforms` have it, to consecutive places in memory."""
    D: tl.constexpr = (KIND >> L.WIDTH * L.GRAD) & L.MASK
    T: tl.constexpr = tl.float64 if ((KIND >> L.WIDTH * L.PARAM) & L.MASK) == L.F64 else tl.float32
    TILES: tl.constexpr = 4
    transform = grad_transform(transforms, T)
    grad = grad & L.ADDRESS
    layout = load_i64(entry + L.ENTRY_SUM_LAYOUT)
    aligned = (layout < 0) & ((grad & 15) == 0)
    middle = tl.where(aligned, end - (end - begin) % (TILES * L.TILE), begin)
    for first in range(begin, middle, TILES * L.TILE):
        start = tl.multiple_of(pointer(grad, D) + first, 16)
        x = decode(tl.load(start + tile_indices(TILES)), D, T)  # kept in the cache: the update reads it again
        leave_squares(transform_grad(x, transform), sums + (first - begin) // L.TILE * 8, TILES)
    for first in range(middle, end, L.TILE):
        i = first + tile_indices(1)
        offsets = i
        if layout >= 0:
            offsets = strided_offsets(load_i64(header + L.HEADER_LAYOUTS) + 8 * layout, i, L.GRAD)
        x = load_where(grad, offsets, i < end, D, T)
        leave_squares(transform_grad(x, transform), sums + (first - begin) // L.TILE * 8, 1)


# ---- of a rule that says what is summed ----


@triton.jit
def rule_sums(
    header, entry, grad, begin, end, transforms, sums,
    KIND: tl.constexpr, PREPARE: tl.constexpr, MEASURED: tl.constexpr, NUMBERS: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The same for COUNT sums of a rule from FIRST on; of a second at HEADER_PARTIALS_STRIDE further on. KIND: of what
    they depend on alone."""
    T: tl.constexpr = tl.float64 if ((KIND >> L.WIDTH * L.PARAM) & L.MASK) == L.F64 else tl.float32
    VARIANT: tl.constexpr = (KIND >> L.VARIANT) & L.VARIANT_MASK
    TILES: tl.constexpr = 1  # more would take twice the registers
    unknown = tl.full((), float("nan"), tl.float64)
    c = PREPARE(row_of(header, entry), inputs_of(entry, grad, (unknown, unknown), KIND, NUMBERS), T, VARIANT)
    transform = grad_transform(transforms, T)
    addresses = addresses_of(entry, grad & L.ADDRESS)
    rests = rests_of(entry, addresses, KIND)
    layout = load_i64(entry + L.ENTRY_SUM_LAYOUT)
    row = tl.maximum(load_i64(entry + L.ENTRY_ROW), 1)
    aligned = (layout < 0) & are_aligned(addresses, rests, KIND)
    if (KIND >> L.IN_BLOCKS) & 1:
        aligned &= row % L.BLOCK == 0
    stride = 8 * load_i64(header + L.HEADER_PARTIALS_STRIDE)
    middle = tl.where(aligned, end - (end - begin) % (TILES * L.TILE), begin)
    for first in range(begin, middle, TILES * L.TILE):
        first = tl.multiple_of(first, 16)
        index = tile_indices(TILES)
        x = load_tiles(addresses, rests, first, index, index // L.BLOCK, KIND, T, "")  # the update reads it again
        x = summed_of(x, transform, c, MEASURED, VARIANT)
        for k in tl.static_range(COUNT):
            leave_squares(x[FIRST + k], sums + k * stride + (first - begin) // L.TILE * 8, TILES)
    # The rest two rows of a tile at once, 0 and 4, 2 and 6, 1 and 5, 3 and 7: all eight would fill the registers with
    # addresses.
    for first in range(middle, end, L.TILE):
        total = columns()
        second = total
        for odd in range(2):
            half = columns()
            second_half = half
            for even in range(2):
                i = first + (tl.arange(0, 2)[:, None] * 4 + odd + 2 * even) * 128 + tl.arange(0, 128)[None, :]
                inside, block = i < end, i
                if (KIND >> L.IN_BLOCKS) & 1:
                    block = block_of(i, row)
                y = load_pieces(addresses, rests, offsets_of(header, layout, i, KIND), inside, block, inside, KIND, T)
                y = summed_of(y, transform, c, MEASURED, VARIANT)
                half += squares_of_rows(y[FIRST], inside)
                if COUNT > 1:
                    second_half += squares_of_rows(y[FIRST + 1], inside)
            total += half
            second += second_half
        to = (sums + (first - begin) // L.TILE * 8).to(tl.pointer_type(tl.float64)) + tl.arange(0, 1)
        tl.store(to, sum_of_columns(total, 1))
        if COUNT > 1:
            tl.store(to + stride // 8, sum_of_columns(second, 1))


@triton.jit
def columns():
    return tl.zeros((128,), tl.float64)


@triton.jit
def squares_of_rows(x, inside):
    """Of two rows of a tile, for each column; of what is made of nothing, which may be anything, 0."""
    x = tl.where(inside, x, 0.0).to(tl.float64)
    return tl.sum(x * x, 0)


@triton.jit
def summed_of(x, transform, c, MEASURED: tl.constexpr, VARIANT: tl.constexpr):
    slots = ()
    for k in tl.static_range(L.MAX_SLOTS):
        slots = slots + (x[L.FIRST_STATE + k],)
    return MEASURED(x[L.PARAM], transform_grad(x[L.GRAD], transform), slots, c, VARIANT)


@triton.jit
def part_sums(
    header, entry, grad, begin, end, transforms, sums,
    KIND: tl.constexpr, PREPARE: tl.constexpr, MEASURED: tl.constexpr, NUMBERS: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Of a rule without a function that says what is summed it is the gradient."""
    if MEASURED is None:
        gradient_sums(header, entry, grad, begin, end, transforms, sums, KIND)
    else:
        rule_sums(
            header, entry, grad, begin, end, transforms, sums, KIND, PREPARE, MEASURED, NUMBERS, FIRST, COUNT
        )  # fmt: skip

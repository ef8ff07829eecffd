"""Sums of squares, as csrc/core/sum_of_squares.h defines them, and the tree of sums above the tiles, as in
csrc/cuda/norm.cuh."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tables as at
from .arithmetic import double
from .composition import has_flag, intake, is_finite, norm_of, taken
from .memory import decode, half_word, load_where, pointer, strided_offsets, word


@triton.jit
def tile_indices(TILES: tl.constexpr):
    """Of the elements of TILES tiles: 8 rows of each, side by side. From Triton 3.8 on a warp gets a tile, a thread all
    eight elements of a column, and the lanes a row, so that sums need no memory. Two dimensions, because with a third
    for the tiles Triton 3.6 gave the rows to the warps."""
    row, column = tl.arange(0, 8), tl.arange(0, TILES * 128)
    return row[:, None] * 128 + (column // 128 * at.TILE + column % 128)[None, :]


@triton.jit
def sum_by_halving(x, TILES: tl.constexpr):
    """Each tile's 1024 numbers, as tile_indices() has them: every i with i+512, then with i+256, and so on."""
    for k in tl.static_range(3):
        x = tl.sum(tl.reshape(x, (2, 4 >> k, TILES * 128)), 0)
    x = tl.reshape(x, (TILES, 128))
    for k in tl.static_range(7):
        x = tl.sum(tl.reshape(x, (TILES, 2, 64 >> k)), 1)
    return tl.reshape(x, (TILES,))


@triton.jit
def squares(x, take):
    x = taken(x, take).to(tl.float64)
    return x * x


@triton.jit
def part_sums(header, entry, grad, begin, end, around, sums, KIND: tl.constexpr):
    """Writes the tile sums of a part of the gradient that the rule gets to consecutive places in memory."""
    P: tl.constexpr = KIND & 255
    G: tl.constexpr = (KIND >> 8) & 255
    T: tl.constexpr = tl.float64 if P == at.F64 else tl.float32
    TILES: tl.constexpr = 4
    take = intake(around, T)
    grad = grad & at.ADDRESS
    layout = word(entry + at.ENTRY_SUM_LAYOUT)
    aligned = (layout < 0) & ((grad & 15) == 0)
    middle = tl.where(aligned, end - (end - begin) % (TILES * at.TILE), begin)
    for first in range(begin, middle, TILES * at.TILE):
        start = tl.multiple_of(pointer(grad, G) + first, 16)
        x = decode(tl.load(start + tile_indices(TILES)), G, T)  # kept in the cache: the update reads it again
        to = sums.to(tl.pointer_type(tl.float64)) + (first - begin) // at.TILE
        tl.store(to + tl.arange(0, TILES), sum_by_halving(squares(x, take), TILES))
    for first in range(middle, end, at.TILE):
        i = first + tile_indices(1)
        offsets = i
        if layout >= 0:
            offsets = strided_offsets(word(header + at.HEADER_LAYOUTS) + 8 * layout, i, 1)
        x = load_where(grad, offsets, i < end, G, T)
        to = sums.to(tl.pointer_type(tl.float64)) + (first - begin) // at.TILE
        tl.store(to + tl.arange(0, 1), sum_by_halving(squares(x, take), 1))


@triton.jit
def sum_of(sums, count):
    """Sums up to 1024 numbers that programs left in memory."""
    i = tile_indices(1)
    x = tl.load(sums.to(tl.pointer_type(tl.float64)) + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_by_halving(x, 1), 0)


@triton.jit
def climb(header, entry, item, items):
    """A program's part in the tree of sums, after it wrote its tile sums: of the programs below a node the last to
    arrive sums the node and goes on to the next. Whether it got to the root, and if so the tensor's sum."""
    parts_per_node: tl.constexpr = at.TILE // (at.PART // at.TILE)
    count = (word(entry + at.ENTRY_NUMEL) + at.TILE - 1) // at.TILE  # sums of this level
    sums = word(header + at.HEADER_PARTIALS) + 8 * word(entry + at.ENTRY_PARTIALS)
    arrivals = word(header + at.HEADER_NODES) + 4 * half_word(entry + at.ENTRY_NODES).to(tl.int64)
    node = item.to(tl.int64) // parts_per_node  # above them
    children = tl.minimum(items - node * parts_per_node, parts_per_node)
    total = double(0.0)
    climbing, at_root = True, False
    while climbing:
        tl.debug_barrier()  # what this program's threads wrote comes before what its arrival tells
        arrival = (arrivals + 4 * node).to(tl.pointer_type(tl.int32))
        climbing = tl.atomic_add(arrival, 1) + 1 == children
        if climbing:
            tl.store(arrival, 0)
            total = sum_of(sums + 8 * node * at.TILE, count - node * at.TILE)
            nodes = (count + at.TILE - 1) // at.TILE
            if nodes == 1:
                climbing, at_root = False, True
            else:
                sums += 8 * count
                arrivals += 4 * nodes
                tl.store((sums + 8 * node).to(tl.pointer_type(tl.float64)), total)
                parent = node // at.TILE
                children = tl.minimum(nodes - parent * at.TILE, at.TILE)
                node = parent
                count = nodes
    return at_root, total


@triton.jit
def publish_sum(control, total):
    tl.store((control + at.CONTROL_SUM_OF_SQUARES).to(tl.pointer_type(tl.float64)), total)
    tl.debug_barrier()
    tl.atomic_xchg((control + at.CONTROL_READY).to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def wait_for_sum(control):
    """Waits until the last of the programs that sum is through. They have lower tickets: they run or have run."""
    ready = (control + at.CONTROL_READY).to(tl.pointer_type(tl.int32))
    while tl.atomic_add(ready, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()
    address = (control + at.CONTROL_SUM_OF_SQUARES).to(tl.pointer_type(tl.float64))
    return tl.load(address, cache_modifier=".cg")


@triton.jit
def add_to_norm(header, index, total):
    """With a tensor's sum of squares: the last program to come adds all sums, in the order of the parameters, and
    leaves the norm for the launch that updates."""
    sums = word(header + at.HEADER_SUMS).to(tl.pointer_type(tl.float64))
    summed = (word(header + at.HEADER_LAUNCH) + at.LAUNCH_SUMMED).to(tl.pointer_type(tl.int32))
    tl.store(sums + index, total)
    tl.debug_barrier()
    if tl.atomic_add(summed, 1) + 1 == half_word(header + at.HEADER_TENSORS):
        entries = half_word(header + at.HEADER_ENTRY_COUNT)
        norm = double(0.0)
        for first in range(0, entries, 16):
            for k in tl.static_range(16):  # under way at once: each would take a microsecond on its own
                i = first + k
                norm += tl.load(sums + i, mask=i < entries, other=0.0, cache_modifier=".cg")
        norm = norm_of(norm, has_flag(header, at.NORM_IN_F64))
        stats = word(header + at.HEADER_NORM_STATS)
        tl.store((stats + at.STATS_NORM).to(tl.pointer_type(tl.float64)), norm)
        if has_flag(header, at.SKIP_NONFINITE) & (is_finite(norm) == 0):
            skipped = (stats + at.STATS_SKIPPED).to(tl.pointer_type(tl.float64))
            tl.store(skipped, tl.load(skipped) + 1.0)
        tl.store(summed, 0)

"""Sums of squares, as csrc/core/sum_of_squares.h defines them, and the tree of sums above the tiles, as in
csrc/cuda/norm.cuh."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import double
from .codec import decode, load_i32, load_i64, load_where, pointer, strided_offsets
from .transforms import grad_transform, has_flag, is_finite, norm_of, transform_grad


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
    x = tl.reshape(x, (TILES, 128))
    for k in tl.static_range(7):
        x = tl.sum(tl.reshape(x, (TILES, 2, 64 >> k)), 1)
    return tl.reshape(x, (TILES,))


@triton.jit
def squares(x, transform):
    x = transform_grad(x, transform).to(tl.float64)
    return x * x


@triton.jit
def part_sums(header, entry, grad, begin, end, transforms, sums, KIND: tl.constexpr):
    """Writes the tile sums of a part of the gradient that the rule gets to consecutive places in memory."""
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
        to = sums.to(tl.pointer_type(tl.float64)) + (first - begin) // L.TILE
        tl.store(to + tl.arange(0, TILES), sum_by_halving(squares(x, transform), TILES))
    for first in range(middle, end, L.TILE):
        i = first + tile_indices(1)
        offsets = i
        if layout >= 0:
            offsets = strided_offsets(load_i64(header + L.HEADER_LAYOUTS) + 8 * layout, i, L.GRAD)
        x = load_where(grad, offsets, i < end, D, T)
        to = sums.to(tl.pointer_type(tl.float64)) + (first - begin) // L.TILE
        tl.store(to + tl.arange(0, 1), sum_by_halving(squares(x, transform), 1))


@triton.jit
def sum_of(sums, count):
    """Sums up to 1024 numbers that programs left in memory."""
    i = tile_indices(1)
    x = tl.load(sums.to(tl.pointer_type(tl.float64)) + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_by_halving(x, 1), 0)


@triton.jit
def reduce_up(header, entry, item, items):
    """A program's part in the tree of sums, after it wrote its tile sums: of the programs below a node the last to
    arrive sums the node and goes on to the next. Whether it got to the root, and if so the tensor's sum."""
    parts_per_node: tl.constexpr = L.TILE // (L.PART // L.TILE)
    count = (load_i64(entry + L.ENTRY_NUMEL) + L.TILE - 1) // L.TILE  # sums of this level
    sums = load_i64(header + L.HEADER_PARTIALS) + 8 * load_i64(entry + L.ENTRY_PARTIALS)
    arrivals = load_i64(header + L.HEADER_NODES) + 4 * load_i32(entry + L.ENTRY_NODES).to(tl.int64)
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
            total = sum_of(sums + 8 * node * L.TILE, count - node * L.TILE)
            nodes = (count + L.TILE - 1) // L.TILE
            if nodes == 1:
                climbing, at_root = False, True
            else:
                sums += 8 * count
                arrivals += 4 * nodes
                tl.store((sums + 8 * node).to(tl.pointer_type(tl.float64)), total)
                parent = node // L.TILE
                children = tl.minimum(nodes - parent * L.TILE, L.TILE)
                node = parent
                count = nodes
    return at_root, total


@triton.jit
def publish_sum(control, total):
    tl.store((control + L.CONTROL_SUMS).to(tl.pointer_type(tl.float64)), total)
    tl.debug_barrier()
    tl.atomic_xchg((control + L.CONTROL_READY).to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def wait_for_sum(control):
    """Waits until the last of the programs that sum is through. They have lower tickets: they run or have run."""
    ready = (control + L.CONTROL_READY).to(tl.pointer_type(tl.int32))
    while tl.atomic_add(ready, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()
    address = (control + L.CONTROL_SUMS).to(tl.pointer_type(tl.float64))
    return tl.load(address, cache_modifier=".cg")


@triton.jit
def reduce_sums(header):
    """Makes the norm of all gradients, for the launch that updates, of the sums, added in the parameters' order."""
    sums = load_i64(header + L.HEADER_SUMS).to(tl.pointer_type(tl.float64))
    entries = load_i32(header + L.HEADER_ENTRY_COUNT)
    norm = double(0.0)
    for first in range(0, entries, 16):
        for k in tl.static_range(16):  # under way at once: each would take a microsecond on its own
            i = first + k
            norm += tl.load(sums + i, mask=i < entries, other=0.0, cache_modifier=".cg")
    norm = norm_of(norm, has_flag(header, L.NORM_IN_F64))
    stats = load_i64(header + L.HEADER_NORM_STATS)
    tl.store((stats + L.STATS_NORM).to(tl.pointer_type(tl.float64)), norm)
    if has_flag(header, L.SKIP_NONFINITE) & (is_finite(norm) == 0):
        skipped = (stats + L.STATS_SKIPPED).to(tl.pointer_type(tl.float64))
        tl.store(skipped, tl.load(skipped) + 1.0)


@triton.jit
def leave_sum(header, index, total):
    """With a tensor's sum of squares. The last program to come reduces, if this launch is to."""
    row = load_i32(header + L.HEADER_SUM) * load_i64(header + L.HEADER_SUMS_STRIDE)
    sums = load_i64(header + L.HEADER_SUMS).to(tl.pointer_type(tl.float64)) + row
    tl.store(sums + index, total)
    if has_flag(header, L.REDUCES):
        summed = (load_i64(header + L.HEADER_LAUNCH) + L.LAUNCH_SUMMED).to(tl.pointer_type(tl.int32))
        tl.debug_barrier()
        if tl.atomic_add(summed, 1) + 1 == load_i32(header + L.HEADER_TENSORS):
            reduce_sums(header)
            tl.store(summed, 0)

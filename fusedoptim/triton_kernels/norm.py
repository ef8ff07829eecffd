"""The tree of sums of squares above the tiles, as in csrc/cuda/norm.cuh."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import double
from .codec import load_i32, load_i64
from .tile_sums import sum_by_halving, tile_indices
from .transforms import has_flag, is_finite, norm_of


@triton.jit
def sum_of(sums, count):
    """Sums up to 1024 numbers that programs left in memory."""
    i = tile_indices(1)
    x = tl.load(sums.to(tl.pointer_type(tl.float64)) + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_by_halving(x, 1), 0)


@triton.jit
def reduce_up(header, entry, item, items, SUMS: tl.constexpr):
    """A program's part in the tree of sums, after it wrote its tile sums: of the programs below a node the last to
    arrive sums the node and goes on to the next. Whether it got to the root, and if so the tensor's sum and its second
    one, if SUMS is 2: both go up one tree."""
    parts_per_node: tl.constexpr = L.TILE // (L.PART // L.TILE)
    count = (load_i64(entry + L.ENTRY_NUMEL) + L.TILE - 1) // L.TILE  # sums of this level
    sums = load_i64(header + L.HEADER_PARTIALS) + 8 * load_i64(entry + L.ENTRY_PARTIALS)
    arrivals = load_i64(header + L.HEADER_NODES) + 4 * load_i32(entry + L.ENTRY_NODES).to(tl.int64)
    node = item.to(tl.int64) // parts_per_node  # above them
    children = tl.minimum(items - node * parts_per_node, parts_per_node)
    stride = 8 * load_i64(header + L.HEADER_PARTIALS_STRIDE)
    total, second = double(0.0), double(0.0)
    climbing, at_root = True, False
    while climbing:
        tl.debug_barrier()  # what this program's threads wrote comes before what its arrival tells
        arrival = (arrivals + 4 * node).to(tl.pointer_type(tl.int32))
        climbing = tl.atomic_add(arrival, 1) + 1 == children
        if climbing:
            tl.store(arrival, 0)
            below = sums + 8 * node * L.TILE
            total = sum_of(below, count - node * L.TILE)
            if SUMS > 1:
                second = sum_of(below + stride, count - node * L.TILE)
            nodes = (count + L.TILE - 1) // L.TILE
            if nodes == 1:
                climbing, at_root = False, True
            else:
                sums += 8 * count
                arrivals += 4 * nodes
                tl.store((sums + 8 * node).to(tl.pointer_type(tl.float64)), total)
                if SUMS > 1:
                    tl.store((sums + 8 * node + stride).to(tl.pointer_type(tl.float64)), second)
                parent = node // L.TILE
                children = tl.minimum(nodes - parent * L.TILE, L.TILE)
                node = parent
                count = nodes
    return at_root, total, second


@triton.jit
def publish_sums(control, total, second, SUMS: tl.constexpr):
    to = (control + L.CONTROL_SUMS).to(tl.pointer_type(tl.float64))
    tl.store(to, total)
    if SUMS > 1:
        tl.store(to + 1, second)
    tl.debug_barrier()
    tl.atomic_xchg((control + L.CONTROL_READY).to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def wait_for_sums(control, SUMS: tl.constexpr):
    """Waits until the last of the programs that sum is through. They have lower tickets: they run or have run."""
    ready = (control + L.CONTROL_READY).to(tl.pointer_type(tl.int32))
    while tl.atomic_add(ready, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()
    return _both((control + L.CONTROL_SUMS).to(tl.pointer_type(tl.float64)), 1, SUMS)


@triton.jit
def given_sums(header, index, SUMS: tl.constexpr):
    sums = load_i64(header + L.HEADER_SUMS).to(tl.pointer_type(tl.float64)) + index
    return _both(sums, load_i64(header + L.HEADER_SUMS_STRIDE), SUMS)


@triton.jit
def _both(sums, stride, SUMS: tl.constexpr):
    total, second = tl.load(sums, cache_modifier=".cg"), double(0.0)
    if SUMS > 1:
        second = tl.load(sums + stride, cache_modifier=".cg")
    return total, second


@triton.jit
def sums_of_one_part(header, partials, numel, SUMS: tl.constexpr):
    """Of a tensor of one part, whose tile sums this program has written."""
    tl.debug_barrier()
    count = (numel + L.TILE - 1) // L.TILE
    total, second = sum_of(partials, count), double(0.0)
    if SUMS > 1:
        second = sum_of(partials + 8 * load_i64(header + L.HEADER_PARTIALS_STRIDE), count)
    return total, second


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

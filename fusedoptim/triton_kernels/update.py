"""The update of a range of one tensor: the loop, once for every rule, variant and dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tables as at
from .arithmetic import lerp, lerp_weight
from .composition import intake, row_of, taken
from .memory import (
    decode,
    encode,
    fp32,
    fp64,
    load_tile,
    load_where,
    store_tile,
    store_where,
    strided_offsets,
    word,
)

# An entry's kind is one word, a byte each: dtypes of parameter, gradient, step and three states; variant; a bit for
# each state that is kept, of which the last is the moving average of the parameter.
KEEPS_EMA = tl.constexpr(1 << at.EMA.value)


@triton.jit
def step_number(entry):
    """The number of this step; 0 for a rule without a step."""
    address = word(entry + at.ENTRY_STEP)
    dtype = (word(entry + at.ENTRY_KIND) >> 16) & 255
    number = tl.full((), 0.0, tl.float64)
    if address != 0:
        if dtype == at.F64:  # noqa: SIM108 - only what is taken may be read
            number = fp64(address) + 1.0
        else:
            number = (fp32(address) + 1.0).to(tl.float64)
    return number


@triton.jit
def commit(entry, control, number, scalar_state, NEEDS_NORM: tl.constexpr):
    """Stores a tensor's new step and average, for the last of its blocks."""
    tl.store((control + at.CONTROL_READY).to(tl.pointer_type(tl.int32)), 0)
    address = word(entry + at.ENTRY_STEP)
    dtype = (word(entry + at.ENTRY_KIND) >> 16) & 255
    if address != 0:
        if dtype == at.F64:
            tl.store(address.to(tl.pointer_type(tl.float64)), number)
        else:
            tl.store(address.to(tl.pointer_type(tl.float32)), number.to(tl.float32))
    if NEEDS_NORM:
        tl.store(word(entry + at.ENTRY_SCALAR_STATE).to(tl.pointer_type(tl.float32)), scalar_state)


@triton.jit
def scalars(
    header,
    entry,
    control,
    items,
    first,
    sum_of_squares,
    PREPARE: tl.constexpr,
    NEXT_STATE: tl.constexpr,
    T: tl.constexpr,
):
    """The rule's scalars for the block's tensor. The last block of the tensor to get here stores the new step and
    average: by then all have read the old ones."""
    row = row_of(header, entry)
    number = step_number(entry)
    average = tl.full((), 0.0, tl.float32)
    new_average = average
    if NEXT_STATE is not None:
        average = fp32(word(entry + at.ENTRY_SCALAR_STATE))
        new_average = NEXT_STATE(row, sum_of_squares, average)
    c = PREPARE(row, number, first, sum_of_squares, average, T)
    if (NEXT_STATE is not None) | (word(entry + at.ENTRY_STEP) != 0):
        tl.debug_barrier()  # every thread of the block has read
        arrivals = (control + at.CONTROL_ARRIVALS).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(arrivals, 1) + 1 == items:
            tl.store(arrivals, 0)
            commit(entry, control, number, new_average, NEXT_STATE is not None)
    return c


@triton.jit
def as_stored(x, D: tl.constexpr, T: tl.constexpr):
    """A parameter as it reads after it was stored."""
    return decode(encode(x, D), D, T)


@triton.jit
def update_range(
    header, entry, control, grad, begin, end, items, around, sum_of_squares,
    KIND: tl.constexpr, PREPARE: tl.constexpr, UPDATE: tl.constexpr, NEXT_STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = KIND & 255
    G: tl.constexpr = (KIND >> 8) & 255
    S0: tl.constexpr = (KIND >> 24) & 255
    S1: tl.constexpr = (KIND >> 32) & 255
    S2: tl.constexpr = (KIND >> 40) & 255
    VARIANT: tl.constexpr = (KIND >> 48) & 255
    USES: tl.constexpr = (KIND >> 56) & 255
    AVERAGES: tl.constexpr = KEEPS_EMA & USES
    T: tl.constexpr = tl.float64 if P == at.F64 else tl.float32
    E: tl.constexpr = at.F64 if P == at.F64 else at.F32  # of the moving average
    first = (grad & at.FIRST) != 0
    grad = grad & at.ADDRESS
    c = scalars(header, entry, control, items, first, sum_of_squares, PREPARE, NEXT_STATE, T)
    _, _, _, ema_decay, zero_grad = around
    take = intake(around, T)
    toward_param, from_average = lerp_weight(1.0 - ema_decay, T)
    param = word(entry + at.ENTRY_PARAM)
    state0 = word(entry + at.ENTRY_STATE)
    state1 = word(entry + at.ENTRY_STATE + 8)
    state2 = word(entry + at.ENTRY_STATE + 16)
    average = word(entry + at.ENTRY_STATE + 8 * at.EMA) if AVERAGES else param
    layout = word(entry + at.ENTRY_LAYOUT)
    # States that are not used have a null address.
    aligned = (layout < 0) & (((param | grad | state0 | state1 | state2 | average) & 15) == 0)
    middle = tl.where(aligned, end - (end - begin) % BLOCK, begin)
    for tile in range(begin, middle, BLOCK):
        tile = tl.multiple_of(tile, 16)
        p = load_tile(param, tile, P, T, BLOCK)
        g = load_tile(grad, tile, G, T, BLOCK)
        s0 = load_tile(state0, tile, S0, T, BLOCK) if USES & 1 else p
        s1 = load_tile(state1, tile, S1, T, BLOCK) if USES & 2 else p
        s2 = load_tile(state2, tile, S2, T, BLOCK) if USES & 4 else p
        ema = load_tile(average, tile, E, T, BLOCK) if AVERAGES else p
        p, s0, s1, s2 = UPDATE(p, taken(g, take), s0, s1, s2, c, VARIANT)
        store_tile(param, tile, p, P, BLOCK)
        if USES & 1:
            store_tile(state0, tile, s0, S0, BLOCK)
        if USES & 2:
            store_tile(state1, tile, s1, S1, BLOCK)
        if USES & 4:
            store_tile(state2, tile, s2, S2, BLOCK)
        if AVERAGES:
            store_tile(average, tile, lerp(ema, as_stored(p, P, T), toward_param, from_average), E, BLOCK)
        if zero_grad:
            store_tile(grad, tile, tl.zeros((BLOCK,), T), G, BLOCK)
    # Ends, and what is not aligned or not dense, in small pieces: their addresses would fill the registers.
    SMALL: tl.constexpr = BLOCK // 4
    for start in range(middle, end, SMALL):
        i = start + tl.arange(0, SMALL)
        inside = i < end
        at_p, at_g, at_0, at_1, at_2, at_ema = i, i, i, i, i, i
        if layout >= 0:
            dims = word(header + at.HEADER_LAYOUTS) + 8 * layout
            at_p = strided_offsets(dims, i, 0)
            at_g = strided_offsets(dims, i, 1)
            at_0 = strided_offsets(dims, i, 2) if USES & 1 else at_p
            at_1 = strided_offsets(dims, i, 3) if USES & 2 else at_p
            at_2 = strided_offsets(dims, i, 4) if USES & 4 else at_p
            at_ema = strided_offsets(dims, i, 2 + at.EMA) if AVERAGES else at_p
        p = load_where(param, at_p, inside, P, T)
        g = load_where(grad, at_g, inside, G, T)
        s0 = load_where(state0, at_0, inside, S0, T) if USES & 1 else p
        s1 = load_where(state1, at_1, inside, S1, T) if USES & 2 else p
        s2 = load_where(state2, at_2, inside, S2, T) if USES & 4 else p
        ema = load_where(average, at_ema, inside, E, T) if AVERAGES else p
        p, s0, s1, s2 = UPDATE(p, taken(g, take), s0, s1, s2, c, VARIANT)
        store_where(param, at_p, inside, p, P)
        if USES & 1:
            store_where(state0, at_0, inside, s0, S0)
        if USES & 2:
            store_where(state1, at_1, inside, s1, S1)
        if USES & 4:
            store_where(state2, at_2, inside, s2, S2)
        if AVERAGES:
            store_where(average, at_ema, inside, lerp(ema, as_stored(p, P, T), toward_param, from_average), E)
        if zero_grad:
            store_where(grad, at_g, inside, tl.zeros((SMALL,), T), G)


@triton.jit
def zero_gradient(header, entry, grad, begin, end, G: tl.constexpr, BLOCK: tl.constexpr):
    """For a step that is skipped. In small pieces, for the same reason."""
    SMALL: tl.constexpr = BLOCK // 4
    grad = grad & at.ADDRESS
    layout = word(entry + at.ENTRY_LAYOUT)
    for start in range(begin, end, SMALL):
        i = start + tl.arange(0, SMALL)
        offsets = i
        if layout >= 0:
            offsets = strided_offsets(word(header + at.HEADER_LAYOUTS) + 8 * layout, i, 1)
        store_where(grad, offsets, i < end, tl.zeros((SMALL,), tl.float32), G)

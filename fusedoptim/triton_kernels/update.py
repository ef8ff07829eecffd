"""The update of a range of one tensor: the loops, once for every rule, variant and storage. They load, have
:func:`step_element` do the work, and store.

An entry's kind is one number, because kernels may have no tuples in tuples before Triton 3.8: four bits each for the
storages of all operands, the dtype of the step and the variant; then a bit for each operand that is used."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import lerp, lerp_weight
from .codec import (
    as_stored,
    load_f32,
    load_f64,
    load_i64,
    load_tile,
    load_where,
    store_tile,
    store_where,
    strided_offsets,
)
from .transforms import grad_transform, row_of, transform_grad

# ---- the order of work, as in csrc/rules/step_element.h ----


@triton.jit
def step_element(
    x, transform, toward_param, from_average, c, KIND: tl.constexpr, UPDATE: tl.constexpr, T: tl.constexpr
):
    """The new values of all operands, but for the gradient, of which nothing stays."""
    A: tl.constexpr = L.FIRST_STATE + L.AVERAGE
    slots = (x[L.FIRST_STATE],)
    for k in tl.static_range(1, L.MAX_SLOTS):
        slots = slots + (x[L.FIRST_STATE + k],)
    p, slots = UPDATE(x[L.PARAM], transform_grad(x[L.GRAD], transform), slots, c, (KIND >> L.VARIANT) & L.MASK)
    average = x[A]
    if (KIND >> L.USED + A) & 1:
        average = lerp(average, as_stored(p, (KIND >> L.WIDTH * L.PARAM) & L.MASK, T), toward_param, from_average)
    return (p, x[L.GRAD]) + slots + (average,)


# ---- all operands, between memory and registers: what is not used is like the parameter ----


@triton.jit
def addresses_of(entry, grad):
    found = (load_i64(entry + L.ENTRY_OPERANDS + L.OPERAND_DATA), grad)
    for k in tl.static_range(L.FIRST_STATE, L.OPERANDS):
        found = found + (load_i64(entry + L.ENTRY_OPERANDS + k * L.OPERAND_BYTES + L.OPERAND_DATA),)
    return found


@triton.jit
def load_tiles(addresses, tile, KIND: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    found = (load_tile(addresses[0], tile, (KIND >> L.WIDTH * 0) & L.MASK, T, BLOCK),)
    for k in tl.static_range(1, L.OPERANDS):
        if (KIND >> L.USED + k) & 1:
            found = found + (load_tile(addresses[k], tile, (KIND >> L.WIDTH * k) & L.MASK, T, BLOCK),)
        else:
            found = found + (found[0],)
    return found


@triton.jit
def store_tiles(addresses, tile, x, zero_grad, KIND: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    for k in tl.static_range(L.OPERANDS):
        if k == L.GRAD:
            if zero_grad:
                store_tile(addresses[k], tile, tl.zeros((BLOCK,), T), (KIND >> L.WIDTH * k) & L.MASK, BLOCK)
        elif (KIND >> L.USED + k) & 1:
            store_tile(addresses[k], tile, x[k], (KIND >> L.WIDTH * k) & L.MASK, BLOCK)


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
def load_elements(addresses, offsets, inside, KIND: tl.constexpr, T: tl.constexpr):
    found = (load_where(addresses[0], offsets[0], inside, (KIND >> L.WIDTH * 0) & L.MASK, T),)
    for k in tl.static_range(1, L.OPERANDS):
        if (KIND >> L.USED + k) & 1:
            found = found + (load_where(addresses[k], offsets[k], inside, (KIND >> L.WIDTH * k) & L.MASK, T),)
        else:
            found = found + (found[0],)
    return found


@triton.jit
def store_elements(addresses, offsets, inside, x, zero_grad, KIND: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    for k in tl.static_range(L.OPERANDS):
        if k == L.GRAD:
            if zero_grad:
                store_where(addresses[k], offsets[k], inside, tl.zeros((N,), T), (KIND >> L.WIDTH * k) & L.MASK)
        elif (KIND >> L.USED + k) & 1:
            store_where(addresses[k], offsets[k], inside, x[k], (KIND >> L.WIDTH * k) & L.MASK)


# ---- scalars, and what is counted ----


@triton.jit
def next_step(entry, STEP_DTYPE: tl.constexpr):
    """The number of this step; 0 for a rule without a step."""
    address = load_i64(entry + L.ENTRY_STEP)
    number = tl.full((), 0.0, tl.float64)
    if address != 0:
        if STEP_DTYPE == L.F64:
            number = load_f64(address) + 1.0
        else:
            number = (load_f32(address) + 1.0).to(tl.float64)
    return number


@triton.jit
def commit(entry, control, number, scalar_state, NEEDS_NORM: tl.constexpr, STEP_DTYPE: tl.constexpr):
    """Stores a tensor's new step and average, for the last of its blocks."""
    tl.store((control + L.CONTROL_READY).to(tl.pointer_type(tl.int32)), 0)
    address = load_i64(entry + L.ENTRY_STEP)
    if address != 0:
        if STEP_DTYPE == L.F64:
            tl.store(address.to(tl.pointer_type(tl.float64)), number)
        else:
            tl.store(address.to(tl.pointer_type(tl.float32)), number.to(tl.float32))
    if NEEDS_NORM:
        tl.store(load_i64(entry + L.ENTRY_SCALAR_STATE).to(tl.pointer_type(tl.float32)), scalar_state)


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
    STEP_DTYPE: tl.constexpr,
    T: tl.constexpr,
):
    """The rule's scalars for the block's tensor. The last block of the tensor to get here stores the new step and
    average: by then all have read the old ones."""
    row = row_of(header, entry)
    number = next_step(entry, STEP_DTYPE)
    average = tl.full((), 0.0, tl.float32)
    new_average = average
    if NEXT_STATE is not None:
        average = load_f32(load_i64(entry + L.ENTRY_SCALAR_STATE))
        new_average = NEXT_STATE(row, sum_of_squares, average)
    c = PREPARE(row, number, first, sum_of_squares, average, T)
    if (NEXT_STATE is not None) | (load_i64(entry + L.ENTRY_STEP) != 0):
        tl.debug_barrier()  # every thread of the block has read
        arrivals = (control + L.CONTROL_ARRIVALS).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(arrivals, 1) + 1 == items:
            tl.store(arrivals, 0)
            commit(entry, control, number, new_average, NEXT_STATE is not None, STEP_DTYPE)
    return c


# ---- the loops ----


@triton.jit
def update_range(
    header, entry, control, grad, begin, end, items, transforms, sum_of_squares,
    KIND: tl.constexpr, PREPARE: tl.constexpr, UPDATE: tl.constexpr, NEXT_STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if ((KIND >> L.WIDTH * 0) & L.MASK) == L.F64 else tl.float32
    first = (grad & L.FIRST) != 0
    c = scalars(header, entry, control, items, first, sum_of_squares, PREPARE, NEXT_STATE, (KIND >> L.STEP) & L.MASK, T)
    _, _, _, ema_decay, zero_grad = transforms
    transform = grad_transform(transforms, T)
    toward_param, from_average = lerp_weight(1.0 - ema_decay, T)
    addresses = addresses_of(entry, grad & L.ADDRESS)
    layout = load_i64(entry + L.ENTRY_LAYOUT)
    every = addresses[0]
    for k in tl.static_range(1, L.OPERANDS):
        every |= addresses[k]  # what is not used has a null address
    aligned = (layout < 0) & ((every & 15) == 0)
    middle = tl.where(aligned, end - (end - begin) % BLOCK, begin)
    for tile in range(begin, middle, BLOCK):
        tile = tl.multiple_of(tile, 16)
        x = load_tiles(addresses, tile, KIND, T, BLOCK)
        x = step_element(x, transform, toward_param, from_average, c, KIND, UPDATE, T)
        store_tiles(addresses, tile, x, zero_grad, KIND, T, BLOCK)
    # Ends, and what is not aligned or not dense, in small pieces: their addresses would fill the registers.
    SMALL: tl.constexpr = BLOCK // 4
    for start in range(middle, end, SMALL):
        i = start + tl.arange(0, SMALL)
        inside = i < end
        offsets = offsets_of(header, layout, i, KIND)
        y = load_elements(addresses, offsets, inside, KIND, T)
        y = step_element(y, transform, toward_param, from_average, c, KIND, UPDATE, T)
        store_elements(addresses, offsets, inside, y, zero_grad, KIND, T, SMALL)


@triton.jit
def zero_gradient(header, entry, grad, begin, end, D: tl.constexpr, BLOCK: tl.constexpr):
    """For a step that is skipped. In small pieces, for the same reason."""
    SMALL: tl.constexpr = BLOCK // 4
    grad = grad & L.ADDRESS
    layout = load_i64(entry + L.ENTRY_LAYOUT)
    for start in range(begin, end, SMALL):
        i = start + tl.arange(0, SMALL)
        offsets = offset_of(header, layout, i, L.GRAD)
        store_where(grad, offsets, i < end, tl.zeros((SMALL,), tl.float32), D)

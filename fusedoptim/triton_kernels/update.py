"""The update of a range of one tensor: the loops, once for every rule, variant and storage. They load, have
:func:`step_element` do the work, and store.

An entry's kind is one number, because kernels may have no tuples in tuples before Triton 3.8: four bits each for the
storages of all operands and the dtype of the step; eight for the variant; a bit for each operand that is used; which
half of its random words each state is rounded with; which words are used; and whether anything is in blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import lerp, lerp_weight
from .blocks import blocks_before, elements_of
from .codec import encode, load_f32, load_f64, load_i64, pointer
from .operands import (
    addresses_of,
    are_aligned,
    load_pieces,
    load_tiles,
    offset_of,
    offsets_of,
    rests_of,
    store_pieces,
    store_tiles,
    tile_blocks,
    tile_index,
)
from .random_bits import keys_of, random_half, random_stream, random_words
from .storages import as_stored
from .transforms import grad_transform, row_of, transform_grad

# ---- the order of work, as in csrc/rules/step_element.h ----


@triton.jit
def step_element(
    x, words, transform, toward_param, from_average, c, KIND: tl.constexpr, UPDATE: tl.constexpr, T: tl.constexpr
):
    """The new values of all operands, but for the gradient, of which nothing stays. words: random bits."""
    A: tl.constexpr = L.FIRST_STATE + L.AVERAGE
    slots = (x[L.FIRST_STATE],)
    for k in tl.static_range(1, L.MAX_SLOTS):
        slots = slots + (x[L.FIRST_STATE + k],)
    p, slots = UPDATE(x[L.PARAM], transform_grad(x[L.GRAD], transform), slots, c, (KIND >> L.VARIANT) & L.VARIANT_MASK)
    average = x[A]
    if (KIND >> L.USED + A) & 1:
        read = as_stored(p, random_half(words, KIND, L.PARAM), (KIND >> L.WIDTH * L.PARAM) & L.MASK, T)
        average = lerp(average, read, toward_param, from_average)
    return (p, x[L.GRAD]) + slots + (average,)


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
def numbers_of(entry, NUMBERS: tl.constexpr):
    """The rule's numbers of a tensor, fp64; 0 for what it has not."""
    found = ()
    for k in tl.static_range(L.MAX_NUMBERS):
        number = tl.full((), 0.0, tl.float64)
        if k < NUMBERS:
            address = load_i64(entry + L.ENTRY_NUMBERS + 8 * k)
            if address != 0:
                number = load_f32(address).to(tl.float64)
        found = found + (number,)
    return found


@triton.jit
def commit(entry, control, number, numbers, NUMBERS: tl.constexpr, STEP_DTYPE: tl.constexpr):
    """Stores a tensor's new step and numbers, for the last of its blocks."""
    tl.store((control + L.CONTROL_READY).to(tl.pointer_type(tl.int32)), 0)
    address = load_i64(entry + L.ENTRY_STEP)
    if address != 0:
        if STEP_DTYPE == L.F64:
            tl.store(address.to(tl.pointer_type(tl.float64)), number)
        else:
            tl.store(address.to(tl.pointer_type(tl.float32)), number.to(tl.float32))
    for k in tl.static_range(NUMBERS):
        address = load_i64(entry + L.ENTRY_NUMBERS + 8 * k)
        if address != 0:
            tl.store(address.to(tl.pointer_type(tl.float32)), numbers[k].to(tl.float32))


@triton.jit
def inputs_of(entry, grad, sums, KIND: tl.constexpr, NUMBERS: tl.constexpr):
    """What the rule's scalars follow from, beside the group's row: see device.RuleFunctions. sums: a tuple of two."""
    number = next_step(entry, (KIND >> L.STEP) & L.MASK)
    numel = load_i64(entry + L.ENTRY_WHOLE_NUMEL).to(tl.float64)
    return (number, (grad & L.FIRST) != 0) + sums + numbers_of(entry, NUMBERS) + (numel,)


@triton.jit
def scalars(
    header,
    entry,
    control,
    items,
    inputs,
    KIND: tl.constexpr,
    PREPARE: tl.constexpr,
    NEXT_NUMBERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUMS: tl.constexpr,
    T: tl.constexpr,
):
    """The rule's scalars for the block's tensor. The last block of the tensor to get here stores the new step and
    numbers: by then all have read the old ones."""
    STEP_DTYPE: tl.constexpr = (KIND >> L.STEP) & L.MASK
    VARIANT: tl.constexpr = (KIND >> L.VARIANT) & L.VARIANT_MASK
    row = row_of(header, entry)
    new_numbers = ()
    if NUMBERS > 0:
        new_numbers = NEXT_NUMBERS(row, inputs, VARIANT)
    c = PREPARE(row, inputs, T, VARIANT)
    if (NUMBERS + SUMS > 0) | (load_i64(entry + L.ENTRY_STEP) != 0):
        tl.debug_barrier()  # every thread of the block has read
        arrivals = (control + L.CONTROL_ARRIVALS).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(arrivals, 1) + 1 == items:
            tl.store(arrivals, 0)
            commit(entry, control, inputs[0], new_numbers, NUMBERS, STEP_DTYPE)
    return c


# ---- the loops ----


@triton.jit
def update_range(
    header, entry, control, grad, begin, end, items, transforms, sums,
    KIND: tl.constexpr, PREPARE: tl.constexpr, UPDATE: tl.constexpr, NEXT_NUMBERS: tl.constexpr, NUMBERS: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements begin to end; of an entry in blocks the blocks that begin there. sums: a tuple of two."""
    T: tl.constexpr = tl.float64 if ((KIND >> L.WIDTH * 0) & L.MASK) == L.F64 else tl.float32
    inputs = inputs_of(entry, grad, sums, KIND, NUMBERS)
    c = scalars(header, entry, control, items, inputs, KIND, PREPARE, NEXT_NUMBERS, NUMBERS, SUMS, T)
    _, _, _, ema_decay, zero_grad = transforms
    transform = grad_transform(transforms, T)
    toward_param, from_average = lerp_weight(1.0 - ema_decay, T)
    addresses = addresses_of(entry, grad & L.ADDRESS)
    rests = rests_of(entry, addresses, KIND)
    layout = load_i64(entry + L.ENTRY_LAYOUT)
    aligned = (layout < 0) & are_aligned(addresses, rests, KIND)
    stream, first_index = inputs[0], begin
    if (KIND >> L.WORDS) & L.MASK:
        stream = random_stream(row_of(header, entry), entry, inputs[0])
        first_index = load_i64(entry + L.ENTRY_FIRST_INDEX)
        aligned &= (first_index + begin) >> 32 == (first_index + end - 1) >> 32  # one key serves all
    row = begin
    if (KIND >> L.IN_BLOCKS) & 1:
        row = tl.maximum(load_i64(entry + L.ENTRY_ROW), 1)  # 0 where there are no elements
        aligned &= row % L.BLOCK == 0
    middle = tl.where(aligned, end - (end - begin) % BLOCK, begin)
    keys = keys_of(stream, first_index + begin, KIND)
    for tile in range(begin, middle, BLOCK):
        tile = tl.multiple_of(tile, 16)
        index, random = tile_index(BLOCK, KIND), keys
        if (KIND >> L.WORDS) & L.MASK:
            random = random_words((first_index + tile).to(tl.uint32) + index.to(tl.uint32), keys, KIND)
        x = load_tiles(addresses, rests, tile, index, tile_blocks(BLOCK, KIND), KIND, T)
        x = step_element(x, random, transform, toward_param, from_average, c, KIND, UPDATE, T)
        store_tiles(addresses, rests, tile, index, x, random, zero_grad, KIND, T)
    # Ends, and what is not aligned or not dense, in small pieces: their addresses would fill the registers.
    SMALL: tl.constexpr = BLOCK // 4
    if (KIND >> L.IN_BLOCKS) & 1:
        rest_begin, rest_end = blocks_before(middle, row), blocks_before(end, row)
        STRIDE: tl.constexpr = SMALL // L.BLOCK
    else:
        rest_begin, rest_end = middle, end
        STRIDE: tl.constexpr = SMALL
    for start in range(rest_begin, rest_end, STRIDE):
        block = start + tl.arange(0, STRIDE)
        exists = block < rest_end
        i, inside, random = block, exists, keys
        blocks, exist = block, exists
        if (KIND >> L.IN_BLOCKS) & 1:
            i, inside = elements_of(block, row)
            blocks, exist = block[:, None], exists[:, None]
            inside &= exist
        if (KIND >> L.WORDS) & L.MASK:
            place = first_index + offset_of(header, layout, i, L.INDEX)
            random = random_words(place, keys_of(stream, place, KIND), KIND)
        offsets = offsets_of(header, layout, i, KIND)
        y = load_pieces(addresses, rests, offsets, inside, blocks, exist, KIND, T)
        y = step_element(y, random, transform, toward_param, from_average, c, KIND, UPDATE, T)
        store_pieces(addresses, rests, offsets, inside, block, exists, y, random, zero_grad, KIND, T)


@triton.jit
def zero_gradient(header, entry, grad, begin, end, D: tl.constexpr, BLOCK: tl.constexpr):
    """For a step that is skipped. In small pieces, for the same reason."""
    SMALL: tl.constexpr = BLOCK // 4
    grad = grad & L.ADDRESS
    layout = load_i64(entry + L.ENTRY_LAYOUT)
    for start in range(begin, end, SMALL):
        i = start + tl.arange(0, SMALL)
        offsets = offset_of(header, layout, i, L.GRAD)
        tl.store(pointer(grad, D) + offsets, encode(tl.zeros((SMALL,), tl.float32), D), mask=i < end)

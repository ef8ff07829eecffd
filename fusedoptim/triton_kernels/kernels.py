"""The kernels: a program finds its piece of work in the tables and does it. See csrc/cuda/kernel.cuh."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tables as at
from .composition import composition_of, has_flag, is_skipped, unscaled
from .memory import half_word, word
from .norm import add_to_norm, climb, part_sums, publish_sum, sum_of, wait_for_sum
from .update import update_range, zero_gradient


@triton.jit
def item_of(header, item):
    """The segment's entry, its work, the number of its items, which of them this is, the gradient's word."""
    first_item = word(header + at.HEADER_FIRST_ITEM)
    s = half_word(word(header + at.HEADER_SEGMENT_OF) + 4 * item.to(tl.int64)).to(tl.int64)
    segment = word(header + at.HEADER_SEGMENTS) + s * at.SEGMENT_BYTES
    begin, end = half_word(first_item + 4 * s), half_word(first_item + 4 * s + 4)
    index = half_word(segment).to(tl.int64)
    grad = word(word(header + at.HEADER_GRADS) + 8 * index)
    return index, half_word(segment + at.SEGMENT_WORK), end - begin, item - begin, grad


@triton.jit(do_not_specialize=["header"])
def step_kernel(
    header,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    NEXT_STATE: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """An elementwise rule. header: the address of a StepHeader; KINDS: of all entries; LAYOUT: tables.DIGEST."""
    skip = is_skipped(header)
    if (skip == 0) | has_flag(header, at.ZERO_GRAD):
        index, _, items, item, grad = item_of(header, tl.program_id(0))
        if grad != 0:
            entry = word(header + at.HEADER_ENTRIES) + index * at.ENTRY_BYTES
            control = word(header + at.HEADER_CONTROL) + index * at.CONTROL_BYTES
            chunk = word(header + at.HEADER_CHUNK)
            begin = item.to(tl.int64) * chunk
            end = tl.minimum(begin + chunk, word(entry + at.ENTRY_NUMEL))
            kind = word(entry + at.ENTRY_KIND)
            none = tl.full((), 0.0, tl.float64)
            for k in tl.static_range(len(KINDS)):
                if kind == KINDS[k]:
                    if skip:
                        zero_gradient(header, entry, grad, begin, end, (KINDS[k] >> 8) & 255, BLOCK)
                    else:
                        update_range(
                            header, entry, control, grad, begin, end, items, composition_of(header, entry), none,
                            KINDS[k], PREPARE, UPDATE, NEXT_STATE, BLOCK,
                        )  # fmt: skip


@triton.jit(do_not_specialize=["header"])
def norm_step_kernel(
    header,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    NEXT_STATE: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """A rule that needs the gradient's norm first. Programs take tickets, so that what one waits for has begun."""
    skip = is_skipped(header)
    if (skip == 0) | has_flag(header, at.ZERO_GRAD):
        launch = word(header + at.HEADER_LAUNCH)
        tickets = (launch + at.LAUNCH_TICKETS).to(tl.pointer_type(tl.int32))
        finished = (launch + at.LAUNCH_FINISHED).to(tl.pointer_type(tl.int32))
        ticket = tl.program_id(0)
        if skip == 0:  # zeroing waits for nothing
            ticket = tl.atomic_add(tickets, 1)
        index, work, items, item, grad = item_of(header, ticket)
        if grad != 0:
            entry = word(header + at.HEADER_ENTRIES) + index * at.ENTRY_BYTES
            control = word(header + at.HEADER_CONTROL) + index * at.CONTROL_BYTES
            numel = word(entry + at.ENTRY_NUMEL)
            partials = word(header + at.HEADER_PARTIALS) + 8 * word(entry + at.ENTRY_PARTIALS)
            # Updates go backwards: what was read last is still in the cache.
            item = tl.where(work == at.WORK_APPLY, items - 1 - item, item)
            begin = item.to(tl.int64) * at.PART
            end = tl.minimum(begin + at.PART, numel)
            around = composition_of(header, entry)
            kind = word(entry + at.ENTRY_KIND)
            for k in tl.static_range(len(KINDS)):
                if kind == KINDS[k]:
                    if skip:
                        if work != at.WORK_SUM:
                            zero_gradient(header, entry, grad, begin, end, (KINDS[k] >> 8) & 255, BLOCK)
                    elif work == at.WORK_SUM:
                        part_sums(header, entry, grad, begin, end, around, partials + begin // at.TILE * 8, KINDS[k])
                        at_root, total = climb(header, entry, item, items)
                        if at_root:
                            publish_sum(control, total)
                    else:
                        if work == at.WORK_APPLY:
                            sum_of_squares = wait_for_sum(control)
                        else:
                            part_sums(header, entry, grad, begin, end, around, partials, KINDS[k])
                            tl.debug_barrier()
                            sum_of_squares = sum_of(partials, (numel + at.TILE - 1) // at.TILE)
                        update_range(
                            header, entry, control, grad, begin, end, items, around, sum_of_squares,
                            KINDS[k], PREPARE, UPDATE, NEXT_STATE, BLOCK,
                        )  # fmt: skip
        # The last program leaves the counters as it found them.
        if skip == 0:  # noqa: SIM102 - Triton's `and` works out both sides
            if tl.atomic_add(finished, 1) + 1 == tl.num_programs(0):
                tl.store(tickets, 0)
                tl.store(finished, 0)


@triton.jit(do_not_specialize=["header"])
def norm_kernel(header, KINDS: tl.constexpr, LAYOUT: tl.constexpr):
    """The norm of all gradients, unscaled but not clipped. KINDS: dtypes of parameters and gradients, a byte each."""
    index, _, items, item, grad = item_of(header, tl.program_id(0))
    if grad != 0:
        entry = word(header + at.HEADER_ENTRIES) + index * at.ENTRY_BYTES
        numel = word(entry + at.ENTRY_NUMEL)
        partials = word(header + at.HEADER_PARTIALS) + 8 * word(entry + at.ENTRY_PARTIALS)
        begin = item.to(tl.int64) * at.PART
        end = tl.minimum(begin + at.PART, numel)
        around = unscaled(header)
        kind = word(entry + at.ENTRY_KIND) & 0xFFFF
        for k in tl.static_range(len(KINDS)):
            if kind == KINDS[k]:
                part_sums(header, entry, grad, begin, end, around, partials + begin // at.TILE * 8, KINDS[k])
        if items == 1:
            tl.debug_barrier()
            add_to_norm(header, index, sum_of(partials, (numel + at.TILE - 1) // at.TILE))
        else:
            at_root, total = climb(header, entry, item, items)
            if at_root:
                add_to_norm(header, index, total)
    elif item == 0:  # of a tensor without a gradient one program tells so
        add_to_norm(header, index, tl.full((), 0.0, tl.float64))

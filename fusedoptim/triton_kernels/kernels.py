"""The kernels: a program finds its piece of work in the tables and does it. See csrc/cuda/kernel.cuh."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .codec import load_i32, load_i64
from .norm import given_sums, leave_sum, publish_sums, reduce_sums, reduce_up, sums_of_one_part, wait_for_sums
from .tile_sums import gradient_sums, part_sums, rule_sums
from .transforms import has_flag, is_skipped, measured, transforms_of
from .update import update_range, zero_gradient


@triton.jit
def item_of(header, item):
    """The segment's entry, its work, the number of its items, which of them this is, the gradient's word."""
    first_item = load_i64(header + L.HEADER_FIRST_ITEM)
    s = load_i32(load_i64(header + L.HEADER_SEGMENT_OF) + 4 * item.to(tl.int64)).to(tl.int64)
    segment = load_i64(header + L.HEADER_SEGMENTS) + s * L.SEGMENT_BYTES
    begin, end = load_i32(first_item + 4 * s), load_i32(first_item + 4 * s + 4)
    index = load_i32(segment).to(tl.int64)
    grad = load_i64(load_i64(header + L.HEADER_GRADS) + 8 * index)
    return index, load_i32(segment + L.SEGMENT_WORK), end - begin, item - begin, grad


@triton.jit(do_not_specialize=["header"])
def step_kernel(
    header,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    NEXT_NUMBERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """An elementwise rule. header: the address of a StepHeader; KINDS: of all entries; LAYOUT: layout.DIGEST."""
    skip = is_skipped(header)
    if (skip == 0) | has_flag(header, L.ZERO_GRAD):
        index, _, items, item, grad = item_of(header, tl.program_id(0))
        if grad != 0:
            entry = load_i64(header + L.HEADER_ENTRIES) + index * L.ENTRY_BYTES
            control = load_i64(header + L.HEADER_CONTROL) + index * L.CONTROL_BYTES
            chunk = load_i64(header + L.HEADER_CHUNK)
            begin = item.to(tl.int64) * chunk
            end = tl.minimum(begin + chunk, load_i64(entry + L.ENTRY_NUMEL))
            kind = load_i32(entry + L.ENTRY_KIND)
            none = tl.full((), 0.0, tl.float64)
            for k in tl.static_range(len(KINDS)):
                if kind == k:
                    if skip:
                        zero_gradient(
                            header,
                            entry,
                            grad,
                            begin,
                            end,
                            (KINDS[k] >> L.WIDTH * L.GRAD) & L.MASK,
                            BLOCK,
                        )
                    else:
                        update_range(
                            header, entry, control, grad, begin, end, items, transforms_of(header, entry), (none, none),
                            KINDS[k], PREPARE, UPDATE, NEXT_NUMBERS, NUMBERS, SUMS, BLOCK,
                        )  # fmt: skip


@triton.jit(do_not_specialize=["header"])
def norm_step_kernel(
    header,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    NEXT_NUMBERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUMS: tl.constexpr,
    MEASURED: tl.constexpr,
    SUMMED_KINDS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """A rule that needs sums over whole tensors first. Programs take tickets, so that what one waits for has begun.
    SUMMED_KINDS: KINDS, but of what is summed."""
    skip = is_skipped(header)
    if (skip == 0) | has_flag(header, L.ZERO_GRAD):
        launch = load_i64(header + L.HEADER_LAUNCH)
        tickets = (launch + L.LAUNCH_TICKETS).to(tl.pointer_type(tl.int32))
        finished = (launch + L.LAUNCH_FINISHED).to(tl.pointer_type(tl.int32))
        ticket = tl.program_id(0)
        if skip == 0:  # zeroing waits for nothing
            ticket = tl.atomic_add(tickets, 1)
        index, work, items, item, grad = item_of(header, ticket)
        if grad != 0:
            entry = load_i64(header + L.HEADER_ENTRIES) + index * L.ENTRY_BYTES
            control = load_i64(header + L.HEADER_CONTROL) + index * L.CONTROL_BYTES
            numel = load_i64(entry + L.ENTRY_NUMEL)
            partials = load_i64(header + L.HEADER_PARTIALS) + 8 * load_i64(entry + L.ENTRY_PARTIALS)
            # Updates go backwards: what was read last is still in the cache.
            item = tl.where(work == L.WORK_APPLY, items - 1 - item, item)
            begin = item.to(tl.int64) * L.PART
            end = tl.minimum(begin + L.PART, numel)
            transforms = transforms_of(header, entry)
            kind = load_i32(entry + L.ENTRY_KIND)
            given = has_flag(header, L.SUMS_GIVEN)
            for k in tl.static_range(len(KINDS)):
                if kind == k:
                    if skip:
                        if work != L.WORK_SUM:
                            zero_gradient(
                                header,
                                entry,
                                grad,
                                begin,
                                end,
                                (KINDS[k] >> L.WIDTH * L.GRAD) & L.MASK,
                                BLOCK,
                            )
                    elif work == L.WORK_SUM:
                        if given == 0:
                            part_sums(
                                header, entry, grad, begin, end, transforms, partials + begin // L.TILE * 8,
                                SUMMED_KINDS[k], PREPARE, MEASURED, NUMBERS, 0, SUMS,
                            )  # fmt: skip
                            at_root, total, second = reduce_up(header, entry, item, items, SUMS)
                            if at_root:
                                publish_sums(control, total, second, SUMS)
                    else:
                        if given:
                            total, second = given_sums(header, index, SUMS)
                        elif work == L.WORK_APPLY:
                            total, second = wait_for_sums(control, SUMS)
                        else:
                            part_sums(
                                header, entry, grad, begin, end, transforms, partials,
                                SUMMED_KINDS[k], PREPARE, MEASURED, NUMBERS, 0, SUMS,
                            )  # fmt: skip
                            total, second = sums_of_one_part(header, partials, numel, SUMS)
                        update_range(
                            header, entry, control, grad, begin, end, items, transforms,
                            (total, second), KINDS[k], PREPARE, UPDATE, NEXT_NUMBERS, NUMBERS, SUMS, BLOCK,
                        )  # fmt: skip
        # The last program leaves the counters as it found them.
        if skip == 0:  # noqa: SIM102 - Triton's `and` works out both sides
            if tl.atomic_add(finished, 1) + 1 == tl.num_programs(0):
                tl.store(tickets, 0)
                tl.store(finished, 0)


@triton.jit(do_not_specialize=["header"])
def measure_kernel(
    header,
    PREPARE: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUMS: tl.constexpr,
    MEASURED: tl.constexpr,
    SUMMED_KINDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """A sum of squares of every tensor: of the gradient, or if L.TRANSFORMED is set, the one of the rule's that
    HEADER_SUM says. MEASURED: None for a rule whose sum is the gradient's, too."""
    index, _, items, item, grad = item_of(header, tl.program_id(0))
    if grad != 0:
        entry = load_i64(header + L.HEADER_ENTRIES) + index * L.ENTRY_BYTES
        numel = load_i64(entry + L.ENTRY_NUMEL)
        partials = load_i64(header + L.HEADER_PARTIALS) + 8 * load_i64(entry + L.ENTRY_PARTIALS)
        begin = item.to(tl.int64) * L.PART
        end = tl.minimum(begin + L.PART, numel)
        transforms = measured(header, entry)
        sums = partials + begin // L.TILE * 8
        kind = load_i32(entry + L.ENTRY_KIND)
        which = tl.where(has_flag(header, L.TRANSFORMED), load_i32(header + L.HEADER_SUM), -1)
        for k in tl.static_range(len(SUMMED_KINDS)):
            if kind == k:
                if MEASURED is None:
                    gradient_sums(header, entry, grad, begin, end, transforms, sums, SUMMED_KINDS[k])
                else:
                    if which < 0:
                        gradient_sums(header, entry, grad, begin, end, transforms, sums, SUMMED_KINDS[k])
                    for s in tl.static_range(SUMS):
                        if which == s:
                            rule_sums(
                                header, entry, grad, begin, end, transforms, sums,
                                SUMMED_KINDS[k], PREPARE, MEASURED, NUMBERS, s, 1,
                            )  # fmt: skip
        if items == 1:
            totals = sums_of_one_part(header, partials, numel, 1)
            leave_sum(header, index, totals[0])
        else:
            climbed = reduce_up(header, entry, item, items, 1)
            if climbed[0]:
                leave_sum(header, index, climbed[1])
    elif item == 0:  # of a tensor without a gradient one program tells so
        leave_sum(header, index, tl.full((), 0.0, tl.float64))


@triton.jit(do_not_specialize=["header"])
def reduce_kernel(header, LAYOUT: tl.constexpr):
    """The norm of all gradients, of sums that are there. One program."""
    reduce_sums(header)

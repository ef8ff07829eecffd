"""What a step does around its rule. See csrc/core/composition.h, and csrc/cuda/kernel.cuh for where it comes from."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tables as at
from .arithmetic import double
from .memory import fp32, fp64, half_word, word


@triton.jit
def has_flag(header, F: tl.constexpr):
    return (half_word(header + at.HEADER_FLAGS) & F) != 0


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def is_skipped(header):
    """Whether nothing is to be updated: GradScaler found an infinity, or the norm of all gradients is not finite."""
    found_inf = word(header + at.HEADER_FOUND_INF)
    skip = has_flag(header, at.SKIP_NONFINITE)
    if skip:
        skip = is_finite(fp64(word(header + at.HEADER_NORM_STATS) + at.STATS_NORM)) == 0
    if found_inf != 0:
        skip |= fp32(found_inf) != 0.0
    return skip


@triton.jit
def row_of(header, entry):
    """The hyper-parameters of an entry's group."""
    group = half_word(entry + at.ENTRY_GROUP).to(tl.int64)
    return word(header + at.HEADER_ROWS) + 8 * group * half_word(header + at.HEADER_ROW_WORDS)


@triton.jit
def unscaled(header):
    """A composition that only multiplies gradients by the reciprocal of GradScaler's scale, as it rounds it: that
    factor, the one that clips by norm, the limit of values, the decay of the moving average, whether to zero."""
    scale = word(header + at.HEADER_GRAD_SCALE)
    unscale = tl.full((), 1.0, tl.float32)
    if scale != 0:
        unscale = (1.0 / fp32(scale).to(tl.float64)).to(tl.float32)
    return unscale, double(1.0), double(float("inf")), double(-1.0), unscale != unscale


@triton.jit
def norm_of(sum_of_squares, in_f64):
    norm = tl.sqrt(sum_of_squares)
    return tl.where(in_f64, norm, norm.to(tl.float32).to(tl.float64))


@triton.jit
def clip_coefficient(max_norm, norm, in_f64):
    """In fp64, whose results round to those of fp32: a quotient or product of two fp32 numbers is never so close to the
    middle of two others that it would matter."""
    tiny = tl.full((), 1e-6, tl.float32)
    over = tl.where(in_f64, norm + double(1e-6), (norm.to(tl.float32) + tiny).to(tl.float64))
    reciprocal = 1.0 / over
    reciprocal = tl.where(in_f64, reciprocal, reciprocal.to(tl.float32).to(tl.float64))
    c = reciprocal * tl.where(in_f64, max_norm, max_norm.to(tl.float32).to(tl.float64))
    c = tl.where(in_f64, c, c.to(tl.float32).to(tl.float64))
    return tl.where((c > 1.0) | (max_norm == float("inf")), 1.0, c)


@triton.jit
def composition_of(header, entry):
    """What surrounds the rule for a tensor of this entry's group. All is read, whether needed or not: a branch would
    have the loads after it wait for those before."""
    row = row_of(header, entry)
    unscale, coefficient, limit, _, _ = unscaled(header)
    max_norm, clip_value = fp64(row + 8 * at.MAX_GRAD_NORM), fp64(row + 8 * at.CLIP_GRAD_VALUE)
    norm = fp64(word(header + at.HEADER_NORM_STATS) + at.STATS_NORM)
    clip = clip_coefficient(max_norm, norm, has_flag(header, at.NORM_IN_F64))
    coefficient = tl.where(max_norm >= 0.0, clip, coefficient)
    limit = tl.where(clip_value >= 0.0, clip_value, limit)
    return unscale, coefficient, limit, fp64(row + 8 * at.EMA_DECAY), has_flag(header, at.ZERO_GRAD)


@triton.jit
def intake(around, T: tl.constexpr):
    """A composition's first three, in the compute dtype."""
    unscale, coefficient, limit, _, _ = around
    return unscale.to(T), coefficient.to(T), limit.to(T)


@triton.jit
def taken(g, take):
    """The gradient that the rule gets. A NaN stays one."""
    unscale, coefficient, limit = take
    g = g * unscale * coefficient
    return tl.where(g > limit, limit, tl.where(g < limit * -1.0, limit * -1.0, g))

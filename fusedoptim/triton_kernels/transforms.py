"""What a step does around its rule. See csrc/core/transforms.h, and csrc/cuda/kernel.cuh for where it comes from."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import double
from .codec import load_f32, load_f64, load_i32, load_i64


@triton.jit
def has_flag(header, F: tl.constexpr):
    return (load_i32(header + L.HEADER_FLAGS) & F) != 0


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def is_skipped(header):
    """Whether nothing is to be updated: GradScaler found an infinity, or the norm of all gradients is not finite."""
    found_inf = load_i64(header + L.HEADER_FOUND_INF)
    skip = has_flag(header, L.SKIP_NONFINITE)
    if skip:
        skip = is_finite(load_f64(load_i64(header + L.HEADER_NORM_STATS) + L.STATS_NORM)) == 0
    if found_inf != 0:
        skip |= load_f32(found_inf) != 0.0
    return skip


@triton.jit
def row_of(header, entry):
    """The hyper-parameters of an entry's group."""
    group = load_i32(entry + L.ENTRY_GROUP).to(tl.int64)
    return load_i64(header + L.HEADER_ROWS) + 8 * group * load_i32(header + L.HEADER_ROW_WORDS)


@triton.jit
def unscale_by(header):
    """The reciprocal of GradScaler's scale, as it rounds it."""
    scale = load_i64(header + L.HEADER_GRAD_SCALE)
    unscale = tl.full((), 1.0, tl.float32)
    if scale != 0:
        unscale = (1.0 / load_f32(scale).to(tl.float64)).to(tl.float32)
    return unscale


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


# A group's transforms are a tuple: the factor that unscales, the one that clips by norm, the limit of values, the decay
# of the moving average, whether to zero.


@triton.jit
def transforms_of(header, entry):
    """What surrounds the rule for a tensor of this entry's group. All is read, whether needed or not: a branch would
    have the loads after it wait for those before."""
    row = row_of(header, entry)
    max_norm, clip_value = load_f64(row + 8 * L.MAX_GRAD_NORM), load_f64(row + 8 * L.CLIP_GRAD_VALUE)
    norm = load_f64(load_i64(header + L.HEADER_NORM_STATS) + L.STATS_NORM)
    clip = clip_coefficient(max_norm, norm, has_flag(header, L.NORM_IN_F64))
    coefficient = tl.where(max_norm >= 0.0, clip, double(1.0))
    limit = tl.where(clip_value >= 0.0, clip_value, double(float("inf")))
    return unscale_by(header), coefficient, limit, load_f64(row + 8 * L.EMA_DECAY), has_flag(header, L.ZERO_GRAD)


@triton.jit
def measured(header, entry):
    """What is done to a gradient before its squares are summed: all, or, for the norm of all gradients, unscaling."""
    coefficient, limit = double(1.0), double(float("inf"))
    if has_flag(header, L.TRANSFORMED):
        _, coefficient, limit, _, _ = transforms_of(header, entry)
    return unscale_by(header), coefficient, limit, double(-1.0), has_flag(header, L.ZERO_GRAD)


@triton.jit
def grad_transform(transforms, T: tl.constexpr):
    """The first three, in the compute dtype."""
    unscale, coefficient, limit, _, _ = transforms
    return unscale.to(T), coefficient.to(T), limit.to(T)


@triton.jit
def transform_grad(g, transform):
    """The gradient that the rule gets. A NaN stays one."""
    unscale, coefficient, limit = transform
    g = g * unscale * coefficient
    return tl.where(g > limit, limit, tl.where(g < limit * -1.0, limit * -1.0, g))

"""No optimizer: a gradient in the parameter's place becomes what other rules get. See csrc/rules/clip.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare(row, step, first, sum_of_squares, scalar_state, T: tl.constexpr):
    return (first,)


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    return g, s

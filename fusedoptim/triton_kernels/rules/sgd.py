"""SGD, with momentum (variant 1). See csrc/rules/sgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import flag, hyper, lr_value, spread, transformed


@triton.jit
def prepare(row, step, first, sum_of_squares, scalar_state, T: tl.constexpr):
    weight_decay = hyper(row, 2)
    return (
        weight_decay.to(T),
        weight_decay != 0.0,
        flag(row, 4),
        hyper(row, 0).to(T),
        (1.0 - hyper(row, 1)).to(T),
        (lr_value(row) * -1.0).to(T),
        flag(row, 3),
        first,
    )


@triton.jit
def update(p, g, buf, s1, s2, c, VARIANT: tl.constexpr):
    weight_decay, decays, maximize, momentum, one_minus_dampening, neg_lr, nesterov, first = c
    g = transformed(g, p, weight_decay, decays, maximize)
    if VARIANT == 1:
        buf = tl.where(first, g, tl.fma(spread(one_minus_dampening, g), g, buf * momentum))
        g = tl.where(nesterov, tl.fma(spread(momentum, g), buf, g), buf)
    p = tl.fma(spread(neg_lr, g), g, p)
    return p, buf, s1, s2

"""RMSprop; bit 0 of the variant: momentum, bit 1: centered. See csrc/rules/rmsprop.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import (
    add_scaled_ratio,
    add_scaled_square,
    flag,
    hyper,
    lerp,
    lerp_weight,
    lr_value,
    spread,
    sqrt,
    transformed,
)


@triton.jit
def prepare(row, step, first, sum_of_squares, scalar_state, T: tl.constexpr):
    alpha, weight_decay = hyper(row, 0), hyper(row, 2)
    toward_grad, from_start = lerp_weight(1.0 - alpha, T)
    return (
        weight_decay.to(T),
        weight_decay != 0.0,
        flag(row, 5),
        toward_grad,
        from_start,
        alpha.to(T),
        (1.0 - alpha).to(T),
        hyper(row, 1).to(T),
        hyper(row, 3).to(T),
        (lr_value(row) * -1.0).to(T),
    )


@triton.jit
def update(p, g, v, buf, mean, c, VARIANT: tl.constexpr):
    weight_decay, decays, maximize, toward_grad, from_start, alpha, one_minus_alpha, eps, momentum, neg_lr = c
    g = transformed(g, p, weight_decay, decays, maximize)
    v = add_scaled_square(v * alpha, g, one_minus_alpha)
    variance = v
    if VARIANT & 2:
        mean = lerp(mean, g, toward_grad, from_start)
        variance = tl.fma(mean * -1.0, mean, variance)
    denom = sqrt(variance) + eps
    if VARIANT & 1:
        buf = add_scaled_ratio(buf * momentum, g, denom, 1.0)
        p = tl.fma(spread(neg_lr, p), buf, p)
    else:
        p = add_scaled_ratio(p, g, denom, neg_lr)
    return p, v, buf, mean

"""RMSprop; bit 0 of the variant: momentum, bit 1: centered. See csrc/rules/rmsprop.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout
from ..arithmetic import (
    add_scaled_ratio,
    add_scaled_square,
    apply_weight_decay,
    flag,
    hyper,
    lerp,
    lerp_weight,
    lr_value,
    spread,
    sqrt,
)

H = layout.of_rule("rmsprop")


@triton.jit
def prepare(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    alpha, weight_decay = hyper(row, H.ALPHA), hyper(row, H.WEIGHT_DECAY)
    toward_grad, from_start = lerp_weight(1.0 - alpha, T)
    return (
        weight_decay.to(T),
        weight_decay != 0.0,
        flag(row, H.MAXIMIZE),
        toward_grad,
        from_start,
        alpha.to(T),
        (1.0 - alpha).to(T),
        hyper(row, H.EPS).to(T),
        hyper(row, H.MOMENTUM).to(T),
        (lr_value(row) * -1.0).to(T),
    )


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    v, buf, mean = s
    weight_decay, decays, maximize, toward_grad, from_start, alpha, one_minus_alpha, eps, momentum, neg_lr = c
    g = apply_weight_decay(g, p, weight_decay, decays, maximize)
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
    return p, (v, buf, mean)

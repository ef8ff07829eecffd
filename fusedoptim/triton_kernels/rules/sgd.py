"""SGD, with momentum (variant 1). See csrc/rules/sgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout
from ..arithmetic import apply_weight_decay, flag, hyper, lr_value, spread

H = layout.of_rule("sgd")


@triton.jit
def prepare(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    first = inputs[1]
    weight_decay = hyper(row, H.WEIGHT_DECAY)
    return (
        weight_decay.to(T),
        weight_decay != 0.0,
        flag(row, H.MAXIMIZE),
        hyper(row, H.MOMENTUM).to(T),
        (1.0 - hyper(row, H.DAMPENING)).to(T),
        (lr_value(row) * -1.0).to(T),
        flag(row, H.NESTEROV),
        first,
    )


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    buf, s1, s2 = s
    weight_decay, decays, maximize, momentum, one_minus_dampening, neg_lr, nesterov, first = c
    g = apply_weight_decay(g, p, weight_decay, decays, maximize)
    if VARIANT == 1:
        buf = tl.where(first, g, tl.fma(spread(one_minus_dampening, g), g, buf * momentum))
        g = tl.where(nesterov, tl.fma(spread(momentum, g), buf, g), buf)
    p = tl.fma(spread(neg_lr, g), g, p)
    return p, (buf, s1, s2)

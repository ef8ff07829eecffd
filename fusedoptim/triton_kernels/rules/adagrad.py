"""Adagrad. See csrc/rules/adagrad.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout
from ..arithmetic import add_scaled_ratio, apply_weight_decay, flag, hyper, lr_over, sqrt

H = layout.of_rule("adagrad")


@triton.jit
def prepare(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    step = inputs[0]
    weight_decay = hyper(row, H.WEIGHT_DECAY)
    neg_clr = lr_over(row, 1.0 + (step - 1.0) * hyper(row, H.LR_DECAY)) * -1.0
    return weight_decay.to(T), weight_decay != 0.0, flag(row, H.MAXIMIZE), hyper(row, H.EPS).to(T), neg_clr.to(T)


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    total, s1, s2 = s
    weight_decay, decays, maximize, eps, neg_clr = c
    g = apply_weight_decay(g, p, weight_decay, decays, maximize)
    total = tl.fma(g, g, total)
    p = add_scaled_ratio(p, g, sqrt(total) + eps, neg_clr)
    return p, (total, s1, s2)

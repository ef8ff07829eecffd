"""Adagrad. See csrc/rules/adagrad.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import add_scaled_ratio, flag, hyper, lr_over, sqrt, transformed


@triton.jit
def prepare(row, step, first, sum_of_squares, scalar_state, T: tl.constexpr):
    weight_decay = hyper(row, 1)
    neg_clr = lr_over(row, 1.0 + (step - 1.0) * hyper(row, 0)) * -1.0
    return weight_decay.to(T), weight_decay != 0.0, flag(row, 3), hyper(row, 2).to(T), neg_clr.to(T)


@triton.jit
def update(p, g, total, s1, s2, c, VARIANT: tl.constexpr):
    weight_decay, decays, maximize, eps, neg_clr = c
    g = transformed(g, p, weight_decay, decays, maximize)
    total = tl.fma(g, g, total)
    p = add_scaled_ratio(p, g, sqrt(total) + eps, neg_clr)
    return p, total, s1, s2

"""A step divided by a moving average of the gradient's norm. See csrc/rules/norm_adaptive.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout
from ..arithmetic import flag, hyper, lr_value, spread

H = layout.of_rule("norm_adaptive")


@triton.jit
def next_numbers(row, inputs, VARIANT: tl.constexpr):
    _, _, sum_of_squares, _, average, _, _, _ = inputs
    beta = hyper(row, H.BETA)
    norm = tl.sqrt(sum_of_squares).to(tl.float32)
    return ((beta * average + (1.0 - beta) * norm.to(tl.float64)).to(tl.float32),)


@triton.jit
def prepare(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    lr, weight_decay = lr_value(row), hyper(row, H.WEIGHT_DECAY)
    divisor = next_numbers(row, inputs, VARIANT)[0].to(tl.float64) + hyper(row, H.EPS)
    step_size = tl.where(divisor != 0.0, lr / tl.where(divisor != 0.0, divisor, 1.0), 0.0).to(tl.float32)
    decay = tl.where(weight_decay != 0.0, (1.0 - lr * weight_decay).to(tl.float32), 1.0)
    return decay.to(T), tl.where(flag(row, H.MAXIMIZE), step_size, step_size * -1.0).to(T)


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    decay, neg_step_size = c
    p = tl.fma(spread(neg_step_size, g), g, p * decay)
    return p, s

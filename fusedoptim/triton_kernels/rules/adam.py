"""Adam, AdamW and AMSGrad (variant 1). See csrc/rules/adam.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout
from ..arithmetic import (
    add_scaled_ratio,
    add_scaled_square,
    apply_weight_decay,
    divide,
    double,
    flag,
    hyper,
    lerp,
    lerp_weight,
    lr_decay,
    lr_over,
    maximum,
    power,
    sqrt,
)

H = layout.of_rule("adam")


@triton.jit
def prepare(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    step = inputs[0]
    beta1, beta2, eps, weight_decay = (
        hyper(row, H.BETAS_0),
        hyper(row, H.BETAS_1),
        hyper(row, H.EPS),
        hyper(row, H.WEIGHT_DECAY),
    )
    maximize, decoupled, corrects = (
        flag(row, H.MAXIMIZE),
        flag(row, H.DECOUPLED_WEIGHT_DECAY),
        flag(row, H.BIAS_CORRECTION),
    )
    decays = weight_decay != 0.0
    bias_correction1, bias_correction2 = double(1.0), double(1.0)
    if corrects:
        bias_correction1 = 1.0 - power(beta1, step)
        bias_correction2 = 1.0 - power(beta2, step)
    decay = tl.where(decays & decoupled, lr_decay(row, weight_decay).to(T), 1.0)
    toward_grad, from_start = lerp_weight(1.0 - beta1, T)
    return (
        weight_decay.to(T),
        decays & (decoupled == 0),
        maximize,
        decay.to(T),
        toward_grad,
        from_start,
        beta2.to(T),
        (1.0 - beta2).to(T),
        tl.sqrt(bias_correction2).to(T),
        eps.to(T),
        (lr_over(row, bias_correction1) * -1.0).to(T),
    )


@triton.jit
def update(p, g, s, c, VARIANT: tl.constexpr):
    m, v, v_max = s
    (
        weight_decay,
        decays,
        maximize,
        decay,
        toward_grad,
        from_start,
        beta2,
        one_minus_beta2,
        bias_correction2_sqrt,
        eps,
        neg_step_size,
    ) = c
    p = p * decay
    g = apply_weight_decay(g, p, weight_decay, decays, maximize)
    m = lerp(m, g, toward_grad, from_start)
    v = add_scaled_square(v * beta2, g, one_minus_beta2)
    second = v
    if VARIANT == 1:
        v_max = maximum(v_max, v)
        second = v_max
    denom = divide(sqrt(second), bias_correction2_sqrt) + eps
    p = add_scaled_ratio(p, m, denom, neg_step_size)
    return p, (m, v, v_max)

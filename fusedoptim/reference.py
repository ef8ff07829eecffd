"""The specification: each update rule as a short eager function, to be read beside its paper.

The formulas are those of torch.optim's own for-loop code, operation by operation, hence with its roundings, with one
exception: the square root is correctly rounded, as IEEE 754, CUDA and Triton have it (torch's on the CPU is MKL's,
which is off by one unit in the last place for a fifth of all fp32 values). Every kernel gives the bits of these
functions.

Each function updates ``p`` and the tensors in ``s`` in place. All tensors are contiguous and of the compute dtype: fp64
for fp64 parameters, fp32 for all others. 16-bit tensors are converted before and rounded once after. ``t`` is the
number of the step, from 1, and ``h`` the parameter group, its values Python floats. Only lr may be a tensor, which
keeps torch's arithmetic.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ._rule import Group

__all__ = [
    "adagrad",
    "adam",
    "clipped",
    "correctly_rounded_sqrt",
    "global_norm",
    "norm_adaptive",
    "norm_of",
    "rmsprop",
    "sgd",
    "sum_of_squares",
]

States = dict[str, Any]
#: The key under which a group has the sum of squares of the whole gradient, where ``g`` is a process's part of it.
SUM_OF_SQUARES = "sum_of_squares"


def adam(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101) and AMSGrad (arXiv:1904.09237)."""
    lr, (beta1, beta2), weight_decay = scalar_lr(h), h["betas"], h["weight_decay"]
    if h["maximize"]:
        g = -g
    if weight_decay != 0:
        if h["decoupled_weight_decay"]:
            p.mul_(1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    second = s["exp_avg_sq"]
    if h["amsgrad"]:
        second = torch.maximum(s["max_exp_avg_sq"], second, out=s["max_exp_avg_sq"])
    corrects = h.get("bias_correction", True)
    bias_correction1 = 1 - beta1**t if corrects else 1.0
    bias_correction2 = 1 - beta2**t if corrects else 1.0
    denom = (correctly_rounded_sqrt(second) / bias_correction2**0.5).add_(h["eps"])
    p.addcdiv_(s["exp_avg"], denom, value=-(lr / bias_correction1))


def sgd(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """SGD with momentum (Sutskever et al., ICML 2013). The first gradient enters the buffer undamped."""
    momentum = h["momentum"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    if momentum != 0:
        if s["momentum_buffer"] is None:
            s["momentum_buffer"] = g.clone()
        else:
            s["momentum_buffer"].mul_(momentum).add_(g, alpha=1 - h["dampening"])
        g = g.add(s["momentum_buffer"], alpha=momentum) if h["nesterov"] else s["momentum_buffer"]
    p.add_(g, alpha=-scalar_lr(h))


def rmsprop(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """RMSprop (Hinton, 2012), centered (Graves, arXiv:1308.0850), with momentum."""
    lr, alpha = scalar_lr(h), h["alpha"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["square_avg"].mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = s["square_avg"]
    if h["centered"]:
        s["grad_avg"].lerp_(g, 1 - alpha)
        variance = variance.addcmul(s["grad_avg"], s["grad_avg"], value=-1)
    denom = correctly_rounded_sqrt(variance).add_(h["eps"])
    if h["momentum"] > 0:
        s["momentum_buffer"].mul_(h["momentum"]).addcdiv_(g, denom)
        p.add_(s["momentum_buffer"], alpha=-lr)
    else:
        p.addcdiv_(g, denom, value=-lr)


def adagrad(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011)."""
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["sum"].addcmul_(g, g, value=1)
    denom = correctly_rounded_sqrt(s["sum"]).add_(h["eps"])
    p.addcdiv_(g, denom, value=-(scalar_lr(h) / (1 + (t - 1) * h["lr_decay"])))


def norm_adaptive(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """lr divided by a moving average of the gradient's norm: ``a = beta*a + (1-beta)*||g||``,
    ``p = p*(1 - lr*weight_decay) - (lr/(a+eps))*g``, where the quotient is 0 if its divisor is. Scalars in double,
    rounded once to fp32."""
    lr, beta = float(h["lr"]), h["beta"]
    total = h[SUM_OF_SQUARES] if SUM_OF_SQUARES in h else sum_of_squares(g)
    norm = to_fp32(float(total) ** 0.5)
    average = to_fp32(beta * s["avg_grad_norm"].item() + (1 - beta) * norm)
    divisor = average + h["eps"]
    s["avg_grad_norm"].fill_(average)
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        p.mul_(to_fp32(1 - lr * h["weight_decay"]))
    p.add_(g, alpha=-to_fp32(lr / divisor if divisor != 0 else 0.0))


def global_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients, each of its compute dtype: 0-dim, fp32, or fp64 if one of them has fp64. The sums of
    squares of the tensors are added one by one, in the order of the parameters."""
    return norm_of([sum_of_squares(g) for g in grads], any(g.dtype == torch.float64 for g in grads))


def norm_of(sums: list[Tensor], wide: bool) -> Tensor:
    """The norm of tensors with these sums of squares, in fp32, or if ``wide`` in fp64."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for x in sums:
        total = total + x.to(total.device)
    return correctly_rounded_sqrt(total).to(torch.float64 if wide else torch.float32)


def clipped(g: Tensor, norm: Tensor | None, h: Group) -> Tensor:
    """The gradient that a rule gets, as torch.nn.utils.clip_grad_norm_ and then clip_grad_value_ leave it. norm: that
    of all gradients; None if no group needs it."""
    if h.get("max_grad_norm") not in (None, torch.inf):
        assert norm is not None
        g = g * torch.clamp(h["max_grad_norm"] / (norm + 1e-6), max=1.0).to(g.device, g.dtype)
    if h.get("clip_grad_value") is not None:
        limit = h["clip_grad_value"]
        if g.dtype != torch.float64:
            limit = to_fp32(limit)  # which torch refuses to do where that is infinity
        g = g.clamp(-limit, limit)
    return g


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of squares of a tensor, fp64, with bits that do not depend on who computes it.

    Elements in logical order, squares in fp64; tiles of 1024, padded with zeros, summed by halving (i with i+512, then
    i with i+256, ...); the tile sums in the same way, until one number is left.
    """
    x = x.detach().reshape(-1).to(torch.float64)
    if x.numel() == 0:
        return x.new_zeros(())
    x = x * x
    while True:
        x = torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024)
        for half in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
            x = x[:, :half] + x[:, half : 2 * half]
        x = x.reshape(-1)
        if x.numel() == 1:
            return x[0]


def correctly_rounded_sqrt(x: Tensor) -> Tensor:
    """The square root rounded to nearest, as IEEE 754 asks, for fp32 and fp64."""
    if x.dtype != torch.float64:
        return x.double().sqrt().to(x.dtype)  # two roundings are as one: 53 bits >= 2*24 + 2
    # The library's root r is at most one unit off. x - r*r is exact as an fma; compare it with the distance to the
    # midpoints between r and its neighbours. Tiny x are scaled, so that the difference does not underflow.
    tiny = x < 2.0**-900
    scaled = torch.where(tiny, x * 2.0**200, x)
    r = scaled.sqrt()
    rest = torch.addcmul(scaled, r, r, value=-1)
    up = torch.nextafter(r, torch.full_like(r, torch.inf))
    down = torch.nextafter(r, torch.zeros_like(r))
    result = torch.where(rest > r * (up - r), up, torch.where(rest <= -(r * (r - down)), down, r))
    result = torch.where((x == 0) | torch.isinf(r) | torch.isnan(r), r, result)
    return torch.where(tiny, result * 2.0**-100, result)


def scalar_lr(h: Group) -> Any:
    """lr as a number or a 0-dim tensor."""
    lr = h["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def to_fp32(x: float) -> float:
    """x rounded to the nearest fp32 value."""
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return float("inf") if x > 0 else float("-inf")

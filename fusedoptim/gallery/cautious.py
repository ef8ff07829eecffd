"""Cautious AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Rule, State, at_least_0, betas
from ..rule_functions import mean_square

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def cautious_adamw(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Cautious AdamW (arXiv:2411.16085): elements whose momentum opposes their gradient stay."""
    lr, (beta1, beta2) = h["lr"], h["betas"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        p.mul_(1 - lr * h["weight_decay"])
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    agrees = s["exp_avg"] * g > 0
    share = mean_square(agrees)
    denom = s["exp_avg_sq"].sqrt().div_((1 - beta2**t) ** 0.5).add_(h["eps"])
    rate = lr / (1 - beta1**t) / max(share, 1e-3)
    p.addcdiv_(torch.where(agrees, s["exp_avg"], 0.0), denom, value=-rate)


class CautiousAdamW(FusedOptimizer):
    r"""Cautious AdamW (arXiv:2411.16085): AdamW without the steps of elements whose momentum opposes their gradient,
    and with longer ones for the others.

    .. math::
        m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - \frac{lr}{1-\beta_1^t} \cdot \frac{[m g > 0]}{\max(s, 0.001)} \cdot
        \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}

    where s is the share of a parameter tensor's elements with ``m * g > 0``. The formula is timm's
    ``AdamWLegacy(caution=True)``: decay comes first and is for all elements; the authors' code decays last, and has an
    eps of 1e-6 and no decay by default. State per parameter: ``step`` (0-dim, fp32), ``exp_avg`` and ``exp_avg_sq``,
    each of the parameter's shape, in its dtype or in ``state_dtype``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay, ``p * (1 - lr * weight_decay)``.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="cautious_adamw",
        reference=cautious_adamw,
        hyper=(*betas(), at_least_0("eps", "epsilon value", FP32), at_least_0("weight_decay"), Flag("maximize")),
        states=(State("exp_avg"), State("exp_avg_sq", kind=SQUARES)),
        sums=1,
        sparse_alternative="SparseAdam",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, options)

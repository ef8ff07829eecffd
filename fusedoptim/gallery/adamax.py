"""Adamax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Rule, State, at_least_0, betas

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def adamax(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Adamax (arXiv:1412.6980, section 7.1)."""
    beta1, beta2 = h["betas"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["exp_avg"].lerp_(g, 1 - beta1)
    torch.maximum(s["exp_inf"].mul_(beta2), g.abs().add_(h["eps"]), out=s["exp_inf"])
    p.addcdiv_(s["exp_avg"], s["exp_inf"], value=-(h["lr"] / (1 - beta1**t)))


class Adamax(FusedOptimizer):
    r"""Adamax (arXiv:1412.6980, section 7.1), in place of torch.optim.Adamax.

    .. math::
        m = \beta_1 m + (1-\beta_1) g, \quad u = \max(\beta_2 u, |g| + \epsilon), \quad
        p = p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{u}

    State per parameter: ``step`` (0-dim, fp32), ``exp_avg`` and ``exp_inf``, each of the parameter's shape, in its
    dtype or in ``state_dtype``. Bits: torch.optim's for-loop code.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the average and of the maximum, each in [0, 1).
        eps: added to the gradient's size.
        weight_decay: added to the gradient as ``weight_decay * p``.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted (torch.optim.Adamax has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="adamax",
        reference=adamax,
        hyper=(*betas(), at_least_0("eps", "epsilon value", FP32), at_least_0("weight_decay"), Flag("maximize")),
        # The maximum decays, as an average does and unlike one that only rises: rounded at random it keeps doing so.
        states=(State("exp_avg"), State("exp_inf", kind=SQUARES)),
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)

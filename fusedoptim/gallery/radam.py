"""RAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Rule, State, at_least_0, betas
from ..rule_functions import double

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def radam(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """RAdam (arXiv:1908.03265)."""
    lr, (beta1, beta2) = h["lr"], h["betas"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        if h["decoupled_weight_decay"]:
            p.mul_(1 - lr * h["weight_decay"])
        else:
            g = g.add(p, alpha=h["weight_decay"])
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    bias_correction2 = 1 - beta2**t
    update = s["exp_avg"].div(1 - beta1**t).mul_(double(lr))
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / bias_correction2  # of the average that the moving one approximates
    if length > 5:
        rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        update.mul_(bias_correction2**0.5 / s["exp_avg_sq"].sqrt().add_(h["eps"])).mul_(rectified)
    p.add_(update, alpha=-1)


class RAdam(FusedOptimizer):
    r"""RAdam (arXiv:1908.03265), in place of torch.optim.RAdam.

    .. math::
        m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - lr \frac{m}{1-\beta_1^t} \cdot r_t \frac{\sqrt{1-\beta_2^t}}{\sqrt{v} + \epsilon}

    with the paper's r_t; without the last two factors as long as the variance of the second moment is unbounded (for
    beta2 = 0.999 in the first five steps). State per parameter: ``step`` (0-dim, fp32), ``exp_avg`` and ``exp_avg_sq``,
    each of the parameter's shape, in its dtype or in ``state_dtype``. Bits: torch.optim's for-loop code with an IEEE
    square root.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: added to the gradient as ``weight_decay * p``; see decoupled_weight_decay.
        decoupled_weight_decay: AdamW's decay, ``p = p * (1 - lr * weight_decay)``.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted (torch.optim.RAdam has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="radam",
        reference=radam,
        hyper=(
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("decoupled_weight_decay"),
            Flag("maximize"),
        ),
        states=(State("exp_avg"), State("exp_avg_sq", kind=SQUARES)),
        sparse_alternative="SparseAdam",
    )

    #: A beta2 with which both of its formulas are in use within six steps.
    _self_check: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.9), "weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

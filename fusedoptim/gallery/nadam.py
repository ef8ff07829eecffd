"""NAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import AT_LEAST_0, FP32, SQUARES, Flag, Group, Rule, State, at_least_0, betas
from ..rule_functions import to_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def nadam(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """NAdam (Dozat, 2016)."""
    lr, (beta1, beta2), decay = h["lr"], h["betas"], h["momentum_decay"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        if h["decoupled_weight_decay"]:
            p.mul_(1 - lr * h["weight_decay"])
        else:
            g = g.add(p, alpha=h["weight_decay"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * decay))
    mu_product = s["mu_product"] = to_fp32(s["mu_product"] * to_fp32(mu))
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denom = s["exp_avg_sq"].div(1 - beta2**t).sqrt_().add_(h["eps"])
    p.addcdiv_(g, denom, value=-lr * (1 - mu) / (1 - mu_product))
    p.addcdiv_(s["exp_avg"], denom, value=-lr * mu_next / (1 - mu_product * mu_next))


class NAdam(FusedOptimizer):
    r"""NAdam (Dozat, "Incorporating Nesterov momentum into Adam", 2016), in place of torch.optim.NAdam.

    .. math::
        \mu_t = \beta_1 \left(1 - \tfrac12 0.96^{t \psi}\right), \quad m = \beta_1 m + (1-\beta_1) g, \quad
        v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - \frac{lr}{\sqrt{v / (1-\beta_2^t)} + \epsilon} \left(
        \frac{(1-\mu_t) g}{1-\prod_{i \le t} \mu_i} + \frac{\mu_{t+1} m}{1-\prod_{i \le t+1} \mu_i} \right)

    State per parameter: ``step`` and ``mu_product`` (0-dim, fp32), ``exp_avg`` and ``exp_avg_sq``, each of the
    parameter's shape, in its dtype or in ``state_dtype``. Bits: torch.optim's for-loop code with an IEEE square root.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: added to the gradient as ``weight_decay * p``; see decoupled_weight_decay.
        momentum_decay: psi, with which the momentum grows to ``betas[0]``.
        decoupled_weight_decay: AdamW's decay, ``p = p * (1 - lr * weight_decay)``.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted (torch.optim.NAdam has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="nadam",
        reference=nadam,
        hyper=(
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            at_least_0("momentum_decay", accepts=AT_LEAST_0),  # a power of it must not overflow
            Flag("decoupled_weight_decay"),
            Flag("maximize"),
        ),
        states=(State("exp_avg"), State("exp_avg_sq", kind=SQUARES)),
        numbers=(State("mu_product", initial=1.0),),
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"weight_decay": 0.1, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

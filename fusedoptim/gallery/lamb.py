"""LAMB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Rule, State, at_least_0, betas
from ..rule_functions import norm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def lamb(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """LAMB (arXiv:1904.00962)."""
    (beta1, beta2), weight_decay = h["betas"], h["weight_decay"]
    if h["maximize"]:
        g = -g
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    bias_correction1 = 1 - beta1**t if h["bias_correction"] else 1.0
    bias_correction2 = 1 - beta2**t if h["bias_correction"] else 1.0
    denom = s["exp_avg_sq"].sqrt().div_(bias_correction2**0.5).add_(h["eps"])
    update = s["exp_avg"].div(bias_correction1).div_(denom)
    if weight_decay != 0:
        update.add_(p, alpha=weight_decay)
    if weight_decay != 0 or h["always_adapt"]:
        of_param, of_update = norm(p), norm(update)
        ratio = of_param / of_update if of_param > 0 and of_update > 0 else 1.0
        update.mul_(min(ratio, 1.0) if h["trust_clip"] else ratio)
    p.add_(update, alpha=-h["lr"])


class LAMB(FusedOptimizer):
    r"""LAMB (arXiv:1904.00962): Adam's update, with the norm of each parameter tensor.

    .. math::
        m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        u = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p, \quad
        p = p - lr \frac{\lVert p \rVert}{\lVert u \rVert} u

    where the ratio is 1 if one of the norms is 0, and for groups without weight decay unless always_adapt says
    otherwise. The formula and the signature are those of apex's FusedLAMB and timm's Lamb; but gradients are not
    clipped to a global norm of 1 unless ``max_grad_norm=1.0`` asks for it, and averages always have the factor
    ``1 - beta1``. State per parameter: ``step`` (0-dim, fp32), ``exp_avg`` and ``exp_avg_sq``, each of the parameter's
    shape, in its dtype or in ``state_dtype``. Norms have one definition, whose bits depend on neither backend nor
    sharding (:func:`fusedoptim.norm`).

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        bias_correction: False leaves the moments uncorrected, as if both ``1 - beta**t`` were 1.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: added to the update as ``weight_decay * p``, before its norm is taken.
        trust_clip: the ratio of the norms is at most 1.
        always_adapt: use it in groups without weight decay, too.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="lamb",
        reference=lamb,
        hyper=(
            Flag("bias_correction", absent=True),
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("trust_clip"),
            Flag("always_adapt"),
            Flag("maximize"),
        ),
        states=(State("exp_avg"), State("exp_avg_sq", kind=SQUARES)),
        sums=2,
        sparse_alternative="SparseAdam",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        trust_clip: bool = False,
        always_adapt: bool = False,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, options)

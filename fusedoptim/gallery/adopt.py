"""ADOPT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Hyper, Range, Rule, State, at_least_0, betas

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def adopt(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """ADOPT (arXiv:2411.02853): divides by what was known of the squares before this gradient."""
    lr, (beta1, beta2), weight_decay = h["lr"], h["betas"], h["weight_decay"]
    if h["maximize"]:
        g = -g
    if weight_decay != 0 and not h["decouple"]:
        g = g.add(p, alpha=weight_decay)
    if t == 1:
        s["exp_avg_sq"].addcmul_(g, g)
        return
    if weight_decay != 0 and h["decouple"]:
        p.mul_(1 - lr * weight_decay)
    normed = g.div(s["exp_avg_sq"].sqrt().clamp_(h["eps"]))
    if h["clip"]:
        limit = (t - 1) ** h["clip_exp"]
        normed.clamp_(-limit, limit)
    s["exp_avg"].lerp_(normed, 1 - beta1)
    p.add_(s["exp_avg"], alpha=-lr)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)


class ADOPT(FusedOptimizer):
    r"""ADOPT (arXiv:2411.02853): Adam, which converges with any beta2.

    .. math::
        m = \beta_1 m + (1-\beta_1) \, \mathrm{clip} \left( \frac{g}{\max(\sqrt{v}, \epsilon)}, (t-1)^{1/4} \right),
        \quad p = p - lr \cdot m, \quad v = \beta_2 v + (1-\beta_2) g^2

    The first step only sets ``v = g^2``. The formula and the signature are those of the authors' code, but that
    clipping is by a power, as in timm's Adopt, instead of by any function of t. State per parameter: ``step`` (0-dim,
    fp32), ``exp_avg`` and ``exp_avg_sq``, each of the parameter's shape, in its dtype or in ``state_dtype``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: the least divisor.
        clip_exp: the power of ``t - 1`` that normalised gradients are clipped to, from 0 to 1.
        weight_decay: added to the gradient as ``weight_decay * p``; see decouple.
        decouple: AdamW's decay, ``p = p * (1 - lr * weight_decay)``.
        clip: False leaves normalised gradients as they are, as the paper's first version does.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="adopt",
        reference=adopt,
        hyper=(
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            Hyper("clip_exp", accepts=Range(0.0, 1.0, "from 0 to 1")),  # more could overflow float32
            at_least_0("weight_decay"),
            Flag("decouple"),
            Flag("clip", absent=True),
            Flag("maximize"),
        ),
        states=(State("exp_avg"), State("exp_avg_sq", kind=SQUARES)),
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"weight_decay": 0.1, "decouple": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float = 0.25,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        clip: bool = True,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_exp": clip_exp,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "clip": clip,
            "maximize": maximize,
        }
        super().__init__(params, defaults, options)

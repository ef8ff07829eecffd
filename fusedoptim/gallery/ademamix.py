"""AdEMAMix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import AT_LEAST_0, FP32, SQUARES, Flag, Group, Hyper, Rule, State, at_least_0, betas

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def ademamix(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """AdEMAMix (arXiv:2409.03137)."""
    lr, (beta1, beta2, beta3), alpha = h["lr"], h["betas"], h["alpha"]
    if t < h["alpha_warmup"]:
        alpha = alpha * (t / h["alpha_warmup"])
    if t < h["beta3_warmup"]:
        beta3 = _between(beta1, beta3, t / h["beta3_warmup"])
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        p.mul_(1 - lr * h["weight_decay"])
    s["exp_avg_fast"].lerp_(g, 1 - beta1)
    s["exp_avg_slow"].lerp_(g, 1 - beta3)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denom = s["exp_avg_sq"].sqrt().div_((1 - beta2**t) ** 0.5).add_(h["eps"])
    p.addcdiv_(s["exp_avg_fast"].div(1 - beta1**t).add_(s["exp_avg_slow"], alpha=alpha), denom, value=-lr)


def _between(beta1: float, beta3: float, part: float) -> float:
    """The decay rate whose half-life is so far on the way from beta1's to beta3's."""
    first, last = _log(beta1), _log(beta3)
    found: float = beta3 ** (first / ((1 - part) * last + part * first))
    return found


def _log(beta: float) -> float:
    """By what a rule can compute, for numbers from 1e-8 to 1 - 1e-9 and else of the nearer of these: 64 times that of
    the 64th root, which is near enough to 1 for eight terms of a series. 3e-11 of its value off for 0.9999."""
    root: float = min(max(beta, 1e-8), 1 - 1e-9) ** (1 / 64)
    z = (root - 1) / (root + 1)
    series = 0.0
    for odd in range(15, 0, -2):
        series = series * z * z + 1 / odd
    return 128 * z * series


class AdEMAMix(FusedOptimizer):
    r"""AdEMAMix (arXiv:2409.03137): AdamW with a second, slow average of the gradients.

    .. math::
        m_1 = \beta_1 m_1 + (1-\beta_1) g, \quad m_2 = \beta_3 m_2 + (1-\beta_3) g, \quad
        v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - lr \left( \frac{m_1 / (1-\beta_1^t) + \alpha m_2}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p
        \right)

    The signature is that of the authors' code; a warm-up that is off is 0 in groups. The decay comes first, as in
    AdamW: the same up to rounding. State per parameter: ``step`` (0-dim, fp32), ``exp_avg_fast``, ``exp_avg_slow`` and
    ``exp_avg_sq``, each of the parameter's shape, in its dtype or in ``state_dtype``; with a beta3 of 0.9999 a slow
    average in bfloat16 does not move unless it is rounded stochastically:
    ``rounding={"exp_avg_slow": "stochastic"}``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the fast average, of the squares, and of the slow average, each in [0, 1).
        alpha: the weight of the slow average.
        beta3_warmup: in so many steps beta3 comes from ``betas[0]``, its half-life growing linearly.
        alpha_warmup: in so many steps alpha comes from 0, linearly.
        eps: added to the denominator.
        weight_decay: decoupled decay, ``p * (1 - lr * weight_decay)``.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="ademamix",
        reference=ademamix,
        hyper=(
            *betas(3),
            at_least_0("alpha"),
            Hyper("beta3_warmup", accepts=AT_LEAST_0),
            Hyper("alpha_warmup", accepts=AT_LEAST_0),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("maximize"),
        ),
        states=(State("exp_avg_fast"), State("exp_avg_sq", kind=SQUARES), State("exp_avg_slow")),
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"beta3_warmup": 4, "alpha_warmup": 5, "weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": 0 if beta3_warmup is None else beta3_warmup,
            "alpha_warmup": 0 if alpha_warmup is None else alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, options)

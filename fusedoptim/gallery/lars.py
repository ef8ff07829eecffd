"""LARS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, Flag, Group, Hyper, Rule, State, at_least_0
from .._values import number
from ..rule_functions import double, norm
from ..sgd import check_nesterov

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def lars(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """LARS (arXiv:1708.03888)."""
    lr, momentum, weight_decay = double(h["lr"]), h["momentum"], h["weight_decay"]
    if h["maximize"]:
        g = -g
    if weight_decay != 0 or h["always_adapt"]:
        of_param, of_grad = norm(p), norm(g)
        ratio = 1.0
        if of_param > 0 and of_grad > 0:
            ratio = h["trust_coeff"] * of_param / (of_grad + of_param * weight_decay + h["eps"])
        if h["trust_clip"]:
            ratio = ratio / lr if ratio < lr else 1.0
        g = g.add(p, alpha=weight_decay).mul_(ratio)
    if momentum != 0:
        if s["momentum_buffer"] is None:
            s["momentum_buffer"] = g.clone()
        else:
            s["momentum_buffer"].mul_(momentum).add_(g, alpha=1 - h["dampening"])
        g = g.add(s["momentum_buffer"], alpha=momentum) if h["nesterov"] else s["momentum_buffer"]
    p.add_(g, alpha=-lr)


class LARS(FusedOptimizer):
    r"""LARS (arXiv:1708.03888): SGD with momentum, with a learning rate for each parameter tensor from its norms.

    .. math::
        r = \frac{c \lVert p \rVert}{\lVert g \rVert + \lambda \lVert p \rVert + \epsilon}, \quad
        b = \mu b + (1-\tau) r (g + \lambda p), \quad p = p - lr \cdot b

    where r is 1 if one of the norms is 0, and for groups without weight decay unless always_adapt says otherwise. The
    formula and the signature are timm's Lars; apex's LARC is ``trust_clip=True``. As there, momentum is 0 unless it is
    asked for; the paper's is 0.9. The first gradient of a parameter enters its buffer undamped. State per parameter,
    with momentum: ``momentum_buffer``, of its shape, in its dtype or in ``state_dtype``. Norms have one definition,
    whose bits depend on neither backend nor sharding (:func:`fusedoptim.norm`).

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        momentum: the factor mu; 0 keeps no buffer.
        dampening: tau.
        weight_decay: added to the gradient as ``weight_decay * p``, after its norm is taken.
        nesterov: step along ``r * (g + weight_decay * p) + mu * b``.
        trust_coeff: c.
        eps: added to the denominator.
        trust_clip: the step's factor is 1 at most: r where r < lr, else lr.
        always_adapt: use r in groups without weight decay, too.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="lars",
        reference=lars,
        hyper=(
            at_least_0("momentum"),
            Hyper("dampening"),
            at_least_0("weight_decay"),
            Flag("nesterov"),
            at_least_0("trust_coeff"),
            at_least_0("eps", "epsilon value", FP32),
            Flag("trust_clip"),
            Flag("always_adapt"),
            Flag("maximize"),
        ),
        states=(State("momentum_buffer", needed=lambda group: number(group["momentum"]) != 0, starts_absent=True),),
        has_step=False,
        sums=2,
        check=check_nesterov,
    )

    _self_check: ClassVar[dict[str, Any]] = {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "trust_coeff": 0.5}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coeff": trust_coeff,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, options)

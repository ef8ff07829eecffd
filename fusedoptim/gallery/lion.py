"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import Flag, Group, Rule, State, at_least_0, betas

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def lion(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Lion (arXiv:2302.06675)."""
    lr, (beta1, beta2) = h["lr"], h["betas"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        p.mul_(1 - lr * h["weight_decay"])
    p.add_(s["exp_avg"].mul(beta1).add_(g, alpha=1 - beta1).sign_(), alpha=-lr)
    s["exp_avg"].mul_(beta2).add_(g, alpha=1 - beta2)


class Lion(FusedOptimizer):
    r"""Lion (arXiv:2302.06675): steps by the sign of an interpolated momentum.

    .. math::
        p = p (1 - lr \cdot \lambda), \quad p = p - lr \, \mathrm{sign}(\beta_1 m + (1-\beta_1) g), \quad
        m = \beta_2 m + (1-\beta_2) g

    with the bits of lion-pytorch 0.2, whose first arguments these are. The paper advises a learning rate of a third to
    a tenth of AdamW's, and a decay that is larger by as much. State per parameter: ``exp_avg``, of its shape, in its
    dtype or in ``state_dtype``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor: the size of every element's step.
        betas: the share of the momentum in the step's direction, and its decay rate, each in [0, 1).
        weight_decay: decoupled decay, ``p * (1 - lr * weight_decay)``.
        maximize: go up instead of down.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="lion",
        reference=lion,
        hyper=(*betas(), at_least_0("weight_decay"), Flag("maximize")),
        states=(State("exp_avg"),),
        has_step=False,
    )

    _self_check: ClassVar[dict[str, Any]] = {"weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, options)

"""Averaged SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import AT_LEAST_0, Flag, Group, Hyper, Range, Rule, State, at_least_0
from .._values import number
from ..rule_functions import double, to_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def asgd(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Averaged SGD (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992)."""
    lr, lambd, eta, mu = h["lr"], h["lambd"], s["eta"], s["mu"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    p.mul_(1 - lambd * eta)
    p.add_(g, alpha=-eta)
    if mu == 1:
        s["ax"].copy_(p)
    else:
        s["ax"].add_(p.sub(s["ax"]).mul_(mu))
    fall = max(1 + lambd * lr * t, 1e-18)  # a power of what is below 0, as a negative lr may have it, is no number
    power = lr - lr + double(fall) ** h["alpha"]  # rounded to the dtype of an lr that is a tensor
    s["eta"] = to_fp32(double(lr / power))
    s["mu"] = to_fp32(1 / max(1, t - h["t0"]))


class ASGD(FusedOptimizer):
    r"""Averaged SGD (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992), in place of torch.optim.ASGD.

    .. math::
        p = p (1 - \lambda \eta) - \eta g, \quad a = a + \mu (p - a), \quad
        \eta = \frac{lr}{(1 + \lambda \, lr \, t)^\alpha}, \quad \mu = \frac{1}{\max(1, t - t_0)}

    where a step uses the rates that the step before it left: the first ``eta`` is the group's lr when the states are
    made, the first ``mu`` is 1. State per parameter: ``step``, ``eta`` and ``mu`` (0-dim, fp32) and ``ax``, the
    average, of the parameter's shape, in its dtype or in ``state_dtype``. Bits: torch.optim's for-loop code.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        lambd: the decay, ``p * (1 - lambd * eta)``, at least 0.
        alpha: the power of eta's fall, from 0 to 5.
        t0: the step after which averaging begins.
        weight_decay: added to the gradient as ``weight_decay * p``.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted (torch.optim.ASGD has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="asgd",
        reference=asgd,
        hyper=(
            Hyper("lambd", accepts=AT_LEAST_0),
            Hyper("alpha", accepts=Range(0.0, 5.0, "from 0 to 5")),  # its powers must not overflow
            Hyper("t0"),
            at_least_0("weight_decay"),
            Flag("maximize"),
        ),
        states=(State("ax"),),
        numbers=(State("eta", initial=lambda group: number(group["lr"])), State("mu", initial=1.0)),
    )

    _self_check: ClassVar[dict[str, Any]] = {"lambd": 0.1, "t0": 2, "weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)

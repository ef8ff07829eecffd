"""Adadelta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import FP32, SQUARES, Flag, Group, Hyper, Range, Rule, State, at_least_0

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def adadelta(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Adadelta (arXiv:1212.5701)."""
    rho, eps = h["rho"], h["eps"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["square_avg"].mul_(rho).addcmul_(g, g, value=1 - rho)
    delta = s["acc_delta"].add(eps).sqrt_().div_(s["square_avg"].add(eps).sqrt_()).mul_(g)
    s["acc_delta"].mul_(rho).addcmul_(delta, delta, value=1 - rho)
    p.add_(delta, alpha=-h["lr"])


class Adadelta(FusedOptimizer):
    r"""Adadelta (arXiv:1212.5701), in place of torch.optim.Adadelta.

    .. math::
        v = \rho v + (1-\rho) g^2, \quad d = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g, \quad
        u = \rho u + (1-\rho) d^2, \quad p = p - lr \cdot d

    State per parameter: ``step`` (0-dim, fp32), ``square_avg`` and ``acc_delta``, each of the parameter's shape, in its
    dtype or in ``state_dtype``. Bits: torch.optim's for-loop code with an IEEE square root.

    Args:
        params: parameters, named parameters or groups.
        lr: the factor of the step, a float or a one-element tensor.
        rho: the decay rate of both averages of squares, in [0, 1].
        eps: added below both roots.
        weight_decay: added to the gradient as ``weight_decay * p``.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        maximize: go up instead of down.
        fused: accepted (torch.optim.Adadelta has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="adadelta",
        reference=adadelta,
        hyper=(
            Hyper("rho", label="rho value", constructor=Range(0.0, 1.0, "from 0 to 1")),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("maximize"),
        ),
        states=(State("square_avg", kind=SQUARES), State("acc_delta", kind=SQUARES)),
        sparse_alternative="Adagrad",
    )

    _self_check: ClassVar[dict[str, Any]] = {"weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

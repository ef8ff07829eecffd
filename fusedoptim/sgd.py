"""SGD with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import reference
from ._base import FusedOptimizer
from ._rule import Flag, Group, Hyper, Rule, State, at_least_0
from ._values import number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


def check_nesterov(group: Group) -> None:
    nesterov, momentum, dampening = (number(group[key]) for key in ("nesterov", "momentum", "dampening"))
    if nesterov != 0 and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013).

    .. math:: b = \mu b + (1-\tau) g, \quad p = p - lr \cdot b

    The first gradient of a parameter enters its buffer undamped, as in torch. State per parameter, with momentum:
    ``momentum_buffer``, of the parameter's shape, in its dtype or in ``state_dtype``. Bits:
    :func:`fusedoptim.reference.sgd`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        momentum: the factor mu; 0 keeps no buffer.
        dampening: tau.
        weight_decay: added to the gradient as ``weight_decay * p``.
        nesterov: step along ``g + mu * b``.
        maximize: go up instead of down.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        fused: accepted; the step is always fused.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="sgd",
        reference=reference.sgd,
        hyper=(
            at_least_0("momentum", absent=0),
            Hyper("dampening"),
            at_least_0("weight_decay"),
            Flag("nesterov"),
            Flag("maximize"),
        ),
        states=(State("momentum_buffer", needed=lambda group: number(group["momentum"]) != 0, starts_absent=True),),
        has_step=False,
        check=check_nesterov,
    )

    _self_check: ClassVar[dict[str, Any]] = {"momentum": 0.9, "dampening": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

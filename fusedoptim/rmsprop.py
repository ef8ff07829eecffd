"""RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import reference
from ._base import FusedOptimizer
from ._checks import at_least_zero
from ._rule import Rule, Slot

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


class RMSprop(FusedOptimizer):
    r"""RMSprop (Hinton, 2012), optionally centered (Graves, arXiv:1308.0850), with momentum.

    .. math:: v = \alpha v + (1-\alpha) g^2, \quad p = p - lr \cdot \frac{g}{\sqrt{v} + \epsilon}

    State per parameter: ``step`` (0-dim, fp32), ``square_avg``, with momentum ``momentum_buffer``, centered
    ``grad_avg``, each of the parameter's shape, in its dtype or in ``state_dtype``. Bits:
    :func:`fusedoptim.reference.rmsprop`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        alpha: the decay rate of the average of squares.
        eps: added to the denominator.
        weight_decay: added to the gradient as ``weight_decay * p``.
        momentum: the momentum of the normalised gradient; 0 keeps no buffer.
        centered: subtract the square of the average gradient from the average of squares.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        fused: accepted (torch.optim.RMSprop has no fused form); the step is always fused.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="rmsprop",
        reference=reference.rmsprop,
        hyper=(
            ("alpha", -1),
            ("eps", -1),
            ("weight_decay", -1),
            ("momentum", -1),
            ("centered", -1),
            ("maximize", -1),
        ),
        slots=(
            Slot("square_avg"),
            Slot("momentum_buffer", needed=lambda group: bool(group["momentum"] > 0)),
            Slot("grad_avg", needed=lambda group: bool(group["centered"])),
        ),
        check=at_least_zero(
            ("eps", "epsilon value"),
            ("momentum", "momentum value"),
            ("weight_decay", "weight_decay value"),
            ("alpha", "alpha value"),
        ),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

"""RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import reference
from ._base import FusedOptimizer
from ._rule import FP32, SQUARES, Flag, Group, Rule, State, at_least_0
from ._storage import asked_dtype
from ._values import number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


def _check(group: Group) -> None:
    if number(group["centered"]) != 0 and "int8" in (asked_dtype(group, name) for name in ("square_avg", "grad_avg")):
        raise ValueError(
            "state_dtype='int8' is not for 'square_avg' and 'grad_avg' of a centered RMSprop: it divides by a root of "
            "a difference of the two, which errors of three percent make negative; use state_dtype="
            "{'momentum_buffer': 'int8', 'square_avg': torch.float32, 'grad_avg': torch.float32}"
        )


class RMSprop(FusedOptimizer):
    r"""RMSprop (Hinton, 2012), optionally centered (Graves, arXiv:1308.0850), with momentum.

    .. math:: v = \alpha v + (1-\alpha) g^2, \quad p = p - lr \cdot \frac{g}{\sqrt{v} + \epsilon}

    Centered, the root is that of ``v - m**2``, where m is the average gradient. Where rounding makes that negative the
    root is a NaN, and so is the parameter from then on, as in torch.optim.

    With ``eps_inside_root=True`` the denominator is ``sqrt(v + eps)``, or ``sqrt(v - m**2 + eps)``, as in TensorFlow's
    ``tf.keras.optimizers.RMSprop`` and ``tf.compat.v1.train.RMSPropOptimizer``. It is a NaN only where ``m**2 - v`` is
    more than eps. The latter starts with a ``v`` of ones instead of zeros: so does this with
    ``optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": torch.ones_like(p)}`` before the first step. With
    momentum both keep lr in the buffer, so that a change of lr acts later.

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
        eps_inside_root: add eps before the root is taken, not after; see above.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="rmsprop",
        reference=reference.rmsprop,
        hyper=(
            at_least_0("alpha"),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            at_least_0("momentum", absent=0),
            Flag("centered"),
            Flag("maximize"),
            Flag("eps_inside_root", off=False),
        ),
        states=(
            State("square_avg", kind=SQUARES),
            State("momentum_buffer", needed=lambda group: number(group["momentum"]) > 0),
            State("grad_avg", needed=lambda group: number(group["centered"]) != 0),
        ),
        check=_check,
        sparse_alternative="Adagrad",
    )

    _self_check: ClassVar[dict[str, Any]] = {"momentum": 0.9, "centered": True}

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
        eps_inside_root: bool = False,
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
            "eps_inside_root": eps_inside_root,
        }
        super().__init__(params, defaults, options)

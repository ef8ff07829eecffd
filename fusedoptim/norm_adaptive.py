"""Steps normalised by a moving average of the gradient's norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import reference
from ._base import FusedOptimizer
from ._rule import BELOW_1, FP32, Flag, Hyper, Rule, State, at_least_0

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


class NormAdaptive(FusedOptimizer):
    r"""Divides the learning rate by a moving average of each parameter tensor's gradient norm.

    .. math::
        a = \beta a + (1-\beta) \lVert g \rVert_2, \quad
        p = p (1 - lr \cdot \lambda) - \frac{lr}{a + \epsilon} g

    It is this package's own; NovoGrad (arXiv:1905.11286) is its nearest relative. a starts at 0, without bias
    correction, so that the first steps are longer by up to ``1/(1-beta)``. State per parameter: ``step`` and
    ``avg_grad_norm``, both 0-dim and fp32. The norm has one definition, whose bits depend on neither backend, threads
    nor memory layout (:func:`fusedoptim.reference.sum_of_squares`). Bits: :func:`fusedoptim.reference.norm_adaptive`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor: the length of a step along a gradient of average norm.
        beta: the decay rate of the average, in [0, 1).
        eps: added to the average, at least 0. Where their sum is 0, because with ``eps=0`` all gradients so far were
            zeros, no step is taken along the gradient.
        weight_decay: decoupled decay, ``p * (1 - lr * weight_decay)``.
        maximize: go up instead of down.
        foreach, differentiable: only None or False.
        fused: accepted; the step is always fused.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range.
    """

    rule = Rule(
        name="norm_adaptive",
        reference=reference.norm_adaptive,
        hyper=(
            Hyper("beta", accepts=BELOW_1, label="beta parameter"),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("maximize"),
        ),
        states=(),
        numbers=(State("avg_grad_norm"),),
        sums=1,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            "beta": beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

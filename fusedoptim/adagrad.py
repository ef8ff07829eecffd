"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import _lending, reference
from ._base import FusedOptimizer
from ._rule import AT_LEAST_0, FP32, SQUARES, Flag, Rule, State, at_least_0

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


class Adagrad(FusedOptimizer):
    r"""Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011).

    .. math:: s = s + g^2, \quad p = p - \frac{lr}{1 + (t-1)\eta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    State per parameter, made when the optimizer is built, as in torch: ``step`` (0-dim, fp32) and ``sum``, of the
    parameter's shape, in its dtype or in ``state_dtype``. Bits: :func:`fusedoptim.reference.adagrad`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        lr_decay: eta.
        weight_decay: added to the gradient as ``weight_decay * p``.
        initial_accumulator_value: what ``sum`` starts with.
        eps: added to the denominator.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        fused: accepted; the step is always fused.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="adagrad",
        reference=reference.adagrad,
        hyper=(
            at_least_0("lr_decay", accepts=AT_LEAST_0),  # below it 1 + (t-1)*lr_decay could be 0
            at_least_0("weight_decay"),
            at_least_0("eps", "epsilon value", FP32),
            Flag("maximize"),
        ),
        states=(State("sum", initial="initial_accumulator_value", kind=SQUARES),),
        states_at_construction=True,
        initial=(at_least_0("initial_accumulator_value"),),
        sparse_alternative="Adagrad",
    )

    _self_check: ClassVar[dict[str, Any]] = {"lr_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def share_memory(self) -> None:
        """Moves the sums to shared memory, for training by several processes."""
        _lending.take_over(self._lent, self.state)
        for state in self.state.values():
            if "sum" in state:  # a parameter that is not materialised has none so far
                state["sum"].share_memory_()

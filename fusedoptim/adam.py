"""Adam and AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import reference
from ._base import FusedOptimizer
from ._options import check_options
from ._rule import FP32, MAXIMUM, SQUARES, Flag, Rule, State, at_least_0, betas
from ._values import number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import StepOptions


class Adam(FusedOptimizer):
    r"""Adam (arXiv:1412.6980), with AMSGrad (arXiv:1904.09237) and decoupled decay (arXiv:1711.05101) as options.

    .. math::
        m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}

    State per parameter: ``step`` (0-dim, fp32), ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``, each
    of the parameter's shape, in its dtype or in ``state_dtype``. Bits: :func:`fusedoptim.reference.adam`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: added to the gradient as ``weight_decay * p``; see decoupled_weight_decay.
        amsgrad: divide by the largest second moment so far.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted; the step is always fused.
        decoupled_weight_decay: AdamW's decay, ``p = p * (1 - lr * weight_decay)``.
        bias_correction: False leaves the moments uncorrected, as if both ``1 - beta**t`` were 1.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="adam",
        reference=reference.adam,
        hyper=(
            *betas(),
            at_least_0("eps", "epsilon value", FP32),
            at_least_0("weight_decay"),
            Flag("amsgrad"),
            Flag("maximize"),
            Flag("decoupled_weight_decay"),
            Flag("bias_correction", off=True),
        ),
        states=(
            State("exp_avg"),
            State("exp_avg_sq", kind=SQUARES),
            State("max_exp_avg_sq", needed=lambda group: number(group["amsgrad"]) != 0, kind=MAXIMUM),
        ),
        sparse_alternative="SparseAdam",
    )

    _self_check: ClassVar[dict[str, Any]] = {"amsgrad": True, "weight_decay": 0.1}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, options)


class AdamW(Adam):
    r"""AdamW (arXiv:1711.05101): :class:`Adam` with ``decoupled_weight_decay=True`` and a decay of 0.01.

    .. math::
        p = p (1 - lr \cdot \lambda), \quad m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        p = p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}

    ``AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)``, and for bf16 models
    ``AdamW(model.named_parameters(), lr=3e-4, master="remainder")``.

    State per parameter: ``step`` (0-dim, fp32), ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``, each
    of the parameter's shape, in its dtype or in ``state_dtype``. Bits: :func:`fusedoptim.reference.adam`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: the decay, ``p = p * (1 - lr * weight_decay)``.
        amsgrad: divide by the largest second moment so far.
        maximize: go up instead of down.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        fused: accepted; the step is always fused.
        bias_correction: False leaves the moments uncorrected, as if both ``1 - beta**t`` were 1.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    _self_check: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        check_options(options, type(self))  # before an argument of Adam's that this class lacks gets through to it
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            bias_correction=bias_correction,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also after loading a state_dict of Adam's
            group["decoupled_weight_decay"] = True

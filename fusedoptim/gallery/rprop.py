"""Rprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import FusedOptimizer
from .._rule import SQUARES, Flag, Group, Hyper, Rule, State
from .._values import number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import StepOptions


def rprop(p: Tensor, g: Tensor, s: dict[str, Any], t: float, h: Group) -> None:
    """Rprop (Riedmiller and Braun, ICNN 1993): the gradient that turned counts as none."""
    (eta_minus, eta_plus), (smallest, largest) = h["etas"], h["step_sizes"]
    if h["maximize"]:
        g = -g
    factor = g.mul(s["prev"]).sign()
    factor = torch.where(factor > 0, eta_plus, factor)
    factor = torch.where(factor < 0, eta_minus, factor)
    factor = torch.where(factor == 0, 1.0, factor)
    s["step_size"].mul_(factor).clamp_(smallest, largest)
    g = torch.where(factor == eta_minus, 0.0, g)
    p.addcmul_(g.sign(), s["step_size"], value=-1)
    s["prev"].copy_(g)


def _check(group: Group) -> None:
    eta_minus, eta_plus = map(number, group["etas"])
    if not 0.0 < eta_minus < 1.0 < eta_plus:
        raise ValueError(f"Invalid eta values: {group['etas'][0]}, {group['etas'][1]}")


class Rprop(FusedOptimizer):
    r"""Rprop (Riedmiller and Braun, ICNN 1993), in place of torch.optim.Rprop: steps by the gradient's sign, each
    element with a step size of its own, which grows while the sign stays and shrinks where it turns.

    .. math::
        \eta = \mathrm{clip}(\eta \cdot f), \quad p = p - \eta \, \mathrm{sign}(g)

    with f of ``etas``: the second where ``g`` has the sign of the gradient before, the first where it has the other,
    and 1 where one of them is 0. A gradient whose sign turned counts as 0.

    State per parameter: ``step`` (0-dim, fp32), ``prev``, the gradient before, and ``step_size``, which starts as lr,
    each of the parameter's shape, in its dtype or in ``state_dtype``. Bits: torch.optim's for-loop code.

    Args:
        params: parameters, named parameters or groups.
        lr: the first step size, a float or a one-element tensor; it is read where states are made, and by no step.
        etas: what a step size is multiplied with where the sign turned, in (0, 1), and where it stayed, above 1.
        step_sizes: the smallest and the largest.
        capturable: accepted; every step can be captured in a CUDA graph, but for the first.
        foreach, differentiable: only None or False; they exist for torch.optim's signature.
        maximize: go up instead of down.
        fused: accepted (torch.optim.Rprop has no fused form).
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values out of range, with torch.optim's messages.
    """

    rule = Rule(
        name="rprop",
        reference=rprop,
        hyper=(Hyper("etas", 0), Hyper("etas", 1), Hyper("step_sizes", 0), Hyper("step_sizes", 1), Flag("maximize")),
        # Step sizes are no squares, but as these never negative and of many orders of magnitude.
        states=(State("prev"), State("step_size", initial=lambda group: number(group["lr"]), kind=SQUARES)),
        check=_check,
    )

    _self_check: ClassVar[dict[str, Any]] = {"step_sizes": (0.008, 0.014)}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)

"""What steps within the backward pass cannot be combined with, and which parameters they are for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ._base import FusedOptimizer
from ._check_tensors import describe, is_materialised
from ._dtensor import is_dtensor
from ._fakes import is_fake
from ._members import convert, find, keep_apart
from ._rule import Group
from ._states import Changes


def can_be_hooked(p: Tensor) -> bool:
    """Others never have a gradient."""
    known = type(p) in (Tensor, Parameter) or is_dtensor(p)
    return is_materialised(p) and (p.requires_grad or (known and p.is_floating_point()))


def check_all(optimizer: FusedOptimizer) -> None:
    """Everything that a first step would check, parameters that share memory among them, which one alone cannot see."""
    for index, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p.requires_grad and not is_materialised(p):
                raise ValueError(
                    f"{describe(group, index, i)} has no memory yet, hence cannot be hooked: run the model "
                    "once before, or materialise it with to_empty()"
                )
            if getattr(p, "_is_flat_param", False):
                raise ValueError(
                    f"{describe(group, index, i)} is a flat parameter of FullyShardedDataParallel, which averages "
                    "gradients after the hooks of parameters: use FSDP2 (fully_shard), or step after the pass"
                )

    def steps(p: Tensor) -> bool:
        return p.requires_grad and is_materialised(p) and not is_fake(p)

    found, changes = find(optimizer, steps), Changes(optimizer.state)
    try:
        convert(found, changes)
        keep_apart(found, optimizer, steps)
    finally:
        changes.undo()


def check_combination(optimizer: Optimizer, group: Group) -> None:
    """Raises for options that need all gradients at once. They are found at the end of the backward pass only."""
    if group.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={group['max_grad_norm']} cannot be combined with steps in the backward pass: the norm of "
            "all gradients is known only at its end; set it to None, or clip_grad_value, which needs one gradient only"
        )
    if optimizer._options.get("skip_nonfinite"):  # type: ignore[attr-defined]
        raise ValueError(
            "skip_nonfinite=True cannot be combined with steps in the backward pass: whether any gradient is infinite "
            "or NaN is known only at its end, when most have been stepped; build the optimizer without it"
        )
    if optimizer._options.get("zero_grad_in_step"):  # type: ignore[attr-defined]
        raise ValueError(
            "zero_grad_in_step=True cannot be combined with steps in the backward pass, which set gradients to None: "
            "build the optimizer without it"
        )
    if optimizer._step_supports_amp_scaling:  # type: ignore[attr-defined]
        raise ValueError(
            "amp_in_step=True cannot be combined with steps in the backward pass: a GradScaler's scale, "
            "and whether it overflowed, are known only at its end; train in bfloat16, which needs no scaler"
        )
    if optimizer._optimizer_step_pre_hooks:
        raise ValueError(
            "step pre-hooks cannot be combined with steps in the backward pass: they would run in optimizer.step(), "
            "after all parameters have been stepped; remove them, or use register_post_accumulate_grad_hook"
        )

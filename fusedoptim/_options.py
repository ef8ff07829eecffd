"""What every optimizer takes beside its own arguments: backend, dtype of states, and what its one pass does around the
update rule."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from . import _backends
from ._rule import AROUND

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class StepOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer. The first three are values of groups, too, where they are on: a checkpoint
    carries them then, and brings them as it does lr; one without them leaves them as they are. The others are of the
    optimizer as a whole and in no state_dict, because they describe the program and not the training: pass them again
    where a run is resumed. Copies and pickles keep them.

    In one pass over the parameters a step unscales the gradients (for a GradScaler), clips them by norm, then by value,
    updates states and parameters, then the moving averages, and zeroes the gradients. The bits are those of torch's
    separate calls in this order, but that 16-bit gradients are not rounded in between.

    Args:
        max_grad_norm: scales a group's gradients by ``min(1, max_grad_norm / (norm + 1e-6))``, where norm is that of
            the gradients of *all* groups of this optimizer, then in ``optimizer.last_grad_norm``; where parameters are
            DTensors, that of the whole tensors. Above 0; infinity measures only; None is off. In memory gradients stay
            as they are. Bits: :func:`fusedoptim.clip_grad_norm_`.
        clip_grad_value: holds every element of a group's gradients within ``[-clip_grad_value, clip_grad_value]``,
            after ``max_grad_norm``. None is off.
        ema_decay: keeps a state ``ema``, in fp32 (fp64 for fp64 parameters): it starts as the parameter before the
            first step and becomes ``lerp(ema, parameter, 1 - ema_decay)`` after each in which it has a gradient. In
            [0, 1); None is off.
        skip_nonfinite: a step whose norm of all gradients is not finite changes nothing, and is counted in
            ``optimizer.skipped_steps``.
        zero_grad_in_step: leaves zeros in all gradients, also if the step is skipped, so that no zero_grad() is needed.
            A GradScaler then has to leave skipping to the step, as with ``amp_in_step``.
        amp_in_step: has a GradScaler leave unscaling and skipping to the step, which need not wait for the device then.
            By default, as with torch's optimizers unless they are fused, the scaler does both before it.
        norm_group: a process group, or several, over which the sum of squares of that norm is added, where tensors do
            not show that other processes have others: FSDP1's flat parameters, ZeroRedundancyOptimizer, the stages of a
            pipeline, experts that are not DTensors. None of them may have the same tensor as another.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None chooses the best per device.
        state_dtype: the dtype of states with the parameter's shape: torch.float32, torch.bfloat16, or None for the
            parameter's own. Whatever it is, a 16-bit parameter is not moved by an update of less than half a unit in
            its last place, which is up to 0.4 percent of its value in bfloat16 and 0.05 in float16.
    """

    # A text for each stands above (tests/test_help.py); every optimizer's docstring repeats it (_help.py).
    max_grad_norm: float | None
    clip_grad_value: float | None
    ema_decay: float | None
    skip_nonfinite: bool
    zero_grad_in_step: bool
    amp_in_step: bool
    norm_group: Any
    backend: str | None
    state_dtype: torch.dtype | None


GROUP_OPTIONS = tuple(hyper.key for hyper in AROUND)
#: Those of the optimizer as a whole.
DEFAULTS: dict[str, Any] = {
    "skip_nonfinite": False,
    "zero_grad_in_step": False,
    "amp_in_step": False,
    "norm_group": None,
    "backend": None,
    "state_dtype": None,
}
#: What other libraries call an argument, where the spelling does not tell.
OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "rho": "alpha", "clip_norm": "max_grad_norm"}


def scales_in_step(options: Mapping[str, Any]) -> bool:
    """Whether a GradScaler leaves unscaling and skipping to the step. One that skips a step itself would leave the
    gradients as they are."""
    return bool(options["amp_in_step"] or options["zero_grad_in_step"])


def check_options(options: Mapping[str, Any], optimizer: type) -> None:
    """Names, and the values that no group has."""
    for name in options:
        if name not in StepOptions.__annotations__:
            raise TypeError(_unexpected(name, optimizer))
    if options.get("state_dtype") not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype: {options['state_dtype']}; choose torch.float32, torch.bfloat16 or None")
    _backends.check_name(options.get("backend"))


def _unexpected(name: str, optimizer: type) -> str:
    """That an optimizer takes no such argument, which one may be meant, and all that it takes."""
    own = [p.name for p in inspect.signature(optimizer).parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = [*own[1:], *StepOptions.__annotations__]  # params comes first
    meant = OTHER_NAMES.get(name)
    close = [meant] if meant in known else difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"{optimizer.__name__}() got an unexpected keyword argument {name!r}{hint} It takes {', '.join(own)}; "
        f"and every optimizer takes {', '.join(StepOptions.__annotations__)}"
    )

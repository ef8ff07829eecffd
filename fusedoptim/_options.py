"""What every optimizer takes beside its own arguments: backend, how parameters and states are stored, and what its one
pass does around the update rule."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from . import _backends


class StepOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer. The first seven are values of groups, too, where they are on: a checkpoint
    carries them then, and brings them as it does lr, but that ``master``, ``state_dtype`` and ``rounding`` stay as they
    are where they are on; one without them leaves them as they are. The others are of the optimizer as a whole and in
    no state_dict, because they describe the program and not the training: pass them again where a run is resumed.
    Copies and pickles keep them.

    A group's values may change between steps. With another ``master`` or ``state_dtype`` the next step first stores
    what there is in the new way, to nearest. Without ``master`` it goes on from the parameters as they are.

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
        master: what a 16-bit parameter keeps of the fp32 number that it stands for, so that small updates are not lost.
            ``"remainder"``, for training in bfloat16: a state ``param_remainder`` with the lower 16 bits, beside a
            parameter that is that number rounded to nearest, ties away from zero: exact, in 2 bytes per element.
            ``"remainder8"``, where memory is short: the same with 8 bits, for a number rounded to 24.
            ``torch.float32``, for float16, and bfloat16 where a plain copy is wanted: a state ``param_master``; states
            have fp32 then unless ``state_dtype`` says otherwise. Whoever writes to such a parameter gives it another
            number: what was written, off by less than a unit in its last place with a remainder. Parameters of 32 and
            64 bits have none. None is off.
        state_dtype: the dtype of states with the parameter's shape: torch.float32, torch.bfloat16 (or these as texts),
            ``"int8"``, None for the parameter's own (with ``master=torch.float32`` that), or a dict of these by the
            states' names. fp32 states with a remainder give the bits of training in fp32. ``"int8"``, for models whose
            states are too large, is 8-bit codes with an fp32 scale for each block of 128 elements in a row, in two
            states ``NAME_q8`` and ``NAME_scale``; parameters of one dimension, fewer than 4096 elements or rows of
            fewer than 64 have bfloat16 instead. Without ``master`` or stochastic rounding a 16-bit parameter is not
            moved by an update of less than half a unit in its last place, which is up to 0.4 percent of its value in
            bfloat16 and 0.05 in float16, whatever dtype its states have.
        rounding: how bfloat16 parameters and states are rounded: ``"nearest"``, ``"stochastic"``, or a dict of these by
            ``"param"`` and the states' names. ``"auto"`` is nearest; but where ``master``, ``state_dtype`` or
            ``rounding`` is on, averages and sums of squares are rounded stochastically: to nearest they stop moving
            once an update is less than half a unit in their last place, and end up to twice too large at usual betas.
            Maxima are rounded to nearest.
        rounding_seed: a whole number from 0 to 2**53 - 1, for the random bits of stochastic rounding. These follow from
            it, from the parameter's name (``module.`` and ``_orig_mod.`` left out), or its number where it has none,
            from its step and the element's place in the whole tensor: so they are the same for every backend, replica
            and sharding, and after a restart.
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
    """

    # A text for each stands above (tests/test_help.py); every optimizer's docstring repeats it (_help.py).
    max_grad_norm: float | None
    clip_grad_value: float | None
    ema_decay: float | None
    master: str | torch.dtype | None
    state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str | None] | None
    rounding: str | Mapping[str, str]
    rounding_seed: int
    skip_nonfinite: bool
    zero_grad_in_step: bool
    amp_in_step: bool
    norm_group: Any
    backend: str | None


#: Those of the optimizer as a whole.
DEFAULTS: dict[str, Any] = {
    "skip_nonfinite": False,
    "zero_grad_in_step": False,
    "amp_in_step": False,
    "norm_group": None,
    "backend": None,
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

"""Clipping of gradients outside of a step: drop-ins for those of torch.nn.utils, in one or two launches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils

from ._clipping import Clipping
from ._devices import device_guard
from ._distributed import refuse_norm_of_shards, sharded_by_fsdp1
from ._dtensor import is_dtensor
from ._exchange import Exchange, RankError
from ._modes import PRE_DISPATCH, count_modes, is_transformed
from ._norm_groups import norm_groups
from ._values import number

Parameters = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Scales gradients in place by ``min(1, max_norm / (norm + 1e-6))``, where norm is that of all of them together.

    A drop-in for :func:`torch.nn.utils.clip_grad_norm_`. The norm has one definition, with the same bits on every
    backend, from sums in fp64 (:func:`fusedoptim.reference.sum_of_squares`, added in the order of the parameters), and
    is rounded once; torch's own depends on the device, and in 16 bits is rounded to them. Gradients are
    scaled in fp32 (fp64 if they have it) and rounded once, as torch does it. ``max_grad_norm=`` of an optimizer does
    the same within its step, without writing gradients. ``norm = clip_grad_norm_(model.parameters(), 1.0)``.

    Args:
        parameters: one or many; those without a gradient are left out. Of DTensors the norm is that of the whole
            tensors, whatever their meshes and placements, also beside plain ones: every rank has to call this, with the
            same parameters. A gradient that is placed in another way than its parameter is replaced by one that is not.
        max_norm: the largest norm; infinity only measures.
        norm_type: 2 is computed here; torch's own function does any other.
        error_if_nonfinite: raise if the norm is NaN or infinite, having changed nothing; this waits for the device.
        foreach: for torch's function, where that is called.
        norm_group: process groups over which the sum of squares is added: see :class:`fusedoptim.StepOptions`.
        backend: as for optimizers; None chooses.

    Returns:
        The norm: 0-dim, a plain tensor, fp32, or fp64 if a parameter with a gradient has it.

    Raises:
        ValueError: for parameters of FullyShardedDataParallel in several processes, each of which has a part of them,
            without ``norm_group``; with it, or for DTensors, for gradients that only torch's function would take.

    Sparse and complex gradients, other subclasses of tensors and gradients that share memory go to torch's function,
    and all do within torch.compile, the capture of a CUDA graph, ``torch.func``'s transforms and any
    ``TorchDispatchMode``.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    groups = norm_groups(norm_group)
    if sharded_by_fsdp1(params) and not groups:  # in every process, also in one that has no gradients
        refuse_norm_of_shards("clip_grad_norm_")
    if not groups and all(p.grad is None for p in params) and not any(map(is_dtensor, params)):
        return torch.tensor(0.0, device="cpu")
    max_norm = number(max_norm)
    if float(norm_type) != 2.0 or not max_norm >= 0 or _is_watched(params):
        if groups:
            raise ValueError("norm_group= needs norm_type=2, max_norm at least 0, and no tracing around it")
        return utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    exchange = Exchange(params, groups)
    try:
        clipping = Clipping.of(params, exchange, backend)
    except (ValueError, RuntimeError) as error:
        if not isinstance(error, RankError):
            exchange.refuse(params, [False] * exchange.adds)
        if exchange.adds or isinstance(error, RuntimeError):
            raise
        return utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    if not error_if_nonfinite:
        return clipping.run(max_norm, None)
    norm = clipping.run(math.inf, None)
    if not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    clipping.scale(max_norm)
    return norm


def grad_norm(parameters: Parameters, norm_group: Any = None, *, backend: str | None = None) -> Tensor:
    """The norm of all gradients, as :func:`clip_grad_norm_` measures it. It changes nothing, but that a DTensor's
    gradient which is placed in another way than its parameter is replaced by one that is not.

    For a model with several optimizers: ``norm = grad_norm(model.parameters())``, then ``step(grad_norm=norm)`` of each
    clips by the model's norm.

    Args:
        parameters: one or many; those without a gradient are left out. DTensors count as whole tensors.
        norm_group: process groups over which the sum of squares is added: see :class:`fusedoptim.StepOptions`.
        backend: as for optimizers; None chooses.

    Returns:
        The norm: 0-dim, fp32, or fp64 if a parameter with a gradient has it. On a GPU nothing waits for it.

    Raises:
        ValueError: as :func:`clip_grad_norm_`.
    """
    return clip_grad_norm_(parameters, math.inf, norm_group=norm_group, backend=backend)


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None, *, backend: str | None = None
) -> None:
    """Holds every element of the gradients within ``[-clip_value, clip_value]``, in place; NaN stays.

    A drop-in for :func:`torch.nn.utils.clip_grad_value_`, in one pass. ``clip_grad_value=`` of an optimizer does the
    same within its step. ``clip_grad_value_(model.parameters(), 0.5)``.

    Args:
        parameters: one or many; those without a gradient are left out.
        clip_value: the largest absolute value of an element.
        foreach: for torch's function, where that is called.
        backend: as for optimizers; None chooses.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    clip_value = number(clip_value)
    if all(p.grad is None for p in params):
        return
    clipping = None
    if clip_value >= 0 and not _is_watched(params):
        with contextlib.suppress(ValueError):  # for torch's function, then
            clipping = Clipping.of(params, None, backend)
    if clipping is None:
        utils.clip_grad_value_(params, clip_value, foreach)
    else:
        clipping.run(None, clip_value)


def _is_watched(params: list[Tensor]) -> bool:
    """Whether kernels cannot be called here. Their tables are made anew at every call, which no CUDA graph could hold;
    a mode that watches or traces would not see them."""
    if torch.compiler.is_compiling() or count_modes() or PRE_DISPATCH[0] or is_transformed():
        return True
    for device in {p.device for p in params if p.device.type == "cuda"}:
        with device_guard(device):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False

"""Clipping of gradients outside of a step: drop-ins for those of torch.nn.utils, in one or two launches."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import utils

from . import _backends, _native, _versions, reference
from ._devices import device_guard, make_launcher, stream_of
from ._distributed import refuse_norm_of_shards, sharded_by_fsdp1
from ._dtypes import DTYPES, compute_dtype
from ._modes import PRE_DISPATCH, count_modes, is_transformed
from ._overlap import overlaps_itself, sharing
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
    backend: str | None = None,
) -> Tensor:
    """Scales gradients in place by ``min(1, max_norm / (norm + 1e-6))``, where norm is that of all of them together.

    A drop-in for :func:`torch.nn.utils.clip_grad_norm_`. The norm has one definition, with the same bits on every
    backend, from sums in fp64 (:func:`fusedoptim.reference.sum_of_squares`, added in the order of the parameters), and
    is rounded once; torch's own depends on the device, and in 16 bits is rounded to them. Gradients are
    scaled in fp32 (fp64 if they have it) and rounded once, as torch does it. ``max_grad_norm=`` of an optimizer does
    the same within its step, without writing gradients.

    Args:
        parameters: one or many; those without a gradient are left out.
        max_norm: the largest norm; infinity only measures.
        norm_type: 2 is computed here; torch's own function does any other.
        error_if_nonfinite: raise if the norm is NaN or infinite, having changed nothing; this waits for the device.
        foreach: for torch's function, where that is called.
        backend: as for optimizers; None chooses.

    Returns:
        The norm: 0-dim, fp32, or fp64 if a gradient has it.

    Raises:
        ValueError: for parameters of FullyShardedDataParallel in several processes, each of which has a part of them.

    Sparse and complex gradients, subclasses of tensors, gradients that share memory or lie on several devices go to
    torch's function, and all do within torch.compile, the capture of a CUDA graph, ``torch.func``'s transforms and
    any ``TorchDispatchMode``.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if sharded_by_fsdp1(params):  # in every process, also in one that has no gradients
        refuse_norm_of_shards("clip_grad_norm_")
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0, device="cpu")
    max_norm = number(max_norm)
    if float(norm_type) != 2.0 or not max_norm >= 0 or not _ours(grads):
        return utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    if error_if_nonfinite:
        norm = _clip(grads, backend, math.inf, None)
        if not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it "
                "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
    return _clip(grads, backend, max_norm, None)


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None, *, backend: str | None = None
) -> None:
    """Holds every element of the gradients within ``[-clip_value, clip_value]``, in place; NaN stays.

    A drop-in for :func:`torch.nn.utils.clip_grad_value_`, in one pass. ``clip_grad_value=`` of an optimizer does the
    same within its step.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    clip_value = number(clip_value)
    if not grads:
        return
    if not clip_value >= 0 or not _ours(grads):
        utils.clip_grad_value_(params, clip_value, foreach)
        return
    _clip(grads, backend, None, clip_value)


def _ours(grads: list[Tensor]) -> bool:
    """Whether the kernels can take them: plain tensors on one device, no two elements at one place. Their tables are
    made anew at every call, which no CUDA graph could hold; a mode that watches or traces would not see them."""
    device = grads[0].device
    if torch.compiler.is_compiling() or count_modes() or PRE_DISPATCH[0] or is_transformed():
        return False
    with device_guard(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
    return (
        all(type(g) is Tensor and g.dtype in DTYPES and g.layout == torch.strided and g.device == device for g in grads)
        and not any(g.is_neg() or overlaps_itself(g) for g in grads)
        and sharing(grads) is None
    )


def _clip(grads: list[Tensor], backend: str | None, max_norm: float | None, limit: float | None) -> Tensor:
    """max_norm, limit: None for none. Returns the norm, if max_norm is given."""
    device = grads[0].device
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    chosen = _backends.choose(backend, device)
    if chosen == "reference":
        return _clip_eagerly(grads, max_norm, limit)
    assert _native._C is not None
    stats = torch.empty(2, dtype=torch.float64, device=device)
    with device_guard(device):
        sums = torch.empty(len(grads), dtype=torch.float64, device=device)
        clipper = _native._C.Clipper(make_launcher(chosen, device), stats.data_ptr(), sums)
        torch.ops.fusedoptim._hand_over(grads, clipper.number)
        scales = max_norm is not None and max_norm != math.inf
        clipper.run(
            stream_of(device)(),
            max_norm is not None,
            max_norm if scales and max_norm is not None else -1.0,
            -1.0 if limit is None else limit,
        )
    if scales or limit is not None:
        _versions.by_torch(grads)
    return stats[0].to(dtype)


def _clip_eagerly(grads: list[Tensor], max_norm: float | None, limit: float | None) -> Tensor:
    norm = torch.tensor(math.nan, device="cpu")
    if max_norm is not None:
        norm = reference.global_norm([g.to(compute_dtype(g)) for g in grads])
    for g in grads:
        group = {"max_grad_norm": max_norm, "clip_grad_value": limit}
        g.copy_(reference.clipped(g.to(compute_dtype(g)), norm, group))
    return norm.to(grads[0].device)

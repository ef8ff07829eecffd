"""What can be wrong with parameters, gradients and states, said so that one can mend it: what, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._blocks import format_in_blocks, names_in_blocks, slot_of
from ._dtensor import has_no_partial, is_dtensor, local, same_layout, same_placements
from ._dtypes import DTYPES, NAMES, compute_dtype
from ._fakes import is_fake
from ._overlap import overlaps_itself
from ._rule import EMA, Group, Rule
from ._storage import DTYPES_OF_MASTERS, state_names


def describe(group: Group, index: int, i: int) -> str:
    """A parameter, so that its owner recognises it."""
    p = group["params"][i]
    names = group.get("param_names")
    name = f" {names[i]!r}" if names else ""
    shape = "not known yet" if is_lazy(p) else tuple(p.shape)
    return f"parameter {i}{name} of group {index} (shape {shape}, {p.dtype}, {p.device})"


def torchs(optimizer: str) -> str:
    """What to use instead."""
    return f"torch.optim.{optimizer}" if hasattr(torch.optim, optimizer) else "an optimizer of torch.optim"


def check_param(p: Tensor, who: str, optimizer: str) -> None:
    """A parameter that the kernels can update."""
    if p.is_complex():
        raise ValueError(
            f"{who} is complex: pass torch.view_as_real(parameter) as the parameter, or use {torchs(optimizer)}"
        )
    if p.dtype not in DTYPES:
        raise ValueError(f"{who} has an unsupported dtype: it must be {NAMES}")
    if p.layout != torch.strided:
        raise ValueError(f"{who} has layout {p.layout}: only dense (torch.strided) parameters can be updated")
    if is_dtensor(p) and not has_no_partial(p):
        raise ValueError(f"{who} is a DTensor with Partial placements, hence a sum to come: use redistribute()")
    p = local(p)
    if is_traceable_wrapper_subclass(p):
        kind = type(p).__name__
        raise ValueError(f"{who} is a {kind}, which keeps its numbers in other tensors: use {torchs(optimizer)}")
    if p.is_neg():
        raise ValueError(f"{who} is negated lazily, which its memory does not show: use resolve_neg()")
    if p.dim() > 64:
        raise ValueError(f"{who} has {p.dim()} dimensions, at most 64 are supported: reshape it")
    if p.device.type == "meta":
        raise ValueError(f"{who} is on the meta device and has no memory: materialise it first, with to_empty()")
    if not is_fake(p) and not has_memory(p):
        raise ValueError(f"{who} is a {type(p).__name__} without memory of its own: use {torchs(optimizer)}")
    if overlaps_itself(p):
        raise ValueError(f"{who} has elements that share memory, as an expanded tensor has: use parameter.contiguous()")


def has_memory(t: Tensor) -> bool:
    try:
        return t.numel() == 0 or t.data_ptr() != 0
    except RuntimeError:  # of a subclass that has none
        return False


def check_grad(p: Tensor, who: str, rule: Rule) -> None:
    """A gradient that fits its parameter."""
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        raise ValueError(
            f"{who} has a sparse gradient ({g.layout}): use torch.optim.{rule.sparse_alternative} for it, or "
            "Embedding(sparse=False)"
        )
    if is_dtensor(p) and (not is_dtensor(g) or g.device_mesh != p.device_mesh):  # type: ignore[attr-defined]
        raise ValueError(
            f"{who} is a DTensor, and its gradient is none on its device mesh, but a {type(g).__name__}: give it one "
            "with DTensor.from_local or distribute_tensor"
        )
    shard = local(g) if is_dtensor(p) else g
    if hasattr(shard, "wait") and hasattr(shard, "elem"):  # an AsyncCollectiveTensor: see usual_grad
        shard = shard.elem
    own = local(p)
    if is_dtensor(p) and (shard.layout != g.layout or shard.dtype != g.dtype or shard.device != own.device):
        raise ValueError(
            f"{who} has a gradient whose shard on this rank is {shard.layout}, {shard.dtype}, on {shard.device}, which "
            "is not what the DTensor says: make it with DTensor.from_local or distribute_tensor"
        )
    if is_dtensor(p) and same_layout(p, g) and shard.shape != own.shape:
        raise ValueError(
            f"{who} has a gradient whose shard on this rank has shape {tuple(shard.shape)}, while the parameter's has "
            f"{tuple(own.shape)}: make it with DTensor.from_local or distribute_tensor"
        )
    if is_traceable_wrapper_subclass(shard) or shard._is_zerotensor() or is_fake(g):
        raise ValueError(f"{who} has a gradient without memory of its own ({type(g).__name__}): give it a plain tensor")
    if g.is_complex() or g.dtype not in DTYPES:
        raise ValueError(f"{who} has a gradient of unsupported dtype {g.dtype}: it must be {NAMES}")
    if g.device != p.device:
        raise ValueError(f"{who} has a gradient on {g.device}: move one of them with .to()")
    if g.shape != p.shape:
        raise ValueError(
            f"{who} has a gradient of shape {tuple(g.shape)}: after resizing a parameter, set its gradient to None"
        )


def check_written_grad(g: Tensor, who: str) -> None:
    """A gradient that the step leaves zeros in."""
    if overlaps_itself(g):
        raise ValueError(
            f"{who} has a gradient with elements that share memory, as an expanded tensor has, and zero_grad_in_step "
            "would write to it: use gradient.contiguous(), or leave out that option"
        )


def check_states(p: Tensor, state: Mapping[str, Any], rule: Rule, who: str, devices: bool = True) -> None:
    """States that fit their parameter, whoever put them there."""
    remedy = "load a matching checkpoint, or delete optimizer.state[parameter] to start afresh"
    for name in state_names(rule):
        value = state.get(name)
        if value is None:
            continue
        scalar = name == "step" or name in rule.number_names
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name!r} of {who} must be a tensor, but is {value!r}: {remedy}")
        of_blocks = format_in_blocks(name, p, rule)
        shape = p.shape if of_blocks is None else of_blocks.shape
        if (value.numel() != 1) if scalar else (value.shape != shape):
            raise ValueError(f"state {name!r} of {who} has shape {tuple(value.shape)}: {remedy}")
        allowed = DTYPES if not scalar else DTYPES[:2] if name == "step" else (torch.float32,)
        if name == EMA and devices:  # while loading it is converted
            allowed = (compute_dtype(p),)
        if name in DTYPES_OF_MASTERS:
            allowed = (DTYPES_OF_MASTERS[name],)
        if of_blocks is not None:
            allowed = (of_blocks.dtype,)
        if value.dtype not in allowed:
            raise ValueError(f"state {name!r} of {who} has unsupported dtype {value.dtype}: {remedy}")
        wanted = torch.device("cpu") if name == "step" and value.device.type == "cpu" else p.device
        if devices and value.device != wanted:
            raise ValueError(f"state {name!r} of {who} is on {value.device}: move it with .to({str(p.device)!r})")
        if is_fake(value) and not is_fake(p):
            raise ValueError(f"state {name!r} of {who} is a fake tensor, which has no memory: {remedy}")
        if not scalar and (is_dtensor(value) or is_dtensor(p)) and devices:
            placed = is_dtensor(value) and is_dtensor(p)
            if not placed or not (same_layout(value, p) if of_blocks is None else same_placements(value, p)):
                raise ValueError(f"state {name!r} of {who} is not placed as its parameter is: {remedy}")
            value = local(value)
        if devices and of_blocks is not None and shape != p.shape and not local(value).is_contiguous():
            raise ValueError(f"state {name!r} of {who} must be contiguous, as kernels count blocks: use .contiguous()")
        if value.layout != torch.strided or overlaps_itself(value) or value.is_neg():
            raise ValueError(f"state {name!r} of {who} has no dense memory of its own: use .contiguous()")
    for pair in (names_in_blocks(slot.name) for slot in rule.states):
        there = [name for name in pair if state.get(name) is not None]
        if len(there) == 1:
            lacking = next(name for name in pair if name not in there)
            raise ValueError(f"the state of {who} has {there[0]!r}, but lacks {lacking!r}: {remedy}")


def check_complete(state: Mapping[str, Any], rule: Rule, who: str) -> None:
    """Either all of the states that a rule always needs are there, or none, which are then made."""
    required = rule.required_states()
    there = required & {slot_of(name) for name, value in state.items() if value is not None}
    if there and there != required:
        raise ValueError(
            f"the state of {who} has {sorted(there)}, but lacks {sorted(required - there)}: put that back, load a "
            "checkpoint, or delete optimizer.state[parameter] to start afresh"
        )


def is_materialised(p: Tensor) -> bool:
    return not is_lazy(p) and p.device.type != "meta"


def check_early(p: Tensor, group: Group, index: int, i: int, optimizer: str) -> None:
    """What can be said of a new parameter before it has a gradient: that it never can be stepped. Frozen ones are left
    alone, and so are those that are yet to be materialised.

    Raises:
        ValueError: if it cannot.
    """
    if p.requires_grad and is_materialised(p):
        check_param(p, describe(group, index, i), optimizer)


def can_have_states(p: Tensor) -> bool:
    """Whether states can be made for it before it has a gradient."""
    if not is_materialised(p) or (not p.requires_grad and type(p) not in (Tensor, torch.nn.Parameter)):
        return False
    try:
        check_param(p, "", "")
    except ValueError:
        return False
    return True

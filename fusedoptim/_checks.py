"""What can be wrong with an optimizer's input, said so that one can mend it: what, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._memory import overlaps_itself
from ._options import DEFAULTS
from ._rule import EMA, LR, Group, Hyper, Rule
from ._values import item, number

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMES = "float32, float64, bfloat16 or float16"


def check_common(group: Group, rule: Rule, optimizer: str) -> None:
    """What a constructor, and whoever adds a group, has to pass: with torch.optim's own messages, where it has some."""
    for hyper in (*rule.row, *rule.initial):
        _check_made(hyper, group[hyper.key])
    rule.check(group)
    for name in DEFAULTS:
        if name in group:
            raise ValueError(f"a group cannot have its own {name}: pass it to {optimizer}(), for all groups")
    if group.get("foreach"):
        raise ValueError(f"foreach=True: the step is fused already; leave it out, or use {torchs(optimizer)}")
    if group.get("differentiable"):
        raise ValueError(f"differentiable=True: a fused step has no backward pass; use {torchs(optimizer)} for it")


def _check_made(hyper: Hyper, value: Any) -> None:
    if hyper is LR and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if value.dtype not in DTYPES:
            raise ValueError(f"Tensor lr must be {_NAMES}, but is {value.dtype}")
    if hyper.optional and value is None:
        return
    label = hyper.key
    try:
        value = item(value, hyper)
        label = hyper.label or label
        x = _number(hyper, value)
    except ValueError as error:
        raise ValueError(f"Invalid {label}: {_shown(value)} (it {error})") from None
    if hyper.constructor is not None and x not in hyper.constructor:
        raise ValueError(f"Invalid {label}: {_shown(value)}")
    if x not in hyper.accepts:
        raise ValueError(f"Invalid {label}: {_shown(value)} (it must be {_wanted(hyper)})")


def compute_dtype(p: Tensor) -> torch.dtype:
    """In which a parameter is updated, and its moving average kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def check_lists(groups: Any) -> None:
    """torch.optim keeps groups and their parameters in lists, and so must who replaces them."""
    if not isinstance(groups, list):
        raise ValueError(f"param_groups must be a list, but is a {type(groups).__name__}: use list(...)")
    for index, group in enumerate(groups):
        if not isinstance(group["params"], list):
            kind = type(group["params"]).__name__
            raise ValueError(f"the 'params' of parameter group {index} must be a list, but are a {kind}: use list(...)")


def check_step_values(group: Group, rule: Rule, index: int) -> None:
    """Whatever a schedule or a user wrote into a group must still be numbers that a step can mean."""
    for hyper in rule.row:
        if hyper.key not in group:
            raise ValueError(f"parameter group {index} has no {hyper.key!r}; set it, or build the optimizer again")
        value = group[hyper.key]
        if hyper.optional and value is None:
            continue
        what, x = f"parameter group {index}: {hyper.key!r}", 0.0
        try:
            value = item(value, hyper)
            if hyper.index >= 0:
                what += f"[{hyper.index}]"
            if hyper is LR and isinstance(value, Tensor) and value.device.type != "cpu":
                _check_lr_on_device(value, group)
                continue
            x = _number(hyper, value)
            if x not in hyper.accepts:
                raise ValueError(f"must be {_wanted(hyper)}")
        except ValueError as error:
            shown = "NaN" if math.isnan(x) else _shown(value)
            raise ValueError(f"{what} is {shown}, but {error}; nothing was updated") from None


def _check_lr_on_device(lr: Tensor, group: Group) -> None:
    """Its value cannot be asked for without waiting for the device."""
    _check_tensor(LR, lr)
    elsewhere = {str(p.device) for p in group["params"] if p.device != lr.device}
    if elsewhere:
        raise ValueError(
            f"the group has parameters on {', '.join(sorted(elsewhere))}; use group['lr'] = group['lr'].cpu(), or a "
            "group per device"
        )


def _check_tensor(hyper: Hyper, value: Tensor) -> None:
    if value.numel() != 1 or value.dtype not in DTYPES:
        raise ValueError(f"must have one element of {_NAMES}")
    if value.is_meta:
        raise ValueError("must have a value, and on the meta device there is none")
    if hyper is not LR and value.device.type != "cpu":
        raise ValueError(f"must not be on a device, as only lr may be: use float(group[{hyper.key!r}])")


def _number(hyper: Hyper, value: Any) -> float:
    """Raises ValueError with what it must be instead."""
    if isinstance(value, Tensor):
        _check_tensor(hyper, value)
    try:
        return number(value)
    except OverflowError:
        raise ValueError(f"must be {_wanted(hyper)}") from None
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError("must be a number") from None


def _wanted(hyper: Hyper) -> str:
    return hyper.accepts.text + ("; None is off" if hyper.optional else "")


def _shown(value: Any) -> str:
    """A value in a message, as torch.optim shows it."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu"):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
    if isinstance(value, str):
        return repr(value)
    try:
        text = f"{value}"
    except ValueError:  # of an integer with more digits than Python prints
        text = hex(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


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
        raise ValueError(f"{who} has an unsupported dtype: it must be {_NAMES}")
    if p.layout != torch.strided:
        raise ValueError(f"{who} has layout {p.layout}: only dense (torch.strided) parameters can be updated")
    if is_traceable_wrapper_subclass(p):
        kind = type(p).__name__
        if kind == "DTensor":  # stepping its local tensors would make states that checkpoints take for replicated ones
            raise ValueError(
                f"{who} is a DTensor, as FSDP2 (fully_shard) and tensor parallelism make them: they are not supported "
                f"yet. DistributedDataParallel, FullyShardedDataParallel and ZeroRedundancyOptimizer are; for DTensors "
                f"use {torchs(optimizer)}"
            )
        raise ValueError(f"{who} is a {kind}, which keeps its numbers in other tensors: use {torchs(optimizer)}")
    if p.is_neg():
        raise ValueError(f"{who} is negated lazily, which its memory does not show: use resolve_neg()")
    if p.dim() > 64:
        raise ValueError(f"{who} has {p.dim()} dimensions, at most 64 are supported: reshape it")
    if p.device.type == "meta":
        raise ValueError(f"{who} is on the meta device and has no memory: materialise it first, with to_empty()")
    if not has_memory(p):
        raise ValueError(f"{who} is a {type(p).__name__} without memory of its own: use {torchs(optimizer)}")
    if overlaps_itself(p):
        raise ValueError(f"{who} has elements that share memory, as an expanded tensor has: use parameter.contiguous()")


def has_memory(t: Tensor) -> bool:
    try:
        return t.numel() == 0 or t.data_ptr() != 0
    except RuntimeError:  # of a subclass that has none
        return False


def check_grad(p: Tensor, who: str, optimizer: str) -> None:
    """A gradient that fits its parameter."""
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        instead = {"Adam": "SparseAdam", "AdamW": "SparseAdam", "RMSprop": "Adagrad", "NormAdaptive": "SGD"}.get(
            optimizer, optimizer
        )
        raise ValueError(
            f"{who} has a sparse gradient ({g.layout}): use torch.optim.{instead} for it, or Embedding(sparse=False)"
        )
    if is_traceable_wrapper_subclass(g) or g._is_zerotensor():
        raise ValueError(f"{who} has a gradient without memory of its own ({type(g).__name__}): give it a plain tensor")
    if g.is_complex() or g.dtype not in DTYPES:
        raise ValueError(f"{who} has a gradient of unsupported dtype {g.dtype}: it must be {_NAMES}")
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
    for name in rule.state_names():
        value = state.get(name)
        if value is None:
            continue
        scalar = name in ("step", rule.scalar_state)
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name!r} of {who} must be a tensor, but is {value!r}: {remedy}")
        if (value.numel() != 1) if scalar else (value.shape != p.shape):
            raise ValueError(f"state {name!r} of {who} has shape {tuple(value.shape)}: {remedy}")
        allowed = DTYPES if not scalar else (torch.float32,) if name == rule.scalar_state else DTYPES[:2]
        if name == EMA and devices:  # while loading it is converted
            allowed = (compute_dtype(p),)
        if value.dtype not in allowed:
            raise ValueError(f"state {name!r} of {who} has unsupported dtype {value.dtype}: {remedy}")
        wanted = torch.device("cpu") if name == "step" and value.device.type == "cpu" else p.device
        if devices and value.device != wanted:
            raise ValueError(f"state {name!r} of {who} is on {value.device}: move it with .to({str(p.device)!r})")
        if value.layout != torch.strided or overlaps_itself(value) or value.is_neg():
            raise ValueError(f"state {name!r} of {who} has no dense memory of its own: use .contiguous()")


def check_complete(state: Mapping[str, Any], rule: Rule, who: str) -> None:
    """Either all of the states that a rule always needs are there, or none, which are then made."""
    required = rule.required_states()
    there = {name for name in required if state.get(name) is not None}
    if there and there != required:
        raise ValueError(
            f"the state of {who} has {sorted(there)}, but lacks {sorted(required - there)}: put that back, load a "
            "checkpoint, or delete optimizer.state[parameter] to start afresh"
        )

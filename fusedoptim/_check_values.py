"""What can be wrong with a group's values, said so that one can mend it: what, why, and what to do."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._check_tensors import torchs
from ._dtypes import DTYPES, NAMES
from ._options import DEFAULTS
from ._rule import LR, REQUIRED, Group, Hyper, Rule
from ._storage import check_storage
from ._values import item, number


def check_common(group: Group, rule: Rule, optimizer: str) -> None:
    """What a constructor, and whoever adds a group, has to pass: with torch.optim's own messages, where it has some."""
    for hyper in (*rule.row, *rule.initial):
        _check_made(hyper, group[hyper.key])
    check_storage(group, rule)
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
            raise ValueError(f"Tensor lr must be {NAMES}, but is {value.dtype}")
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
            if hyper.off is not REQUIRED:
                continue
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
    try:
        check_storage(group, rule)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}; nothing was updated") from None


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
        raise ValueError(f"must have one element of {NAMES}")
    if value.is_meta:
        raise ValueError("must have a value, and on the meta device there is none")
    if hyper is not LR and value.device.type != "cpu":
        raise ValueError(f"must not be on a device, as only lr may be: use float(group[{hyper.key!r}])")


def _number(hyper: Hyper, value: Any) -> float:
    """Raises ValueError with what it must be instead."""
    if isinstance(value, Tensor):
        _check_tensor(hyper, value)
    if hyper.accepts.whole and isinstance(value, bool):
        raise ValueError(f"must be {_wanted(hyper)}")
    try:
        return number(value)
    except OverflowError:
        raise ValueError(f"must be {_wanted(hyper)}") from None
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError(f"must be a number{hyper.instead}") from None


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

"""Carries states through torch's load_state_dict, which would cast them to their parameter's dtype and share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._rule import EMA, Rule


class Kept:
    """A tensor that torch's load_state_dict does not recognise, hence leaves as it is."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def keep_dtypes(state_dict: dict[str, Any], groups: list[dict[str, Any]], rule: Rule, optimizer: str) -> dict[str, Any]:
    """The state_dict with its states wrapped. Raises ValueError if they do not belong to these groups."""
    members = [(group, index, i) for index, group in enumerate(groups) for i in range(len(group["params"]))]
    ids = [k for group in state_dict["param_groups"] for k in group["params"]]
    owners = dict(zip(ids, members, strict=False))  # torch itself checks that the groups match
    kept = {}
    for k, values in state_dict["state"].items():
        if k not in owners:
            kept[k] = values
            continue
        if not isinstance(values, dict):
            raise ValueError(f"this checkpoint is corrupt: the state of parameter {k!r} is {values!r}, not a dict")
        if isinstance(values.get("step"), (int, float)):  # as torch saved it before 1.12
            values = {**values, "step": torch.tensor(float(values["step"]), dtype=torch.float32, device="cpu")}
        group, index, i = owners[k]
        who = _checks.describe(group, index, i)
        _checks.check_names(values, rule, who, optimizer)
        _checks.check_states(group["params"][i], values, rule, who, devices=False)
        kept[k] = {name: Kept(v) if isinstance(v, Tensor) else v for name, v in values.items()}
    return {**state_dict, "state": kept}


def restored(name: str, value: Any, p: Tensor) -> Any:
    """A wrapped state as it was saved: in its dtype, with memory of its own, in its parameter's memory order."""
    if not isinstance(value, Kept):
        return value
    saved = value.value.detach()
    if name == "step":
        return saved.to("cpu", copy=True)
    if name == EMA:  # which torch.optim keeps in the parameter's dtype
        saved = saved.to(_checks.compute_dtype(p))
    if saved.shape != p.shape or not saved.is_floating_point():
        return saved.to(p.device, copy=True)
    return torch.empty_like(p, dtype=saved.dtype, requires_grad=False).copy_(saved)

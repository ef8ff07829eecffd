"""State_dicts that others read: one that they take, and marks by which torch.optim refuses one that it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._blocks import CODES
from ._check_tensors import can_have_states
from ._group_keys import spelled
from ._recoding import numbers
from ._rule import STORAGE, Rule
from ._states import HasStates


@torch.no_grad()
def portable(optimizer: HasStates, state_dict: dict[str, Any]) -> dict[str, Any]:
    """See :meth:`FusedOptimizer.portable_state_dict`.

    Args:
        state_dict: the optimizer's.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = zip((k for group in state_dict["param_groups"] for k in group["params"]), params, strict=True)
    states = dict(state_dict["state"])
    for k, p in numbered:
        if k in states and can_have_states(p):
            states[k] = numbers(optimizer.rule, p, without_marks(states[k], optimizer.rule))
    left_out = {*STORAGE, "rounding_seed"}
    groups = [
        {key: value for key, value in group.items() if key not in left_out} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": states, "param_groups": groups}


#: Stands for a state that torch.optim would take for one to come, and go on without what is in codes: it is none, so
#: that its step raises.
MARK = 0


def complete(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """A hook of a new state_dict: spells dtypes, and adds a mark for each state in codes that torch.optim makes anew
    where it is not."""
    for group in state_dict["param_groups"]:
        group.update(spelled(group))
    names = [slot.name for slot in optimizer.rule.states if slot.starts_absent]
    states = state_dict["state"]
    for k, values in states.items():
        if isinstance(values, dict):
            marks = {name: MARK for name in names if name + CODES in values and values.get(name) is None}
            if marks:
                states[k] = {**values, **marks}


def without_marks(values: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    marks = {s.name for s in rule.states if s.name + CODES in values and not isinstance(values.get(s.name), Tensor)}
    return {name: value for name, value in values.items() if name not in marks}

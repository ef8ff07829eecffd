"""What the groups of a rule have that does not declare it: all that its class has defaults for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._rule import GROUP_OPTIONS, LR, Group, Hyper, Rule

#: Of torch.optim's groups, and without a meaning for a step.
_TORCHS = ("foreach", "fused", "capturable", "differentiable")
_NUMBERS = (bool, int, float, Tensor)


def completed(rule: Rule, defaults: Group) -> Rule:
    """The rule with its hyper-parameters: numbers, and several under one key. Values of other kinds are constants to
    its function."""
    if LR.key not in defaults:
        raise ValueError(
            f"the defaults of rule {rule.name!r} have no 'lr': give them one, which schedulers set and the function "
            "reads as h['lr']"
        )
    if rule.hyper:
        return rule
    own = [key for key in defaults if key not in (LR.key, *GROUP_OPTIONS, *_TORCHS)]
    hyper = tuple(h for key in own for h in _hypers(key, defaults[key]))
    constants = tuple(key for key in own if not any(h.key == key for h in hyper))
    return dataclasses.replace(rule, hyper=hyper, constants=constants)


def _hypers(key: str, value: Any) -> Iterable[Hyper]:
    if _is_number(value):
        return (Hyper(key),)
    if isinstance(value, (tuple, list)) and value and all(map(_is_number, value)):
        return (Hyper(key, i, count=len(value)) for i in range(len(value)))
    return ()


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) or (hasattr(value, "__float__") and not isinstance(value, (str, bytes)))

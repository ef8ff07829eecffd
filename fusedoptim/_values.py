"""The numbers that a group's values stand for: one conversion, before any backend computes with them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._rule import LR, Group, Hyper, Rule


def number(value: Any) -> float:
    """The double that a plan reads for a value (csrc/python/plan_groups.cpp): a number of any kind, or a tensor of one.

    Raises TypeError, ValueError or OverflowError for what is none, or does not fit a double.
    """
    if isinstance(value, Tensor):
        return float(value.detach().item())  # not within autograd, which warns of it
    return math.ldexp(value, 0)  # takes what C takes for a double, as float() does not: that reads texts, too


def item(value: Any, hyper: Hyper) -> Any:
    """The part of a group's value that a hyper-parameter is. ValueError if it should be one of several and is not."""
    if hyper.index < 0:
        return value
    try:
        if len(value) == hyper.count:
            return value[hyper.index]
    except (TypeError, LookupError):
        pass
    raise ValueError(f"must be {'two' if hyper.count == 2 else hyper.count} numbers")


def numbers(group: Group, rule: Rule) -> dict[str, Any]:
    """A group as every backend computes with it. Its values have been checked. A learning rate that is a tensor stays
    one, because it has torch's arithmetic of tensors, and has no dimensions; options that are not there have the values
    that mean off."""
    found = dict(group)
    for hyper in rule.row:
        value = found[hyper.key] = group.get(hyper.key, hyper.off)
        if value is None:
            continue
        if hyper is LR and isinstance(value, Tensor):
            found[hyper.key] = value.reshape(())
            continue
        found[hyper.key] = number(value) if hyper.index < 0 else tuple(map(number, value))
    return found

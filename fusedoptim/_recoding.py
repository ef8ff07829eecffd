"""States that are stored in another way than their group asks for, and the numbers that stored states stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _masters
from ._blocks import can_be_in_blocks, format_in_blocks, names_in_blocks, out_of_blocks, to_blocks
from ._dtensor import is_dtensor, same_placements
from ._rule import SQUARES, Group, Rule, State
from ._storage import MASTERS, PORTABLE_MASTER, asked_dtype, state_dtype

#: By name; None for one that is no longer there.
Recoded = dict[str, Tensor | None]


def recoded(group: Group, rule: Rule, p: Tensor, values: Mapping[str, Any]) -> Recoded:
    """What has to be changed of a parameter's states for these to be stored as its group asks. What does not fit the
    parameter is left out."""
    found = _masters.converted(group, p, values)
    for slot in rule.states:
        if slot.needed_in(group):
            found |= _recoded_slot(group, slot, rule, p, values)
    return found


def _recoded_slot(group: Group, slot: State, rule: Rule, p: Tensor, values: Mapping[str, Any]) -> Recoded:
    plain, names = values.get(slot.name), names_in_blocks(slot.name)
    parts = {name: values.get(name) for name in names}
    squares, asked = slot.kind == SQUARES, asked_dtype(group, slot.name)
    if isinstance(plain, Tensor):  # somebody put it there; codes that are there as well are older
        if plain.shape != p.shape or not plain.is_floating_point() or not _lies_as(plain, p):
            return {}
        if asked == "int8" and can_be_in_blocks(p):
            return {slot.name: None, **dict(zip(names, to_blocks(p, plain, squares), strict=True))}
        dtype = state_dtype(group, slot.name, p)
        changed = asked is not None and plain.dtype != dtype
        gone: Recoded = {name: None for name, part in parts.items() if part is not None}
        return {slot.name: plain.detach().to(dtype), **gone} if changed else gone
    if not _are_blocks(parts, p, rule) or (asked == "int8" and can_be_in_blocks(p)):
        return {}
    number = out_of_blocks(p, parts[names[0]], parts[names[1]], squares, state_dtype(group, slot.name, p))  # type: ignore[arg-type]
    return {slot.name: number, **dict.fromkeys(names)}


def _are_blocks(parts: Mapping[str, Any], p: Tensor, rule: Rule) -> bool:
    for name, part in parts.items():
        of = format_in_blocks(name, p, rule)
        if of is None or not isinstance(part, Tensor) or part.shape != of.shape or part.dtype != of.dtype:
            return False
        if not _lies_as(part, p):
            return False
    return True


def _lies_as(value: Tensor, p: Tensor) -> bool:
    """Whether a state has its elements on the ranks where the parameter's are; who checks states says so if not."""
    if not is_dtensor(value) and not is_dtensor(p):
        return True
    return is_dtensor(value) and is_dtensor(p) and same_placements(value, p)


def numbers(rule: Rule, p: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """States under the names that torch.optim has for them, in fp32 or more, and the parameter's number as ``master``
    if there is more of it than the parameter."""
    found = dict(values)
    for slot in rule.states:
        names = names_in_blocks(slot.name)
        parts = {name: values.get(name) for name in names}
        plain = values.get(slot.name)
        if isinstance(plain, Tensor):
            if plain.is_floating_point() and plain.dtype.itemsize < 4:
                found[slot.name] = plain.detach().to(torch.float32)
        elif _are_blocks(parts, p, rule):
            codes, scales = parts.values()
            found[slot.name] = out_of_blocks(p, codes, scales, slot.kind == SQUARES, torch.float32)  # type: ignore[arg-type]
        else:
            continue
        for name in names:
            found.pop(name, None)
    how = _masters.stored_as(p, values)
    if how is not None:
        for name in MASTERS.values():
            found.pop(name, None)
        # Which is another if the parameter was written to since.
        found[PORTABLE_MASTER] = _masters.number_of(p, values, how)
    return found

"""What the keys of groups become: of new ones, of copies, and of saved ones of any version."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ._norm_groups import norm_groups
from ._rule import SEED, STORAGE, Group, Rule
from ._storage import is_off
from ._values import number

#: The keys whose values may be dtypes, and the names of these.
_OF_DTYPES = ("master", "state_dtype")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def switch_off(group: dict[str, Any], rule: Rule) -> None:
    """Values that are on or off and were given as None are off."""
    for key in rule.flags:
        if key in group and group[key] is None:
            group[key] = False


def settled(group: Group) -> dict[str, Any]:
    """Those of a group's values that are better said otherwise: dtypes that are spelled, dicts that ask for nothing,
    and a seed that is a number of another library, which torch.load refuses with ``weights_only``."""
    found = {key: _replaced(group[key], _DTYPES) for key in _OF_DTYPES if key in group}
    for key, off in STORAGE.items():
        if key in group and is_off(key, group[key]):
            found[key] = off
    seed = group.get("rounding_seed")
    if seed is not None and not isinstance(seed, (bool, Tensor)):
        with suppress(TypeError, ValueError, ArithmeticError):
            if (x := number(seed)) in SEED:
                found["rounding_seed"] = int(x)
    return found


def leave_out_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """A wrapper, such as ZeroRedundancyOptimizer, may repeat in every group what the optimizer was made with."""
    for key, value in options.items():
        if key not in group:
            continue
        given = norm_groups(group[key]) or None if key == "norm_group" else group[key]
        if given == value:
            del group[key]


def leave_out_what_is_off(group: dict[str, Any], rule: Rule) -> None:
    """Without the options of this package that are off a group has torch's keys, and so has a checkpoint of it: one of
    torch's loads key by key, as torch.distributed.checkpoint does it, and the other way round."""
    for key, value in rule.extensions.items():
        if key in group and (group[key] is value or (type(group[key]) is type(value) and group[key] == value)):
            del group[key]


def fill(group: dict[str, Any], defaults: Mapping[str, Any], rule: Rule) -> None:
    """Gives a group what it lacks, as one has it that was saved by another version or came from torch.optim."""
    for key in defaults.keys() - rule.extensions.keys():
        group.setdefault(key, defaults[key])
    leave_out_what_is_off(group, rule)
    switch_off(group, rule)


def completed(saved: Group, group: Group, defaults: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """A saved group, with what it does not carry: a key that torch's older versions did not have becomes what torch
    makes of it; all else, among it an option that is off, stays as in the optimizer's group. How things are stored is
    the program's business: what the optimizer's group says of it stays as well."""
    result = {**saved, **settled(saved)}
    leave_out_what_is_off(result, rule)
    for key in defaults.keys() - result.keys():
        if key in rule.absent:
            result[key] = rule.absent[key]
        elif key in group or key not in rule.extensions:
            result[key] = group.get(key, defaults[key])
    asked = {
        key for key in STORAGE if key in group and not (isinstance(group[key], Mapping) and is_off(key, group[key]))
    }
    own = {key: value for key, value in {**group, **settled(group)}.items() if key in asked}
    result.update(own)
    rounding = result.get("rounding")
    own_rounding = own.get("rounding")
    if isinstance(own_rounding, Mapping) and own_rounding.get("param") == "stochastic" and "master" not in own:
        result.pop("master", None)  # they do not go together
    if "master" in own and "rounding" not in own and isinstance(rounding, Mapping):
        # With a master parameters are not rounded on their own, whatever they were before.
        result["rounding"] = {name: value for name, value in rounding.items() if name != "param"}
    return result


def spelled(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a state_dict has of a group's dtypes: their names, because torch.distributed.checkpoint gathers and sends
    numbers and strings, and refuses dtypes."""
    found = settled(group)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return found | {key: _replaced(found[key], names) for key in _OF_DTYPES if key in found}


def _replaced(value: Any, by: Mapping[Any, Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _replaced(item, by) for name, item in value.items()}
    if isinstance(value, str):
        return by.get(value.removeprefix("torch."), value)
    return by.get(value, value) if isinstance(value, torch.dtype) else value


def move_state_dtype(options: dict[str, Any], defaults: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Pickles of older versions have it for the optimizer as a whole."""
    dtype = options.pop("state_dtype", None)
    if dtype is not None:
        defaults["state_dtype"] = dtype
        for group in groups:
            group["state_dtype"] = dtype

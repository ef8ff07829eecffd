"""How parameters and states are stored: what a group asks for, and what follows from it for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._blocks import CODES, SCALES, can_be_in_blocks, check_blocks, names_in_blocks, slot_of
from ._rule import EMA, MAXIMUM, SQUARES, STORAGE, Group, Rule, State

#: States that keep what a 16-bit parameter lacks of its fp32 number.
REMAINDER, REMAINDER8, MASTER = "param_remainder", "param_remainder8", "param_master"
#: What the fp32 number is called in a state_dict for others.
PORTABLE_MASTER = "master"
#: The state of each ``master=``.
MASTERS: dict[Any, str] = {"remainder": REMAINDER, "remainder8": REMAINDER8, torch.float32: MASTER}
DTYPES_OF_MASTERS = {REMAINDER: torch.bfloat16, REMAINDER8: torch.int8, MASTER: torch.float32}
STATE_DTYPES = (None, torch.float32, torch.bfloat16, "int8")
ROUNDINGS = ("auto", "nearest", "stochastic")
#: In ``rounding=``, the parameter beside the states.
PARAM = "param"
HALVES = (torch.bfloat16, torch.float16)


# ---- what a group may ask for ----


def check_storage(group: Group, rule: Rule) -> None:
    """Raises ValueError for values that no group can have, or not together."""
    master = group.get("master")
    if master is not None and not _is_one_of(master, MASTERS):
        raise ValueError(f"Invalid master: {master!r}; choose 'remainder', 'remainder8', torch.float32 or None")
    names = [slot.name for slot in rule.states]
    for name, dtype in _by_name("state_dtype", group.get("state_dtype"), names).items():
        if not _is_one_of(dtype, STATE_DTYPES):
            of = f" of {name!r}" if name else ""
            raise ValueError(
                f"Invalid state_dtype{of}: {dtype!r}; choose torch.float32, torch.bfloat16, 'int8' or None"
            )
        for slot in rule.states:
            if dtype == "int8" and slot.kind == MAXIMUM and (name == slot.name or (not name and slot.needed_in(group))):
                others = {s.name: "int8" for s in rule.states if s.kind not in (SQUARES, MAXIMUM)}
                raise ValueError(
                    f"state_dtype='int8' is not for {slot.name!r}: a maximum of what is rounded up and down only "
                    f"rises; leave it, and what it is of, in more bits: state_dtype={others}"
                )
    roundings = _by_name("rounding", group.get("rounding", "auto"), [PARAM, *names])
    for name, rounding in roundings.items():
        if not _is_one_of(rounding, ROUNDINGS):
            of = f" of {name!r}" if name else ""
            raise ValueError(f"Invalid rounding{of}: {rounding!r}; choose 'auto', 'nearest' or 'stochastic'")
    if master is not None and roundings.get(PARAM) == "stochastic":
        raise ValueError(
            "rounding={'param': 'stochastic'} and master= do not go together: with a master parameters lose nothing "
            "that rounding could keep; leave out one of them"
        )
    for slot in rule.states:
        if slot.kind == MAXIMUM and roundings.get(slot.name) == "stochastic":
            raise ValueError(
                f"rounding={{{slot.name!r}: 'stochastic'}}: a maximum of what is rounded up and down only rises; use "
                "'nearest'"
            )


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    return any(value is x or (isinstance(value, str) and value == x) for x in known)


def _by_name(option: str, value: Any, names: list[str]) -> dict[str, Any]:
    """One value for all is that of the empty name."""
    if not isinstance(value, Mapping):
        return {"": value}
    for name in value:
        if name not in names:
            raise ValueError(f"Invalid {option}: it names {name!r}, but has to name some of {', '.join(names)}")
    return dict(value)


def check_stored_param(group: Group, p: Tensor, who: str) -> None:
    """Raises ValueError for a parameter that cannot be stored as its group asks."""
    if p.dtype == torch.float64 and "int8" in asked_dtypes(group):
        raise ValueError(f"{who} is float64, whose states are not kept in 8 bits: use state_dtype=torch.float32")
    if "int8" in asked_dtypes(group):
        check_blocks(p, who)
    if p.dtype != torch.float16:
        return
    if group.get("master") in ("remainder", "remainder8"):
        raise ValueError(
            f"{who} is float16, which is no upper part of a float32: use master=torch.float32 for it, or bfloat16"
        )
    rounding = group.get("rounding", "auto")
    asked = rounding.get(PARAM) if isinstance(rounding, Mapping) else rounding
    if asked == "stochastic" and group.get("master") is None:
        raise ValueError(
            f"{who} is float16, which is not rounded stochastically: use master=torch.float32 for it, bfloat16, or "
            "rounding='nearest'"
        )


# ---- what follows from it ----


def needs(name: str, p: Tensor) -> bool:
    """Whether a parameter has such a state, in a group that asks for it."""
    if name in (REMAINDER, REMAINDER8):
        return p.dtype == torch.bfloat16
    return p.dtype in HALVES if name == MASTER else True


def state_names(rule: Rule, group: Group | None = None, p: Tensor | None = None) -> list[str]:
    """The names of the states, in the order in which they are created; with a group and a parameter, those that these
    need."""
    names = ["step"] if rule.has_step or group is None or rounds_stochastically(group, rule) else []
    names += [s.name for s in rule.numbers if group is None or s.needed_in(group)]
    for slot in rule.states:
        if group is None or p is None:
            names += [slot.name, *names_in_blocks(slot.name)]
        elif slot.needed_in(group):
            in_blocks = asked_dtype(group, slot.name) == "int8" and can_be_in_blocks(p)
            names += names_in_blocks(slot.name) if in_blocks else [slot.name]
    if group is None or group.get("ema_decay") is not None:
        names.append(EMA)
    if group is None or p is None:
        return [*names, *MASTERS.values()]
    master = MASTERS.get(group.get("master"))
    return [*names, master] if master is not None and needs(master, p) else names


def check_names(rule: Rule) -> None:
    """Raises ValueError for a rule with a state that would be taken for one of this package's own."""
    taken = ("step", EMA, PARAM, PORTABLE_MASTER, *MASTERS.values())
    names = [slot.name for slot in (*rule.states, *rule.numbers)]
    if len({*names, ""}) <= len(names):
        raise ValueError(f"rule {rule.name!r} has the states {names}: each needs a name of its own")
    for name in names:
        if name in taken or slot_of(name) != name:
            raise ValueError(
                f"rule {rule.name!r} has a state {name!r}, which is a name of states that any optimizer may have: "
                f"choose one that is none of {', '.join(taken)}, and does not end in {CODES} or {SCALES}"
            )


def is_low(group: Group) -> bool:
    """Whether a group asks for anything."""
    return not all(key not in group or is_off(key, group[key]) for key in STORAGE)


def is_off(key: str, value: Any) -> bool:
    """Whether an option, or all that a dict of it says, asks for nothing."""
    values = value.values() if isinstance(value, Mapping) else (value,)
    return all(_is_one_of(x, (STORAGE[key],)) for x in values)


def has_low_states(state: Mapping[Any, Any], rule: Rule) -> bool:
    """Whether there are states that only groups have which ask for something: one may have asked before."""
    names = {name for slot in rule.states for name in names_in_blocks(slot.name)} | {*MASTERS.values()}
    return not all(names.isdisjoint(values) for values in state.values() if isinstance(values, dict))


def state_dtype(group: Group, name: str, p: Tensor) -> torch.dtype:
    """Of a new state with the parameter's shape."""
    asked = asked_dtype(group, name)
    if asked is not None:
        return torch.bfloat16 if asked == "int8" else asked
    return torch.float32 if group.get("master") is torch.float32 and p.dtype in HALVES else p.dtype


def asked_dtype(group: Group, name: str) -> Any:
    """A dtype, "int8" or None. What cannot be in blocks has bfloat16 instead of "int8"."""
    value = group.get("state_dtype")
    return value.get(name) if isinstance(value, Mapping) else value


def asked_dtypes(group: Group) -> list[Any]:
    value = group.get("state_dtype")
    return [*value.values()] if isinstance(value, Mapping) else [value]


def is_stochastic(group: Group, name: str, kind: str = "") -> bool:
    """Whether a state of this name and kind is rounded stochastically where it has bfloat16; so for the parameter."""
    rounding = group.get("rounding", "auto")
    asked = rounding.get(name, "auto") if isinstance(rounding, Mapping) else rounding
    if kind == MAXIMUM:
        return False
    return asked == "stochastic" or (asked == "auto" and kind == SQUARES and is_low(group))


def rounds_stochastically(group: Group, rule: Rule) -> bool:
    """Whether anything of a group may be."""
    return is_low(group) and any(
        is_stochastic(group, name, kind) for name, kind in [(PARAM, ""), *((s.name, s.kind) for s in rule.states)]
    )


class Stored(NamedTuple):
    """An operand of a step whose storage is more than its dtype."""

    #: A state's name; PARAM for the parameter.
    name: str
    #: As csrc/core/storage.h names it.
    storage: str
    #: The state that it keeps beside.
    extra: str | None = None
    #: The state that has its elements, if that is another than its name says.
    elements: str | None = None

    @property
    def is_stochastic(self) -> bool:
        return self.storage.endswith("_stochastic")


def stored_param(group: Group, p: Tensor) -> Stored | None:
    master = group.get("master")
    if master is not None and needs(MASTERS[master], p):
        dtype = "bf16" if p.dtype == torch.bfloat16 else "f16"
        kind = {REMAINDER: "remainder", REMAINDER8: "remainder8", MASTER: "master"}[MASTERS[master]]
        return Stored(PARAM, f"{dtype}_{kind}", MASTERS[master])
    if p.dtype == torch.bfloat16 and is_stochastic(group, PARAM):
        return Stored(PARAM, "bf16_stochastic")
    return None


def stored_state(group: Group, slot: State, states: Mapping[str, Any]) -> Stored | None:
    end = "_stochastic" if is_stochastic(group, slot.name, slot.kind) else ""
    codes, scales = names_in_blocks(slot.name)
    if isinstance(states.get(codes), Tensor) and not isinstance(states.get(slot.name), Tensor):
        return Stored(slot.name, ("q8_squares" if slot.kind == SQUARES else "q8") + end, scales, codes)
    value = states.get(slot.name)
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16 and end:
        return Stored(slot.name, "bf16" + end)
    return None


def stored(group: Group, rule: Rule, p: Tensor, states: Mapping[str, Any]) -> tuple[Stored, ...]:
    """The parameter's operands that are stored as more than their dtypes."""
    if not is_low(group):
        return ()
    found = [stored_param(group, p)]
    found += [stored_state(group, s, states) for s in rule.states if s.needed_in(group)]
    return tuple(x for x in found if x is not None)


def will_be_stochastic(group: Group, rule: Rule, p: Tensor, states: Mapping[str, Any]) -> bool:
    """Whether anything of a parameter with these states is, once it has those that it lacks."""
    if not is_low(group):
        return False
    lacking = [
        s
        for s in rule.states
        if s.needed_in(group) and all(states.get(name) is None for name in (s.name, *names_in_blocks(s.name)))
    ]
    return any(s.is_stochastic for s in stored(group, rule, p, states)) or any(
        is_stochastic(group, s.name, s.kind) and state_dtype(group, s.name, p) == torch.bfloat16 for s in lacking
    )

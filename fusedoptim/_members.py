"""Finds the parameters that a step takes, and validates them: before anything is written, and at no other time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _check_tensors, _native
from ._check_values import check_lists, check_step_values
from ._fakes import is_fake
from ._memory import sharing
from ._rule import EMA, Group, Rule
from ._states import Changes, StateMaker, convert, new_average

Groups = list[dict[str, Any]]


@dataclass
class Member:
    """A parameter, its place in the groups, its states, and whether they count as absent in the coming step."""

    __slots__ = ("first", "group", "index", "param", "states")
    group: int
    index: int
    param: Tensor
    states: dict[str, Any]
    first: bool


def has_gradient(p: Tensor) -> bool:
    return p.grad is not None


@dataclass
class Members:
    #: Those that can be stepped as they are, by device, whether or not they have a gradient now.
    by_device: dict[torch.device, list[Member]] = field(default_factory=dict)
    #: Those that are left alone for as long as they have no gradient.
    dormant: list[Tensor] = field(default_factory=list)

    def leave_alone_devices_without_gradients(self) -> None:
        """One device is kept in any case."""
        without = [d for d, members in self.by_device.items() if not any(has_gradient(m.param) for m in members)]
        for device in without[int(len(without) == len(self.by_device)) :]:
            self.dormant += [m.param for m in self.by_device.pop(device)]


def find(
    groups: Groups,
    rule: Rule,
    optimizer: str,
    maker: StateMaker,
    changes: Changes,
    *,
    zero_grad: bool,
    steps: Callable[[Tensor], bool] = has_gradient,
) -> Members:
    """All parameters, with the states that those which are stepped lacked.

    A parameter without a gradient is nobody's business: whatever it is, and whatever its states are, raises nothing. If
    it could be stepped as it is, it is a member all the same, so that a gradient which comes and goes makes no plan
    anew.

    Args:
        optimizer: its class's name.
        zero_grad: whether the step writes to gradients.
        steps: says of a parameter whether it is stepped.

    Raises:
        ValueError: if one that is stepped, its gradient or its states cannot be. ``changes`` has what was changed.
    """
    check_lists(groups)
    ready: list[Member] = []
    members = Members()
    look = _make_look(rule, changes, zero_grad)
    for index, group in enumerate(groups):
        check_step_values(group, rule, index)
        params = group["params"]
        usual = [False] * len(params) if look is None else look.at(params)
        for i, (p, states) in enumerate(zip(params, usual, strict=True)):
            if states is False:
                try:
                    states = _validate(p, group, index, i, rule, optimizer, changes, zero_grad)
                except Exception:
                    if steps(p):
                        raise
                    members.dormant.append(p)
                    continue
            if early_average(rule, states) and not steps(p):  # to be renewed when it is stepped: see below
                members.dormant.append(p)
                continue
            ready.append(Member(index, i, p, states or {}, False))
    if look is None or not look.all_apart():
        ready = _apart(ready, groups, rule, zero_grad, steps, members.dormant)
    names = [rule.state_names(group) for group in groups]
    with torch.no_grad():
        for m in ready:
            if steps(m.param):
                if early_average(rule, m.states):
                    changes.put(m.states, EMA, new_average(m.param))  # which may have been given other weights since
                _complete(m, names[m.group], maker, changes)
            members.by_device.setdefault(m.param.device, []).append(m)
    return members


def _complete(m: Member, names: list[str], maker: StateMaker, changes: Changes) -> None:
    """Makes the states that a parameter lacks."""
    for name, value in maker.missing(names, m.param, m.states):
        if not m.states:
            m.states = changes.entry(m.param)
        changes.put(m.states, name, value)
        m.first = m.first or (name in maker.slots and maker.slots[name].starts_absent)


def _make_look(rule: Rule, changes: Changes, zero_grad: bool) -> Any:
    """What looks at parameters first: :func:`_validate` takes 15 us, twice as much as torch's whole step, and has
    nothing to say or to do about almost all; this takes less than one. None without the compiled library."""
    if _native._C is None:
        return None
    slots: list[list[str]] = [[], []]
    for slot in rule.slots:
        slots[slot.needed is not None].append(slot.name)
    step = "step" if rule.has_step else None
    return _native._C.Look(changes.state, *slots, step, rule.scalar_state, EMA, zero_grad)


def _validate(
    p: Tensor, group: Group, index: int, i: int, rule: Rule, optimizer: str, changes: Changes, zero_grad: bool
) -> dict[str, Any]:
    """Raises ValueError, or makes what belongs to a parameter such that it can be stepped. Returns its states."""
    who = _check_tensors.describe(group, index, i)
    _check_tensors.check_param(p, who, optimizer)
    if is_fake(p):
        raise ValueError(f"{who} is a fake tensor, which has no memory")
    if p.grad is not None:
        _check_tensors.check_grad(p, who, optimizer)
        if p.grad.is_neg():  # the kernels read memory, which does not show a negation still owed
            p.grad = p.grad.resolve_neg()
        if zero_grad:
            _check_tensors.check_written_grad(p.grad, who)
    values = changes.state.get(p, {})
    if not isinstance(values, dict):
        raise ValueError(f"the state of {who} must be a dict, but is {values!r}")
    convert(p, values, rule, changes)
    _check_tensors.check_states(p, values, rule, who)
    _check_tensors.check_complete(values, rule, who)
    return values


def early_average(rule: Rule, states: dict[str, Any] | None) -> bool:
    """Whether there is an average that was made with the optimizer, of a parameter that was not stepped since."""
    if not rule.states_at_construction or not states or states.get(EMA) is None:
        return False
    step = states.get("step")
    # One that was moved to a device has counted a step there; nothing waits to hear how many.
    return isinstance(step, Tensor) and step.device.type == "cpu" and bool(step.item() == 0)


# ---- memory ----


def _apart(
    ready: list[Member],
    groups: Groups,
    rule: Rule,
    zero_grad: bool,
    steps: Callable[[Tensor], bool],
    dormant: list[Tensor],
) -> list[Member]:
    """No two tensors that are written to may share memory. Parameters that are not stepped give way."""
    found = _common_memory(ready, rule, zero_grad)
    if found is None:
        return ready
    stepped = [m for m in ready if steps(m.param)]
    if len(stepped) < len(ready):
        dormant += [m.param for m in ready if not steps(m.param)]
        return _apart(stepped, groups, rule, zero_grad, steps, dormant)
    texts = [what + _check_tensors.describe(groups[m.group], m.group, m.index) for what, m in found]
    raise ValueError(
        f"{texts[1]} shares memory with {texts[0]}, and all are updated side by side: pass one parameter for both, or "
        "give it memory of its own with .clone()"
    )


def _common_memory(
    ready: list[Member], rule: Rule, zero_grad: bool
) -> tuple[tuple[str, Member], tuple[str, Member]] | None:
    """Two tensors with memory in common: each as (what it is of the parameter, that)."""
    found = sharing(t for _, _, t in _written(ready, rule, zero_grad))
    if found is None:
        return None
    owners = [(what, m) for what, m, _ in _written(ready, rule, zero_grad)]
    first, second = sorted(found)
    return owners[first], owners[second]


def _written(ready: list[Member], rule: Rule, zero_grad: bool) -> Iterator[tuple[str, Member, Tensor]]:
    names = [(name, f"state {name!r} of ") for name in rule.state_names()]
    for m in ready:
        p = m.param
        if zero_grad and p.grad is not None:
            yield "the gradient of ", m, p.grad
        yield "", m, p
        if values := m.states:
            for name, what in names:
                if (value := values.get(name)) is not None:
                    yield what, m, value


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Thousands of new objects would make Python's collector look at every object that there is, several times over,
    which takes longer than all of the rest (0.15 s of 0.25 s for 10,000 parameters)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Finds the parameters that a step takes, and validates them: before anything is written, and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import _checks, _native
from ._fakes import is_fake
from ._memory import sharing
from ._rule import EMA, Group, Rule
from ._states import Changes, StateMaker, convert, new_average

Groups = list[dict[str, Any]]


@dataclass
class Member:
    """A parameter, its place in the groups, and whether its states count as absent in the coming step."""

    __slots__ = ("first", "group", "index", "param")
    group: int
    index: int
    param: Tensor
    first: bool


@dataclass
class Members:
    #: Those that can be stepped as they are, by device, whether or not they have a gradient now.
    by_device: dict[torch.device, list[Member]] = field(default_factory=dict)
    #: Those that are left alone for as long as they have no gradient.
    dormant: list[Tensor] = field(default_factory=list)


def has_gradient(p: Tensor) -> bool:
    return p.grad is not None


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
    _checks.check_lists(groups)
    ready: list[Member] = []
    stepped: list[list[Tensor]] = []
    members = Members()
    for index, group in enumerate(groups):
        _checks.check_step_values(group, rule, index)
        params = group["params"]
        stepped.append([])
        for i, (p, usual) in enumerate(zip(params, _usual(params, rule, changes, zero_grad), strict=True)):
            wanted = steps(p)
            if not usual:
                try:
                    _validate(p, group, index, i, rule, optimizer, changes, zero_grad)
                except Exception:
                    if wanted:
                        raise
                    members.dormant.append(p)
                    continue
            ready.append(Member(index, i, p, False))
            if wanted:
                stepped[-1].append(p)
    ready = _apart(ready, groups, rule, changes, zero_grad, steps, members.dormant)
    first: set[Tensor] = set()
    for group, params in zip(groups, stepped, strict=True):
        if rule.states_at_construction and group["ema_decay"] is not None:
            _start_averages(params, changes)
        first |= maker.create(group, params, changes)
    for member in ready:
        member.first = bool(first) and member.param in first
        members.by_device.setdefault(member.param.device, []).append(member)
    return members


def _usual(params: list[Tensor], rule: Rule, changes: Changes, zero_grad: bool) -> bytes:
    """For each parameter whether it, its gradient and its states are such that :func:`_validate` finds nothing to say
    or to do: it takes 15 us, which is as much as torch's whole step; this less than one."""
    if _native._C is None:
        return bytes(len(params))
    slots: list[list[str]] = [[], []]
    for slot in rule.slots:
        slots[slot.needed is not None].append(slot.name)
    names = _native._C.UsualNames(*slots, "step" if rule.has_step else None, rule.scalar_state, EMA)
    usual: bytes = _native._C.usual(params, changes.state, names, zero_grad)
    return usual


def _validate(
    p: Tensor, group: Group, index: int, i: int, rule: Rule, optimizer: str, changes: Changes, zero_grad: bool
) -> None:
    """Raises ValueError, or makes what belongs to a parameter such that it can be stepped."""
    who = _checks.describe(group, index, i)
    _checks.check_param(p, who, optimizer)
    if is_fake(p):
        raise ValueError(f"{who} is a fake tensor, which has no memory")
    if p.grad is not None:
        _checks.check_grad(p, who, optimizer)
        if p.grad.is_neg():  # the kernels read memory, which does not show a negation still owed
            p.grad = p.grad.resolve_neg()
        if zero_grad:
            _checks.check_written_grad(p.grad, who)
    values = changes.state.get(p, {})
    if not isinstance(values, dict):
        raise ValueError(f"the state of {who} must be a dict, but is {values!r}")
    convert(p, values, rule, changes)
    _checks.check_states(p, values, rule, who)
    _checks.check_complete(values, rule, who)


def _start_averages(params: list[Tensor], changes: Changes) -> None:
    """An average that was made with the optimizer starts as its parameter is before the first step: a model may have
    been given other weights since."""
    for p in params:
        values = changes.state.get(p, {})
        if values.get(EMA) is not None and not_stepped(values):
            changes.put(p, EMA, new_average(p))


def not_stepped(values: dict[str, Any]) -> bool:
    return bool(values["step"].item() == 0)


# ---- memory ----


def _apart(
    ready: list[Member],
    groups: Groups,
    rule: Rule,
    changes: Changes,
    zero_grad: bool,
    steps: Callable[[Tensor], bool],
    dormant: list[Tensor],
) -> list[Member]:
    """No two tensors that are written to may share memory. Parameters that are not stepped give way."""
    found = _common_memory(ready, rule, changes, zero_grad)
    if found is None:
        return ready
    stepped = [m for m in ready if steps(m.param)]
    if len(stepped) < len(ready):
        dormant += [m.param for m in ready if not steps(m.param)]
        return _apart(stepped, groups, rule, changes, zero_grad, steps, dormant)
    texts = [what + _checks.describe(groups[m.group], m.group, m.index) for what, m in found]
    raise ValueError(
        f"{texts[1]} shares memory with {texts[0]}, and all are updated side by side: pass one parameter for both, or "
        "give it memory of its own with .clone()"
    )


def _common_memory(
    ready: list[Member], rule: Rule, changes: Changes, zero_grad: bool
) -> tuple[tuple[str, Member], tuple[str, Member]] | None:
    """Two tensors with memory in common: each as (what it is of the parameter, that)."""
    tensors = [t for _, _, t in _written(ready, rule, changes, zero_grad)]
    if _native._C is not None and _native._C.apart(tensors):
        return None
    found = sharing(tensors)
    if found is None:
        return None
    owners = [(what, m) for what, m, _ in _written(ready, rule, changes, zero_grad)]
    first, second = sorted(found)
    return owners[first], owners[second]


def _written(
    ready: list[Member], rule: Rule, changes: Changes, zero_grad: bool
) -> Iterator[tuple[str, Member, Tensor]]:
    names = [(name, f"state {name!r} of ") for name in rule.state_names()]
    get = changes.state.get
    for m in ready:
        p = m.param
        if zero_grad and p.grad is not None:
            yield "the gradient of ", m, p.grad
        yield "", m, p
        values = get(p)
        if values:
            for name, what in names:
                if (value := values.get(name)) is not None:
                    yield what, m, value


def is_materialised(p: Tensor) -> bool:
    return not is_lazy(p) and p.device.type != "meta"


def check_early(p: Tensor, group: Group, index: int, i: int, optimizer: str) -> None:
    """What can be said of a new parameter before it has a gradient: that it never can be stepped. Frozen ones are left
    alone, and so are those that are yet to be materialised.

    Raises:
        ValueError: if it cannot.
    """
    if p.requires_grad and is_materialised(p):
        _checks.check_param(p, _checks.describe(group, index, i), optimizer)


def can_have_states(p: Tensor) -> bool:
    """Whether states can be made for it before it has a gradient."""
    if not is_materialised(p) or (not p.requires_grad and type(p) not in (Tensor, torch.nn.Parameter)):
        return False
    try:
        _checks.check_param(p, "", "")
    except ValueError:
        return False
    return True

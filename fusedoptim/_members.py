"""Finds the parameters that a step takes, and makes them ready. Looking, which validates, comes first and changes
nothing; then what was found is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check_tensors, _native
from ._check_values import check_lists, check_step_values
from ._dtensor import aligned, dtensor_class, has_no_partial, has_shape_and_layout, is_dtensor, local
from ._ema import is_early, new_average
from ._fakes import is_fake
from ._masters import loses_number
from ._overlap import sharing
from ._random_places import NOWHERE, Id, Place, ids_of, place_of
from ._recoding import Recoded
from ._rule import EMA
from ._shard_maps import check_index_map
from ._states import Changes, HasStates, StateMaker, converted
from ._storage import (
    HALVES,
    Stored,
    check_stored_param,
    has_low_states,
    is_low,
    state_names,
    stored,
    will_be_stochastic,
)


@dataclass
class BoundParam:
    """A parameter, its place in the groups, its states, and whether they count as absent in the coming step."""

    __slots__ = ("first", "group", "index", "param", "place", "states", "stored")
    group: int
    index: int
    param: Tensor
    states: dict[str, Any]
    first: bool
    #: What is stored as more than its dtype, and for what is rounded stochastically where its elements belong.
    stored: tuple[Stored, ...]
    place: Place


def has_gradient(p: Tensor) -> bool:
    return p.grad is not None


class Conversion(NamedTuple):
    """What has to be changed of a parameter before it can be stepped."""

    param: Tensor
    #: Its states as they are.
    states: dict[str, Any]
    #: By name, those that take the place of others; None for those that others took the place of.
    new: Recoded
    #: Whether its gradient is such that another takes its place: see :func:`usual_grad`.
    grad: bool

    @property
    def is_needed(self) -> bool:
        return bool(self.new) or self.grad

    def apply(self, changes: Changes) -> None:
        if self.grad and (grad := usual_grad(self.param)) is not self.param.grad:
            self.param.grad = grad
        if self.param.dtype not in HALVES:  # else its group was changed, by somebody who knows what that drops
            changes.losses += loses_number(self.param, self.states, self.new)
        for name, value in self.new.items():
            if value is None:
                changes.drop(self.states, name)
            else:
                changes.put(self.states, name, value)


def usual_grad(p: Tensor) -> Tensor | None:
    """A parameter's gradient as kernels can read it: not negated lazily, which memory does not show, and placed as the
    parameter is, for which all ranks may have to communicate."""
    g = p.grad
    if g is None:
        return None
    if is_dtensor(p):
        placed: Tensor | None = aligned(p, g)
        return placed
    return g.resolve_neg()


@dataclass
class Found:
    """All parameters of the groups.

    A parameter without a gradient is nobody's business: whatever it is, and whatever its states are, raises nothing. If
    it could be stepped as it is, it is ready all the same, so that a gradient which comes and goes makes no plan anew.
    """

    #: Those that can be stepped, whether or not they have a gradient now.
    ready: list[BoundParam] = field(default_factory=list)
    #: Those that are left alone for as long as they have no gradient.
    dormant: list[Tensor] = field(default_factory=list)
    #: Of those that are ready.
    conversions: list[Conversion] = field(default_factory=list)
    #: Whether it is known that no two tensors that are written to share memory.
    apart: bool = False

    def by_device(self) -> dict[torch.device, list[BoundParam]]:
        found: dict[torch.device, list[BoundParam]] = {}
        for m in self.ready:
            found.setdefault(m.param.device, []).append(m)
        return found


def find(optimizer: HasStates, steps: Callable[[Tensor], bool] = has_gradient) -> Found:
    """Looks at all parameters, and changes nothing.

    Args:
        steps: says of a parameter whether it is stepped.

    Raises:
        ValueError: if one that is stepped, its gradient or its states cannot be.
    """
    groups, rule = optimizer.param_groups, optimizer.rule
    check_lists(groups)
    found = Found()
    look = _make_look(optimizer)
    for index, group in enumerate(groups):
        check_step_values(group, rule, index)
        params = group["params"]
        usual = [False] * len(params) if look is None else look.at(params)
        for i, (p, states) in enumerate(zip(params, usual, strict=True)):
            known = states
            if states is False:
                try:
                    conversion = _check(optimizer, index, i)
                except Exception:
                    if steps(p):
                        raise
                    found.dormant.append(p)
                    continue
                states = conversion.states
                known = {**states, **conversion.new}
            if is_early(rule, known) and not steps(p):  # to be renewed when it is stepped: see make_states
                found.dormant.append(p)
                continue
            if known is not states and conversion.is_needed:
                found.conversions.append(conversion)
            found.ready.append(BoundParam(index, i, p, states or {}, False, (), NOWHERE))
    found.apart = look is not None and look.all_apart()
    return found


def convert(found: Found, changes: Changes) -> None:
    """Makes what belongs to the parameters such that they can be stepped."""
    for conversion in found.conversions:
        conversion.apply(changes)


@torch.no_grad()
def make_states(
    found: Found, optimizer: HasStates, changes: Changes, steps: Callable[[Tensor], bool] = has_gradient
) -> None:
    """Makes the states that those parameters lack which are stepped."""
    maker, rule = StateMaker.of(optimizer), optimizer.rule
    for m in found.ready:
        if not steps(m.param):
            continue
        if is_early(rule, m.states):
            changes.put(m.states, EMA, new_average(m.param))  # which may have been given other weights since
        for name, value in maker.missing(optimizer.param_groups[m.group], m.param, m.states):
            if not m.states:
                m.states = changes.make_entry(m.param)
            changes.put(m.states, name, value)
            m.first = m.first or name in maker.absent


def note_storage(found: Found, optimizer: HasStates) -> None:
    """Once the states are there: how everything is stored."""
    groups, rule = optimizer.param_groups, optimizer.rule
    low = [is_low(group) for group in groups]
    ids: dict[Tensor, Id] | None = None
    for m in found.ready if any(low) else ():
        m.stored = stored(groups[m.group], rule, m.param, m.states) if low[m.group] else ()
        if any(s.is_stochastic for s in m.stored):
            ids = ids_of(optimizer) if ids is None else ids
            m.place = place_of(m.param, ids[m.param])


def _make_look(optimizer: HasStates) -> Any:
    """What looks at parameters first: :func:`_check` takes 15 us, twice as much as torch's whole step, and has nothing
    to say about almost all; this takes less than one. None without the compiled library."""
    rule = optimizer.rule
    if _native._C is None or any(map(is_low, optimizer.param_groups)) or has_low_states(optimizer.state, rule):
        return None
    names: list[list[str]] = [[], [], [], []]
    for k, states in enumerate((rule.states, rule.numbers)):
        for state in states:
            names[2 * k + (state.needed is not None)].append(state.name)
    step = "step" if rule.has_step else None
    zero_grad = optimizer._options["zero_grad_in_step"]
    cls = dtensor_class()
    shards = None if cls is None else (cls, has_no_partial, has_shape_and_layout)
    return _native._C.Look(optimizer.state, *names, step, EMA, zero_grad, shards)


def _check(optimizer: HasStates, index: int, i: int) -> Conversion:
    """Raises ValueError for a parameter that cannot be stepped. Returns what has to be changed before."""
    rule, name, group = optimizer.rule, type(optimizer).__name__, optimizer.param_groups[index]
    p, who = group["params"][i], _check_tensors.describe(group, index, i)
    _check_tensors.check_param(p, who, name)
    check_stored_param(group, p, who)
    if is_fake(p):
        raise ValueError(f"{who} is a fake tensor, which has no memory")
    unusual = False
    if p.grad is not None:
        _check_tensors.check_grad(p, who, rule)
        if is_dtensor(p) or p.grad.is_neg():
            unusual = True  # the new one has memory of its own
        if optimizer._options["zero_grad_in_step"] and not p.grad.is_neg():
            _check_tensors.check_written_grad(local(p.grad), who)
    values = optimizer.state.get(p, {})
    if not isinstance(values, dict):
        raise ValueError(f"the state of {who} must be a dict, but is {values!r}")
    new = converted(p, values, rule, group)
    there = {**values, **new}
    _check_tensors.check_states(p, there, rule, who)
    _check_tensors.check_complete(there, rule, who)
    if is_dtensor(p) and will_be_stochastic(group, rule, p, there):
        check_index_map(p, who)
    return Conversion(p, values, new, unusual)


# ---- memory ----


def keep_apart(found: Found, optimizer: HasStates, steps: Callable[[Tensor], bool] = has_gradient) -> None:
    """Sees to it that no two tensors share memory which are written to: parameters that are not stepped give way.

    Raises:
        ValueError: if two of those share memory that are stepped.
    """
    if found.apart or (both := _common_memory(found.ready, optimizer)) is None:
        return
    stepped = [m for m in found.ready if steps(m.param)]
    if len(stepped) < len(found.ready):
        found.dormant += [m.param for m in found.ready if not steps(m.param)]
        found.ready = stepped
        keep_apart(found, optimizer, steps)
        return
    raise ValueError(
        f"{both[1]} shares memory with {both[0]}, and all are updated side by side: pass one parameter for both, or "
        "give it memory of its own with .clone()"
    )


def _common_memory(ready: list[BoundParam], optimizer: HasStates) -> list[str] | None:
    """Two tensors with memory in common, in words."""
    found = sharing(local(t) for _, _, t in _written(ready, optimizer))
    if found is None:
        return None
    groups = optimizer.param_groups
    owners = [(what, m) for what, m, _ in _written(ready, optimizer)]
    both = (owners[i] for i in sorted(found))
    return [what + _check_tensors.describe(groups[m.group], m.group, m.index) for what, m in both]


def _written(ready: list[BoundParam], optimizer: HasStates) -> Iterator[tuple[str, BoundParam, Tensor]]:
    """What a step writes to: what it is of a parameter, in words, that, and the tensor."""
    names = {name: f"state {name!r} of " for name in state_names(optimizer.rule)}
    zero_grad = optimizer._options["zero_grad_in_step"]
    for m in ready:
        p = m.param
        if zero_grad and p.grad is not None:
            yield "the gradient of ", m, p.grad
        yield "", m, p
        for name, value in m.states.items():
            if value is not None and name in names:
                yield names[name], m, value

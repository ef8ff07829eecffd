"""A step whose states come from outside: what a tracer records where an optimizer's states are inputs of the function
that is traced, as with ``torch.optim.swap_in_optimizer_params_and_state``.

The operator writes to the parameters and states that it is given, and to none of the optimizer's own. Of that it has
the options, and the groups' numbers as they were when the step was traced, as any trace has; tensors among them are
inputs. Its tables are made anew at every call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import _torch_compile
from ._check_tensors import describe
from ._fakes import is_fake
from ._random_places import ids_of
from ._storage import MASTERS, state_names
from ._torch_compile import Traceable

AnyTraceable = TypeVar("AnyTraceable", bound=Traceable)


def _check_number(value: Any, key: str, index: int) -> None:
    for x in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise RuntimeError(
                f"{key!r} of group {index} is {value!r}, a symbol of what is being traced: pass a number, or for lr a "
                "tensor"
            )


class Place(NamedTuple):
    """Of a value in the groups."""

    group: int
    key: str


class Given(_torch_compile.Traced):
    """A traced step, and where in the optimizer the tensors belong that the operator is given."""

    def __init__(self, optimizer: Traceable, active: tuple[int, ...]) -> None:
        super().__init__(optimizer, active)
        #: Per parameter the names of its states.
        self.names: list[tuple[str, ...]] = []
        self.states: list[Tensor] = []
        self.groups: list[dict[str, Any]] = []
        #: The number of parameters per group.
        self.sizes: list[int] = []
        #: Of those of the groups' values that are tensors.
        self.places: list[Place] = []
        self.values: list[Tensor] = []
        #: Per parameter what it is, for random bits.
        self.ids = list(ids_of(optimizer).values())
        for index, group in enumerate(optimizer.param_groups):
            self.sizes.append(len(group["params"]))
            self.groups.append({})
            for key, value in group.items():
                if isinstance(value, Tensor):
                    self.places.append(Place(index, key))
                    self.values.append(value)
                elif key not in ("params", "param_names"):
                    _check_number(value, key, index)
                    self.groups[-1][key] = value
            for p in group["params"]:
                states = {n: v for n, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
                self.names.append(tuple(states))
                self.states += states.values()

    def key(self) -> tuple[Any, ...]:
        return (
            self.active,
            tuple(self.names),
            tuple(self.sizes),
            tuple(self.places),
            tuple(self.ids),
            repr(self.groups),
        )


def states_are_traced(optimizer: Traceable, tracer: Any) -> bool:
    """Whether states are inputs, or results, of what is being traced."""
    from torch.fx.experimental.proxy_tensor import has_proxy_slot

    return any(
        is_fake(v) or has_proxy_slot(v, tracer.tracer)
        for values in optimizer.state.values()
        for v in values.values()
        if isinstance(v, Tensor)
    )


def _check_complete(optimizer: Traceable) -> None:
    """What a step would have to make is no result of the trace, and would be lost."""
    for index, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            there = optimizer.state.get(p, {})
            needed = state_names(optimizer.rule, group, p)
            missing = [name for name in needed if there.get(name) is None]
            gone = [name for name in MASTERS.values() if name in there and name not in needed]
            if p.grad is not None and gone:
                raise RuntimeError(
                    f"{describe(group, index, i)} has a state {gone[0]!r}, which its group does not ask for, and which "
                    "a traced step cannot take out of the states that are given: take a step before"
                )
            if p.grad is not None and missing:
                raise RuntimeError(
                    f"{describe(group, index, i)} has no state {missing[0]!r}, and what a traced step makes anew would "
                    "be lost: take a step before, or put it into the states that are given"
                )


def trace(optimizer: Traceable, params: list[Tensor], active: tuple[int, ...]) -> None:
    """Puts the operator into the graph that is being traced."""
    _check_complete(optimizer)
    given = Given(optimizer, active)
    states, values = given.states, given.values
    del given.states, given.values  # of the trace, and not to be kept
    number = _torch_compile.keep_first(optimizer, given.key(), given).number
    grads = [params[i].grad for i in active]
    with torch.no_grad():
        torch.ops.fusedoptim.stateless_step_(number, params, grads, states, values)


def twin(optimizer: AnyTraceable, groups: list[dict[str, Any]], state: dict[Any, Any]) -> AnyTraceable:
    """As a copy of the optimizer would be, with other groups and states. A copy proper would walk over all its own."""
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__({**optimizer.__getstate__(), "state": state, "param_groups": groups})
    other._agreed = True  # it steps a part of what all ranks step
    return other


def _step(number: int, params: list[Tensor], grads: list[Tensor], states: list[Tensor], values: list[Tensor]) -> None:
    given = _torch_compile.find(number)
    if not isinstance(given, Given):
        raise RuntimeError(f"number {number} stands for a step with the optimizer's own states: use fusedoptim::step_")
    optimizer = given.optimizer
    own = [p.detach() for p in params]  # the same memory and version counters
    for i, grad in zip(given.active, grads, strict=True):
        own[i].grad = grad
    rest = iter(own)
    groups = [
        {**group, "params": [next(rest) for _ in range(size)]}
        for group, size in zip(given.groups, given.sizes, strict=True)
    ]
    for place, value in zip(given.places, values, strict=True):
        groups[place.group][place.key] = value
    state: dict[Any, Any] = defaultdict(dict)
    places = [(p, name) for p, names in zip(own, given.names, strict=True) for name in names]
    for (p, name), value in zip(places, states, strict=True):
        state[p][name] = value
    other = twin(optimizer, groups, state)
    other._ids = dict(zip(own, given.ids, strict=True))
    other._norms = optimizer._norms
    other._step(in_operator=True)
    for (p, name), value in zip(places, states, strict=True):
        if other.state[p][name] is not value:  # moved to the device, or converted
            value.copy_(other.state[p][name])


_torch_compile.define(
    "stateless_step_",
    "(int traced, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor[] values) -> ()",
    _step,
)

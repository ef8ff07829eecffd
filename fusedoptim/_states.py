"""Makes, converts and moves the states of parameters, in a way that can be undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _blocks, _masters, _storage
from ._dtypes import compute_dtype
from ._ema import new_average
from ._random_places import Id
from ._recoding import Recoded, recoded
from ._rule import EMA, SQUARES, Group, Rule, State
from ._values import number


class Changes:
    """What a step changed in ``optimizer.state`` before it ran, to be undone if it fails."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state
        #: The number of parameters that stood for more than they do now.
        self.losses = 0
        self._made: list[Tensor] = []  # parameters that had no entry
        self._log: list[Any] = []  # entry, name, value before, ...: the garbage collector looks at every tuple

    def make_entry(self, p: Tensor) -> dict[str, Any]:
        """A parameter's entry in the state, new if it had none."""
        if p not in self.state:
            self._made.append(p)
        values: dict[str, Any] = self.state[p]
        return values

    def put(self, entry: dict[str, Any], name: str, value: Any) -> None:
        self._log += (entry, name, entry.get(name, _ABSENT))
        entry[name] = value

    def drop(self, entry: dict[str, Any], name: str) -> None:
        self._log += (entry, name, entry.pop(name))

    def undo(self) -> None:
        while self._log:
            old, name, entry = self._log.pop(), self._log.pop(), self._log.pop()
            if old is _ABSENT:
                del entry[name]
            else:
                entry[name] = old
        for p in self._made:
            if not self.state[p]:
                del self.state[p]
        self._made.clear()


_ABSENT = object()


def scalars(values: Mapping[str, Any], rule: Rule) -> dict[str, Tensor]:
    """Those of a parameter's states that are one number, as a step has them: 0-dim tensors of fp32; ``step`` of fp64
    stays. Checkpoints have them as numbers of Python and NumPy, and as tensors of any dtype. What is none of these is
    left out."""
    wanted: dict[str, tuple[torch.dtype, ...]] = {"step": (torch.float32, torch.float64)}
    wanted.update({name: (torch.float32,) for name in rule.number_names})
    found = {}
    for name, dtypes in wanted.items():
        value = values.get(name)
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                found[name] = value if value.dtype in dtypes else value.to(dtypes[0])
        elif value is not None and hasattr(value, "__float__"):
            try:
                found[name] = torch.tensor(float(value), dtype=dtypes[0], device="cpu")
            except (TypeError, ValueError):  # of an array of several
                continue
    return found


def converted(p: Tensor, values: Mapping[str, Any], rule: Rule, group: Group) -> Recoded:
    """Those of a parameter's states that somebody else made in other dtypes than a step needs, in these. An average's
    is the compute dtype, which is another than before after ``model.double()``. All are stored as the group asks, in
    the place of what is not: that is None."""
    found: Recoded = {name: value for name, value in scalars(values, rule).items() if value is not values[name]}
    average, dtype = values.get(EMA), compute_dtype(p)
    if isinstance(average, Tensor) and average.is_floating_point() and average.dtype != dtype:
        found[EMA] = average.to(dtype)
    return found | recoded(group, rule, p, values)


class HasStates(Protocol):
    """What an optimizer has that its states follow from."""

    rule: Rule
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _options: dict[str, Any]
    _ids: dict[Tensor, Id]


class StateMaker:
    """Makes the states that groups need and parameters lack.

    Args:
        defaults: the optimizer's, where initial values are.
    """

    def __init__(self, rule: Rule, defaults: Mapping[str, Any]) -> None:
        self.rule, self.defaults = rule, defaults
        self.slots = {s.name: s for s in rule.states}
        self.numbers = {s.name: s for s in rule.numbers}
        #: The names of those that count as absent in a parameter's first step.
        self.absent = {n for s in rule.states if s.starts_absent for n in (s.name, *_blocks.names_in_blocks(s.name))}
        #: By group the names that all its parameters need; None where each has its own, by an option of storage.
        self._names: dict[int, list[str] | None] = {}

    @classmethod
    def of(cls, optimizer: HasStates) -> StateMaker:
        return cls(optimizer.rule, optimizer.defaults)

    def missing(
        self, group: Group, p: Tensor, there: Mapping[str, Any], like: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The states that a parameter lacks in this group, new, beside those that are there. To be called without
        gradients.

        Args:
            like: what they are made for in the parameter's stead, of the same or a shard's shape.
        """
        if id(group) not in self._names:
            low = _storage.is_low(group)
            self._names[id(group)] = None if low else _storage.state_names(self.rule, group, p)
        of_all = self._names[id(group)]
        for name in _storage.state_names(self.rule, group, p) if of_all is None else of_all:
            if there.get(name) is None:
                yield name, self._new(name, group, of_all is None, p if like is None else like)

    def _new(self, name: str, group: Group, low: bool, p: Tensor) -> Tensor:
        if (slot := self.slots.get(name)) is not None:
            dtype = _storage.state_dtype(group, name, p) if low else p.dtype
            if (fill := self._fill(slot, group)) == 0:
                return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            return torch.full_like(p, fill, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        if name == "step":
            double = torch.get_default_dtype() == torch.float64
            return torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
        if name == EMA:
            return new_average(p)
        if name in _storage.DTYPES_OF_MASTERS:
            return _masters.new_master(name, p)
        if (of := _blocks.slot_of(name)) in self.slots:
            slot = self.slots[of]
            return _blocks.new_in_blocks(name, p, slot.kind == SQUARES, self._fill(slot, group))
        return torch.full((), self._fill(self.numbers[name], group), dtype=torch.float32, device=p.device)

    def _fill(self, state: State, group: Group) -> float:
        if callable(state.initial):
            return state.initial(group)
        return number(self.defaults[state.initial]) if isinstance(state.initial, str) else state.initial


def move_steps(entries: Iterable[dict[str, Any]], device: torch.device, changes: Changes) -> None:
    """Moves steps that are on the CPU to the device, in one copy: they become views of one buffer."""
    by_dtype: dict[torch.dtype, list[dict[str, Any]]] = {}
    for entry in entries:
        step = entry.get("step")
        if step is not None and step.device != device:
            by_dtype.setdefault(step.dtype, []).append(entry)
    for of_dtype in by_dtype.values():
        steps = torch.stack([entry["step"].reshape(()) for entry in of_dtype]).to(device)
        for entry, step in zip(of_dtype, steps.unbind(), strict=True):
            changes.put(entry, "step", step)

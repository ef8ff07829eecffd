"""Makes, converts and moves the states of parameters, in a way that can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import compute_dtype
from ._rule import EMA, Group, Rule, Slot

State = dict[Any, Any]


class Changes:
    """What a step changed in ``optimizer.state`` before it ran, to be undone if it fails."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._known = set(state)
        self._log: list[tuple[Tensor, str, Any]] = []

    def put(self, p: Tensor, name: str, value: Any) -> None:
        values = self.state[p]
        self._log.append((p, name, values.get(name, _ABSENT)))
        values[name] = value

    def undo(self) -> None:
        for p, name, old in reversed(self._log):
            if old is _ABSENT:
                del self.state[p][name]
            else:
                self.state[p][name] = old
            if p not in self._known and not self.state[p]:
                del self.state[p]
        self._log.clear()


_ABSENT = object()


def scalars(values: Mapping[str, Any], rule: Rule) -> dict[str, Tensor]:
    """Those of a parameter's states that are one number, as a step has them: 0-dim tensors of fp32; ``step`` of fp64
    stays. Checkpoints have them as numbers of Python and NumPy, and as tensors of any dtype. What is none of these is
    left out."""
    wanted: dict[str, tuple[torch.dtype, ...]] = {}
    if rule.has_step:
        wanted["step"] = (torch.float32, torch.float64)
    if rule.scalar_state:
        wanted[rule.scalar_state] = (torch.float32,)
    found = {}
    for name, dtypes in wanted.items():
        value = values.get(name)
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                found[name] = value if value.dtype in dtypes else value.to(dtypes[0])
        elif value is not None and hasattr(value, "__float__"):
            found[name] = torch.tensor(float(value), dtype=dtypes[0], device="cpu")
    return found


def convert(p: Tensor, values: Mapping[str, Any], rule: Rule, changes: Changes) -> None:
    """Gives states that somebody else made the dtypes that a step needs. An average's is the compute dtype, which is
    another than before after ``model.double()``."""
    for name, value in scalars(values, rule).items():
        if value is not values[name]:
            changes.put(p, name, value)
    average, dtype = values.get(EMA), compute_dtype(p)
    if isinstance(average, Tensor) and average.is_floating_point() and average.dtype != dtype:
        changes.put(p, EMA, average.to(dtype))


class StateMaker:
    """Makes the states that groups need and parameters lack.

    Args:
        defaults: the optimizer's, where initial values are.
        dtype: of states with the parameter's shape; None for the parameter's own.
    """

    def __init__(self, rule: Rule, defaults: Mapping[str, Any], dtype: torch.dtype | None) -> None:
        self.rule, self.defaults, self.dtype = rule, defaults, dtype
        self.slots = {s.name: s for s in rule.slots}

    @torch.no_grad()
    def create(self, group: Group, params: Iterable[Tensor], changes: Changes) -> set[Tensor]:
        """Returns the parameters of which one of the new states counts as absent in the coming step."""
        names = self.rule.state_names(group)
        first: set[Tensor] = set()
        for p in params:
            values = changes.state.get(p, {})
            for name in names:
                if values.get(name) is not None:
                    continue
                slot = self.slots.get(name)
                changes.put(p, name, self._new(name, slot, p))
                if slot is not None and slot.starts_absent:
                    first.add(p)
        return first

    def _new(self, name: str, slot: Slot | None, p: Tensor) -> Tensor:
        if slot is not None:
            dtype = self.dtype or p.dtype
            if slot.initial is None:
                return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            fill = self.defaults[slot.initial]
            return torch.full_like(p, fill, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        if name == "step":
            double = torch.get_default_dtype() == torch.float64
            return torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
        if name == EMA:
            return new_average(p)
        return torch.zeros((), dtype=torch.float32, device=p.device)


def new_average(p: Tensor) -> Tensor:
    """A moving average starts as its parameter."""
    return p.detach().to(compute_dtype(p), copy=True, memory_format=torch.preserve_format)


def move_steps(params: list[Tensor], device: torch.device, changes: Changes) -> None:
    """Moves steps that are on the CPU to the device, in one copy: they become views of one buffer."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        step = changes.state.get(p, {}).get("step")
        if step is not None and step.device != device:
            by_dtype.setdefault(step.dtype, []).append(p)
    for of_dtype in by_dtype.values():
        steps = torch.stack([changes.state[p]["step"].reshape(()) for p in of_dtype]).to(device)
        for p, step in zip(of_dtype, steps.unbind(), strict=True):
            changes.put(p, "step", step)

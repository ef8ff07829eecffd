"""How an optimizer declares itself: its hyper-parameters, its states, its reference function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Group = Mapping[str, Any]
#: Group keys whose values are on or off. torch.optim takes None for off.
FLAGS = ("amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay", "bias_correction")
#: ``reference(param, grad, states, step, group)`` updates ``param`` and the tensors in ``states`` in place. All are
#: contiguous and of the compute dtype; ``step`` counts from 1. A state that is ``None`` is absent so far.
Reference = Callable[[Tensor, Tensor, dict[str, Any], float, Group], None]


#: The moving average of the parameter that any group can have.
EMA = "ema"


@dataclass(frozen=True)
class Slot:
    """A state with the parameter's shape."""

    name: str
    #: The groups that need it; all of them if None.
    needed: Callable[[Group], bool] | None = None
    #: On a tensor's first step it counts as absent instead of as zeros.
    starts_absent: bool = False
    #: The key in the optimizer's defaults of the value that it starts with, else 0.
    initial: str | None = None

    def needed_in(self, group: Group) -> bool:
        return self.needed is None or bool(self.needed(group))


@dataclass(frozen=True)
class Rule:
    """An update rule. Order matters: ``hyper`` and ``slots`` are those of the compiled rule's Hyper and Slot enums."""

    name: str
    reference: Reference
    #: (group key, index into its value or -1), without ``lr``, which every rule has
    hyper: tuple[tuple[str, int], ...]
    slots: tuple[Slot, ...]
    #: Raises ValueError for values of a group that are out of range; lr is looked at for every rule.
    check: Callable[[Group], None]
    #: Whether a 0-dim tensor ``step`` per parameter counts the steps.
    has_step: bool = True
    #: The name of a 0-dim fp32 state per parameter, or None.
    scalar_state: str | None = None
    #: Whether the update depends on the norm of the whole gradient.
    uses_norm: bool = False
    #: Whether an optimizer has its states before its first step.
    states_at_construction: bool = False
    #: Keys of groups that torch.optim does not have, and what they are where they are off.
    extensions: Mapping[str, Any] = field(default_factory=dict)

    def state_names(self, group: Group | None = None) -> list[str]:
        """The names of the states, in the order in which they are created; with a group, those that it needs."""
        names = ["step"] if self.has_step else []
        names += [s.name for s in self.slots if group is None or s.needed_in(group)]
        if group is None or group.get("ema_decay") is not None:
            names.append(EMA)
        return names + ([self.scalar_state] if self.scalar_state else [])

    def required_states(self) -> set[str]:
        """The states that every group needs."""
        names = {s.name for s in self.slots if s.needed is None}
        names |= {"step"} if self.has_step else set()
        return names | ({self.scalar_state} if self.scalar_state else set())

"""What the groups of a rule have that does not declare it: all that its class has defaults for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._rule import GROUP_OPTIONS, LARGEST, LR, Group, Hyper, Range, Rule

#: Of torch.optim's groups, and without a meaning for a step.
_TORCHS = ("foreach", "fused", "capturable", "differentiable")
_NUMBERS = (bool, int, float, Tensor)


_ABOVE_MINUS_1 = Range(
    math.nextafter(-1.0, 0.0), LARGEST, f"above -1 and at most {LARGEST:g}, or else declared with Rule(hyper=...)"
)


@dataclass(frozen=True)
class OrNone(Hyper):
    """A number that None turns off, as the class's default does. Groups keep the None, which is -1 to a plan."""

    accepts: Range = _ABOVE_MINUS_1
    optional: bool = True
    instead: str = "; if its values are none, name it in Rule(constants=...)"

    @property
    def off_number(self) -> float:
        return -1.0


def completed(rule: Rule, defaults: Group) -> Rule:
    """The rule with its hyper-parameters: numbers, and several under one key, where it declares none. What is None by
    default is one, too, that is off. Values of other kinds, and what it names as such, are constants to its
    function."""
    if LR.key not in defaults:
        raise ValueError(
            f"the defaults of rule {rule.name!r} have no 'lr': give them one, which schedulers set and the function "
            "reads as h['lr']"
        )
    if rule.hyper:
        return rule
    own = [key for key in defaults if key not in (LR.key, *GROUP_OPTIONS, *_TORCHS, *rule.constants)]
    hyper = tuple(h for key in own for h in _hypers(key, defaults[key]))
    constants = tuple(key for key in own if not any(h.key == key for h in hyper))
    return dataclasses.replace(rule, hyper=hyper, constants=(*rule.constants, *constants))


def _hypers(key: str, value: Any) -> Iterable[Hyper]:
    if value is None:
        return (OrNone(key),)
    if _is_number(value):
        return (Hyper(key),)
    if isinstance(value, (tuple, list)) and value and all(map(_is_number, value)):
        return (Hyper(key, i, count=len(value)) for i in range(len(value)))
    return ()


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) or (hasattr(value, "__float__") and not isinstance(value, (str, bytes)))

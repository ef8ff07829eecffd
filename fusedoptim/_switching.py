"""Parameters that an optimizer moves between two steps, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import _lending
from ._blocks import names_in_blocks
from ._members import BoundParam
from ._random_places import NOWHERE
from ._reference_runner import load, store
from ._resharding import Resharding
from ._states import HasStates
from ._storage import PARAM, stored


class Moving(HasStates, Protocol):
    _lent: dict[Tensor, _lending.Lent]

    def _check_not_evaluating(self, call: str) -> None: ...


@torch.no_grad()
def move_towards(
    optimizer: Moving, name: str, groups: Sequence[tuple[dict[str, Any], float]], model: nn.Module | None, call: str
) -> None:
    """Makes every parameter of these groups that has a state of this name ``lerp(parameter, state, weight)``, rounded
    once, to nearest. With a ``master`` that is moved, and rounded as in a step.

    Args:
        groups: with the weight of each.
        model: see :class:`Resharding`.
        call: what asks for it, for messages.
    """
    optimizer._check_not_evaluating(call)
    members = [(p, group, weight) for group, weight in groups for p in group["params"]]
    members = [member for member in members if _has(optimizer.state.get(member[0], {}), name)]
    resharding = Resharding(model, [p for p, _, _ in members], call)
    _lending.take_over(optimizer._lent, optimizer.state)
    try:
        for p, group, weight in members:
            states = optimizer.state[p]
            how = stored(group, optimizer.rule, p, states)
            nearest = tuple(s for s in how if s.name != PARAM or not s.is_stochastic)
            m = BoundParam(0, 0, p, states, False, nearest, NOWHERE)
            value = load(m, PARAM, p, states).lerp_(load(m, name, states.get(name), states), weight)
            store(m, PARAM, p, value, states, {})
    finally:
        resharding.again()


def _has(states: Mapping[str, Any], name: str) -> bool:
    return any(states.get(x) is not None for x in (name, names_in_blocks(name)[0]))

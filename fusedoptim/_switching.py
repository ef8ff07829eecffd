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
from ._storage import MASTERS, PARAM, stored


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

    Raises:
        ValueError: for a state that is not like its parameter. Nothing is written then.
    """
    optimizer._check_not_evaluating(call)
    members = [(p, group, weight) for group, weight in groups for p in group["params"]]
    members = [member for member in members if _has(optimizer.state.get(member[0], {}), name)]
    resharding = Resharding(model, [p for p, _, _ in members], call)
    _lending.take_over(optimizer._lent, optimizer.state)
    try:
        bound = [(_bound(optimizer, p, group, name, call), weight) for p, group, weight in members]
        for m, weight in bound:
            value = load(m, PARAM, m.param, m.states).lerp_(load(m, name, m.states.get(name), m.states), weight)
            store(m, PARAM, m.param, value, m.states, {})
    finally:
        resharding.again()


def _bound(optimizer: Moving, p: Tensor, group: dict[str, Any], name: str, call: str) -> BoundParam:
    states = optimizer.state[p]
    how = stored(group, optimizer.rule, p, states)
    found = {s: states.get(s) for s in (name, names_in_blocks(name)[0], *MASTERS.values())}
    for key, state in found.items():
        if isinstance(state, Tensor) and (state.shape != p.shape or state.device != p.device):
            raise ValueError(
                f"{call}(): the state {key!r} has shape {tuple(state.shape)} on {state.device}, its parameter "
                f"{tuple(p.shape)} on {p.device}: load a state_dict of this model; nothing was written"
            )
    nearest = tuple(s for s in how if s.name != PARAM or not s.is_stochastic)
    return BoundParam(0, 0, p, states, False, nearest, NOWHERE)


def _has(states: Mapping[str, Any], name: str) -> bool:
    return any(states.get(x) is not None for x in (name, names_in_blocks(name)[0]))

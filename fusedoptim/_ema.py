"""The moving averages of the parameters: how one starts, which there are, and how they take the parameters' place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._dtypes import compute_dtype
from ._rule import EMA, Group, Rule


def new_average(p: Tensor) -> Tensor:
    """A moving average starts as its parameter."""
    return p.detach().to(compute_dtype(p), copy=True, memory_format=torch.preserve_format)


def is_early(rule: Rule, states: Mapping[str, Any] | None) -> bool:
    """Whether there is an average that was made with the optimizer, of a parameter that was not stepped since."""
    if not rule.states_at_construction or not states or states.get(EMA) is None:
        return False
    step = states.get("step")
    # One that was moved to a device has counted a step there; nothing waits to hear how many.
    return isinstance(step, Tensor) and step.device.type == "cpu" and bool(step.item() == 0)


def averages(groups: Iterable[Group], state: Mapping[Any, Any], rule: Rule) -> dict[Tensor, Tensor]:
    """By parameter, its moving average, in the groups that keep one: of those that were stepped so far."""
    found = {}
    for group in groups:
        for p in group["params"] if group.get("ema_decay") is not None else ():
            values = state.get(p, {})
            if values.get(EMA) is not None and not is_early(rule, values):
                found[p] = values[EMA]
    return found


@contextmanager
def in_place(of_params: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within it the parameters have the averages' values, rounded to their dtype. Values are copied, so that addresses
    stay; it takes memory for a copy of the parameters."""
    params = list(of_params)
    with torch.no_grad():
        own = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            torch._foreach_copy_(params, list(of_params.values()))
        yield
    finally:
        with torch.no_grad():
            try:
                torch._foreach_copy_(params, own)
            except RuntimeError:  # of one that was resized meanwhile: the others are to be restored
                for p, value in zip(params, own, strict=True):
                    if p.shape == value.shape:
                        p.copy_(value)
                raise

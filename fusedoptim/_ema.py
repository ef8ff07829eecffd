"""The moving averages of the parameters: how one starts, which there are, and how they take the parameters' place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ._dtensor import alike, is_dtensor, local
from ._dtypes import compute_dtype
from ._resharding import Resharding
from ._rule import EMA, Group, Rule


def new_average(p: Tensor) -> Tensor:
    """A moving average starts as its parameter."""
    if is_dtensor(p):
        return alike(p, new_average(local(p)))  # type: ignore[no-any-return]
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
def in_place(of_params: Mapping[Tensor, Tensor], model: nn.Module | None) -> Iterator[None]:
    """Within it the parameters have the averages' values, rounded to their dtype. Values are copied, so that addresses
    stay; it takes memory for a copy of the parameters. A model of FSDP2 is resharded whenever they change."""
    params = list(of_params)
    resharding = Resharding(model, params)
    own = [local(p).detach().clone() for p in params]
    try:
        _write(params, [local(average) for average in of_params.values()])
        yield
    finally:
        try:
            _write(params, own)
        finally:
            resharding.again()


@torch.no_grad()
def _write(params: list[Tensor], values: list[Tensor]) -> None:
    """Copies to the shards, and counts it as a write to the parameters, as autograd would."""
    shards = [local(p) for p in params]
    increment_version([p for p, shard in zip(params, shards, strict=True) if p is not shard])
    try:
        torch._foreach_copy_(shards, values)
    except RuntimeError:  # of one that was resized meanwhile: the others are to be written
        for shard, value in zip(shards, values, strict=True):
            if shard.shape == value.shape:
                shard.copy_(value)
        raise

"""The optimizers that train the mixture: AdamW, with gradients clipped as their users do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusedoptim

from .. import witness

MAX_GRAD_NORM = 1.0
OPTIONS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
OURS, LOOP, FOREACH, FUSED = "fusedoptim", "torch for-loop", "torch foreach", "torch fused"
WITNESS = "torch for-loop, exact root"

#: Clips and steps.
Step = Callable[[], object]
Make = Callable[[list[nn.Parameter]], tuple[torch.optim.Optimizer, Step]]


def _ours(params: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Step]:
    """Clips within the step."""
    optimizer = fusedoptim.AdamW(params, **OPTIONS, max_grad_norm=MAX_GRAD_NORM)
    return optimizer, optimizer.step


def _torch(
    clip: Callable[..., object] = nn.utils.clip_grad_norm_,
    step: Callable[[torch.optim.Optimizer], object] = lambda optimizer: optimizer.step(),
    **how: bool,
) -> Make:
    def make(params: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Step]:
        optimizer = torch.optim.AdamW(params, **OPTIONS, **how)

        def both() -> None:
            clip(params, MAX_GRAD_NORM)
            step(optimizer)

        return optimizer, both

    return make


#: The witness is there for its bits (see witness.py), with fusedoptim's norm: torch's is a sum in another order.
CONTENDERS: dict[str, Make] = {
    OURS: _ours,
    LOOP: _torch(foreach=False),
    FOREACH: _torch(foreach=True),
    FUSED: _torch(fused=True),
    WITNESS: _torch(fusedoptim.clip_grad_norm_, witness.witness_step, foreach=False),
}
#: Those that take every step. The others' take seconds each: they take a few at the start and a few at the end, from
#: fusedoptim's numbers. No two take the same: the second one would find the first one's lists in DTensor's cache.
ALWAYS = (OURS, WITNESS)

"""The optimizers that agents learn with. All clip the norm of the gradients, as their users do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusedoptim

from .. import witness
from .agent import Make, Settings, Step

INSIDE, OURS, TORCH, WITNESS = (
    "fusedoptim, eps inside the root",
    "fusedoptim",
    "torch foreach",
    "torch for-loop, exact root",
)


def _options(settings: Settings) -> dict[str, Any]:
    return {"lr": settings.lr, "alpha": settings.alpha, "eps": settings.eps}


def _ours(inside: bool) -> Make:
    """Clips within the step."""

    def make(params: list[nn.Parameter], settings: Settings) -> tuple[torch.optim.Optimizer, Step]:
        optimizer = fusedoptim.RMSprop(
            params, **_options(settings), eps_inside_root=inside, max_grad_norm=settings.max_grad_norm
        )
        return optimizer, optimizer.step

    return make


def _torch(foreach: bool, clip: Callable[..., object], step: Callable[[torch.optim.Optimizer], object]) -> Make:
    def make(params: list[nn.Parameter], settings: Settings) -> tuple[torch.optim.Optimizer, Step]:
        optimizer = torch.optim.RMSprop(params, **_options(settings), foreach=foreach)

        def both() -> None:
            clip(params, settings.max_grad_norm)
            step(optimizer)

        return optimizer, both

    return make


#: torch's foreach code makes fewer calls from Python than its default on a CPU, the for-loop. The witness is there for
#: its bits (see witness.py), with fusedoptim's norm: torch's is a sum in another order.
CONTENDERS: dict[str, Make] = {
    INSIDE: _ours(inside=True),
    OURS: _ours(inside=False),
    TORCH: _torch(True, nn.utils.clip_grad_norm_, lambda optimizer: optimizer.step()),
    WITNESS: _torch(False, fusedoptim.clip_grad_norm_, witness.witness_step),
}

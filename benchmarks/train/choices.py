"""The optimizers that can be trained with, their settings for the small GPT, and torch's counterparts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

import fusedoptim
from fusedoptim._dtensor import is_dtensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: name: (learning rate, other options)
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "Adam": (2e-3, {}),
    "AdamW": (2e-3, {"weight_decay": 0.1}),
    "SGD": (0.3, {"momentum": 0.9}),
    "RMSprop": (1e-3, {}),
    "Adagrad": (2e-2, {}),
    "NormAdaptive": (0.05, {}),
}


def make(
    name: str, params: Iterable[torch.nn.Parameter], lr: float, **options: Unpack[fusedoptim.StepOptions]
) -> fusedoptim.FusedOptimizer:
    return getattr(fusedoptim, name)(params, lr=lr, **SETTINGS[name][1], **options)


def make_witness(name: str, params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch's for-loop code, to be stepped with an IEEE root (see witness.py); NormAdaptive: the eager reference."""
    options = SETTINGS[name][1]
    if name == "NormAdaptive":
        return fusedoptim.NormAdaptive(params, lr=lr, backend="reference", **options)
    return getattr(torch.optim, name)(params, lr=lr, foreach=False, **options)


def make_fastest(name: str, params: Iterable[torch.nn.Parameter], lr: float) -> tuple[str, torch.optim.Optimizer]:
    """What it is, and the fastest that torch has."""
    options, params = SETTINGS[name][1], list(params)
    if name == "NormAdaptive":
        return "eager reference", fusedoptim.NormAdaptive(params, lr=lr, backend="reference", **options)
    # torch fuses no RMSprop, and over DTensors Adam and AdamW only.
    fuses = ("Adam", "AdamW") if any(map(is_dtensor, params)) else ("Adam", "AdamW", "SGD", "Adagrad")
    kind = "fused" if name in fuses else "foreach"
    return f"torch {kind}", getattr(torch.optim, name)(params, lr=lr, **{kind: True}, **options)

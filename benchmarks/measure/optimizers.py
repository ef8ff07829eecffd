"""What is measured: optimizers and dtypes, and the bytes that a step of theirs has to move."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedoptim

from ..common.arguments import UsageError, known


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of parameters and gradients, and of the states that have the parameter's shape.

    ``options`` are fusedoptim's own, where there are such; ``beside`` is what it then keeps beside a parameter.
    """

    name: str
    param: torch.dtype
    state: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    beside: torch.dtype | None = None

    @property
    def mixed(self) -> bool:
        return self.param != self.state

    @property
    def state_bytes(self) -> float:
        """Of an element. One of 8 bits has a share of its block's scale."""
        return self.state.itemsize + (4 / 128 if self.state == torch.int8 else 0)


@dataclass(frozen=True)
class Setting:
    """An optimizer with the options, in torch.optim's names, that it is measured with. Steps are long enough to move
    bf16 parameters, and all that a peer calls by another default is spelled out."""

    #: fusedoptim's, or another's as ``module:Class``; behind a plus what it does beside.
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Gradients are clipped to this norm before the update, or with it.
    max_grad_norm: float | None = None

    @property
    def optimizer(self) -> str:
        """The name of its class."""
        return self.name.partition("+")[0]

    @property
    def cls(self) -> type[fusedoptim.FusedOptimizer]:
        module, _, name = self.optimizer.rpartition(":")
        found: type[fusedoptim.FusedOptimizer] = getattr(importlib.import_module(module or "fusedoptim"), name)
        return found

    @property
    def states(self) -> int:
        """How many states have the parameter's shape."""
        optimizer = self.make([torch.nn.Parameter(torch.zeros(1))])
        return sum(slot.needed_in(optimizer.param_groups[0]) for slot in optimizer.rule.states)

    def make(self, params: Any, **more: Any) -> fusedoptim.FusedOptimizer:
        """fusedoptim's."""
        return self.cls(params, **{"max_grad_norm": self.max_grad_norm, **self.options, **more})


_MOMENTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
SETTINGS = {
    s.name: s
    for s in (
        Setting("AdamW", {**_MOMENTS, "weight_decay": 0.01}),
        Setting("Adam", {**_MOMENTS, "weight_decay": 0.0}),
        Setting("SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}),
        Setting("RMSprop", {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0}),
        Setting("Adagrad", {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0}),
        # A step has the norm lr, however many elements share it.
        Setting("NormAdaptive", {"lr": 1.0}),
        Setting("AdamW+clip", {**_MOMENTS, "weight_decay": 0.01}, max_grad_norm=1.0),
    )
}
#: Measured where they are asked for.
GALLERY = {
    s.name: s
    for s in (
        Setting("Adadelta", {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}),
        Setting("Adamax", {**_MOMENTS, "weight_decay": 0.0}),
        Setting("ASGD", {"lr": 1e-2, "weight_decay": 0.0}),
        Setting("NAdam", {**_MOMENTS, "weight_decay": 0.0}),
        Setting("RAdam", {**_MOMENTS, "weight_decay": 0.0}),
        Setting("Rprop", {"lr": 1e-2}),
        Setting("Lion", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}),
        Setting("LAMB", {"lr": 1e-2, "weight_decay": 0.01}),
        Setting("LARS", {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coeff": 0.01}),
        Setting("AdEMAMix", {"lr": 1e-3, "weight_decay": 0.01}),
        Setting("ADOPT", {"lr": 1e-3}),
        Setting("AdamWScheduleFree", {"lr": 1e-3, "weight_decay": 0.01}),
        Setting("CautiousAdamW", {**_MOMENTS, "weight_decay": 0.01}),
    )
}


def setting(name: str) -> Setting:
    """Also of a ``module:Class``, which is measured with its defaults."""
    return {**SETTINGS, **GALLERY}.get(name) or Setting(name)


def chosen_settings(asked: Iterable[str] | None) -> list[str]:
    """The names that were asked for, else those that are always measured. Raises UsageError for others."""
    if not asked:
        return list(SETTINGS)
    found = []
    for name in asked:
        if ":" not in name:
            found += known("--optimizer", [name], [*SETTINGS, *GALLERY])
            continue
        try:
            cls = Setting(name).cls
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--optimizer {name!r} cannot be imported: {error}") from None
        if not (isinstance(cls, type) and issubclass(cls, fusedoptim.FusedOptimizer)):
            raise UsageError(f"--optimizer {name!r} is no class of fusedoptim.FusedOptimizer")
        found.append(name)
    return found


DTYPES = {
    d.name: d
    for d in (
        Dtypes("fp32", torch.float32, torch.float32),
        Dtypes("bf16", torch.bfloat16, torch.bfloat16),
        Dtypes("bf16+fp32", torch.bfloat16, torch.float32),
        # First moments to nearest, second ones stochastically.
        Dtypes("stochastic", torch.bfloat16, torch.bfloat16, {"rounding": {"param": "stochastic"}}),
        Dtypes("remainder", torch.bfloat16, torch.bfloat16, {"master": "remainder"}, torch.bfloat16),
        Dtypes(
            "remainder+int8",
            torch.bfloat16,
            torch.int8,
            {"master": "remainder", "state_dtype": "int8"},
            torch.bfloat16,
        ),
    )
}


@dataclass(frozen=True)
class Work:
    """An optimizer in certain dtypes."""

    setting: Setting
    dtypes: Dtypes

    @property
    def written(self) -> list[torch.dtype]:
        """What a step reads and writes back, an entry per array: the parameter, what is beside it, and its states."""
        beside = [] if self.dtypes.beside is None else [self.dtypes.beside]
        return [self.dtypes.param, *beside] + [self.dtypes.state] * self.setting.states

    @property
    def bytes_per_element(self) -> float:
        """What every implementation has to move: gradient, parameter and states are read once, the last two written
        once. NormAdaptive, and clipping by the norm of all gradients, need the whole norm before the first write, and
        so read gradients that exceed the caches twice; the second time is not counted, so that no share of a limit is
        flattered."""
        return self.dtypes.param.itemsize + 2 * self.resident_per_element

    @property
    def resident_per_element(self) -> float:
        """Bytes of parameter and states, without the gradient."""
        beside = 0 if self.dtypes.beside is None else self.dtypes.beside.itemsize
        return self.dtypes.param.itemsize + beside + self.dtypes.state_bytes * self.setting.states

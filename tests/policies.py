"""What tests of states that are stored in few bits share."""

from __future__ import annotations

import io
from typing import Any

import torch
from cases import Case, parameters, set_gradients
from checkpoints import BF16, F32
from torch import Tensor

from fusedoptim import reference

#: Two of them can be in blocks; the last has rows that are no whole blocks.
SHAPES = [(5,), (64, 128), (), (0, 70), (30, 200)]
IN_BLOCKS = [1, 4]
SMALLEST: dict[str, Any] = {"master": "remainder8", "state_dtype": "int8"}
MIXED: dict[str, Any] = {"master": "remainder", "state_dtype": BF16}
ROUNDED: dict[str, Any] = {"rounding": "stochastic", "state_dtype": "int8", "rounding_seed": 7}
POLICIES = {"smallest": SMALLEST, "mixed": MIXED, "rounded": ROUNDED}
ADAMW = Case("adamw", "AdamW")
SGD = Case("sgd", "SGD", {"momentum": 0.9, "lr": 0.01})
CASES = [
    ADAMW,
    SGD,
    Case("rmsprop", "RMSprop", {"momentum": 0.5, "lr": 1e-3}),
    Case("adagrad", "Adagrad", {"initial_accumulator_value": 0.5}),
]
MASTERS: list[Any] = ["remainder", "remainder8", F32]
STATES: dict[Any, str] = {"remainder": "param_remainder", "remainder8": "param_remainder8", F32: "param_master"}


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def go(optimizer: Any, first: int, last: int) -> None:
    """Takes some steps, each with the gradients of its number."""
    for step in range(first, last):
        set_gradients(params_of(optimizer), step)
        optimizer.step()


def trained(case: Case = ADAMW, dtype: torch.dtype = BF16, steps: int = 3, **options: Any) -> Any:
    optimizer = case.make(parameters(SHAPES, dtype), **options)
    go(optimizer, 0, steps)
    return optimizer


def with_master(master: Any, steps: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    optimizer = trained(steps=steps, master=master, state_dtype=F32, **options)
    return optimizer, params_of(optimizer)


def copies(optimizer: Any, dtype: torch.dtype | None = None) -> list[Any]:
    """Of its parameters."""
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params_of(optimizer)]


def beside(optimizer: Any, case: Case = ADAMW, **options: Any) -> Any:
    """Another one, of a model with the same weights."""
    return case.make(copies(optimizer), **options)


def moved(optimizer: Any) -> dict[str, Any]:
    """A state_dict as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def storage_of(master: Any, dtype: torch.dtype = BF16) -> str:
    return ("bf16_" if dtype == BF16 else "f16_") + ("master" if master == F32 else master)


def numbers(optimizer: Any) -> list[Tensor]:
    """What the parameters stand for, by their master."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            extra = optimizer.state[p][STATES[group["master"]]]
            found.append(reference.decode(storage_of(group["master"], p.dtype), p.detach(), extra))
    return found


def slots(optimizer: Any) -> list[str]:
    """The states that its groups need, by the rule's names."""
    return [slot.name for slot in optimizer.rule.states if slot.needed_in(optimizer.param_groups[0])]


def storage_in_blocks(optimizer: Any, name: str) -> str:
    kind = next(slot.kind for slot in optimizer.rule.states if slot.name == name)
    return "q8_squares" if kind == "squares" else "q8"


def decoded(optimizer: Any, p: Tensor, name: str) -> Tensor:
    """A state's numbers."""
    values = optimizer.state[p]
    if name in values:
        return values[name].float()
    return reference.decode(storage_in_blocks(optimizer, name), values[f"{name}_q8"], values[f"{name}_scale"])

"""Groups that need different programs, side by side in one kernel of Triton's. A test module that imports this one's
names defines the fixture ``kernels`` (see device_tests.py)."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import ALL, BY_NAME, assert_same_optimizers, parameters, set_gradients

from fusedoptim import FusedOptimizer
from fusedoptim.own_rules import runner

#: Every condition that the rules of the package have on a group's values, with both of its sides.
CONDITIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adam": {
        "weight_decay": (0.0, 0.1),
        "decoupled_weight_decay": (False, True),
        "amsgrad": (False, True),
        "maximize": (False, True),
        "bias_correction": (False, True),
    },
    "sgd": {
        "weight_decay": (0.0, 0.1),
        "momentum": (0.0, 0.9),
        "nesterov": (False, True),
        "maximize": (False, True),
    },
    "rmsprop": {
        "weight_decay": (0.0, 0.1),
        "momentum": (0.0, 0.9),
        "centered": (False, True),
        "maximize": (False, True),
        "eps_inside_root": (False, True),
    },
    "adagrad": {"weight_decay": (0.0, 0.1), "maximize": (False, True)},
    "norm_adaptive": {"weight_decay": (0.0, 0.1), "maximize": (False, True)},
}


def groups_of(conditions: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """One for every combination, with a learning rate that is a number and one that is a tensor."""
    values = (dict(zip(conditions, sides, strict=True)) for sides in product(*conditions.values()))
    possible = [v for v in values if not v.get("nesterov") or v["momentum"]]
    return [{**v, "lr": lr} for v in possible for lr in (0.01, torch.tensor(0.01))]


@pytest.mark.parametrize("around", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("name", CONDITIONS)
def test_all_combinations_of_a_rules_conditions_in_one_launch(kernels: Any, name: str, around: dict[str, Any]) -> None:
    """And no more programs than a plan takes."""
    combinations = groups_of(CONDITIONS[name])
    found: list[FusedOptimizer] = []
    for backend in (kernels.backend, "cpu"):
        params = parameters([(7,)] * len(combinations))
        groups = [{"params": [p], **values} for p, values in zip(params, combinations, strict=True)]
        optimizer = BY_NAME[name].make(groups, backend=backend, **around)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        found.append(optimizer)
    assert_same_optimizers(*found)
    (made,) = found[0]._runners or ()
    assert isinstance(made, runner.TritonRunner)
    set_gradients(found[0].param_groups[0]["params"], 2)
    assert kernels.launches(found[0]) == 1 + ("max_grad_norm" in around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_condition_that_changes_between_steps(kernels: Any, dtype: torch.dtype) -> None:
    """The next step has another program, and the states stay."""
    found = []
    for backend in (kernels.backend, "cpu"):
        params = parameters([(5,), (7, 11)], dtype)
        optimizer = BY_NAME["adamw"].make([{"params": [p]} for p in params], backend=backend)
        for step, values in enumerate(({}, {"weight_decay": 0.0}, {"maximize": True}, {"lr": torch.tensor(0.1)})):
            optimizer.param_groups[1].update(values)
            set_gradients(params, step)
            optimizer.step()
        found.append(optimizer)
    assert_same_optimizers(*found)

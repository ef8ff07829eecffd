"""What tests of checkpoints share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import FULL, Case, parameters, set_gradients

WITH_SLOTS = [case for case in FULL if case.cls.rule.states]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def stepped(case: Case, dtype: torch.dtype = F32, steps: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    params = parameters([(5,), (6,)], dtype)
    optimizer = case.make(params, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return optimizer, params


def slots(optimizer: Any) -> set[str]:
    return {slot.name for slot in optimizer.rule.states}


def cast(content: dict[str, Any], names: set[str], dtype: torch.dtype) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for values in content["state"].values():
        for name in names & values.keys():
            values[name] = values[name].to(dtype)
    return content


@contextmanager
def one_warning(expected: str | None) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == (expected is not None), [str(w.message) for w in caught]
    if expected is not None:
        assert expected in str(caught[0].message)
        assert Path(caught[0].filename).name.startswith("test_")  # the line that loads, and none of the package

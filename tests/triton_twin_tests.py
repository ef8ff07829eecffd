"""What is printed of the functions that specify the package's own rules has the bits of the kernels written for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALL, CASES, LOW, Case, assert_same_optimizers, gradient, parameters

from fusedoptim import _prepare

SHAPES = [(5,), (7, 11), (1025,), (17, 128)]
WRITTEN = [case for case in [*CASES, *LOW] if not case.own]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Triton steps every rule with what is printed of its function; the runners that do."""
    from fusedoptim.own_rules.runner import OwnTritonRunner

    found: list[Any] = []
    make = _prepare.make_runner

    def make_runner(backend: str, rule: Any, device: torch.device, settings: Any) -> Any:
        if backend != "triton":
            return make(backend, rule, device, settings)
        found.append(OwnTritonRunner(rule, settings, device))
        return found[-1]

    monkeypatch.setattr(_prepare, "make_runner", make_runner)
    return found


@pytest.mark.parametrize("around", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_twins_have_the_same_bits(kernels: Any, case: Case, around: dict[str, Any], printed: list[Any]) -> None:
    """In fp32 and bf16, with a group whose learning rate is a tensor."""
    found = []
    for backend in (kernels.backend, "cpu"):
        params = parameters(SHAPES) + parameters(SHAPES, torch.bfloat16)
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": torch.tensor(0.01)}]
        optimizer = case.make(groups, backend=backend, **around)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            optimizer.step()
        found.append(optimizer)
    assert_same_optimizers(*found)
    assert printed

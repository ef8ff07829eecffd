"""fusedoptim/guides/limits.md: what it says of optimizers and of refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedoptim
from fusedoptim import AdamW
from fusedoptim._dtypes import DTYPES

GUIDE = (Path(__file__).parent.parent / "fusedoptim" / "guides" / "limits.md").read_text()


def test_every_optimizer_of_torch_is_here_or_named() -> None:
    of_torch = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    absent = of_torch - set(fusedoptim.__all__)
    assert {"LBFGS", "SparseAdam"} <= absent
    assert {name for name in absent if f"torch.optim.{name}" not in GUIDE} == set()


def test_dtypes() -> None:
    assert set(DTYPES) == {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def a(dtype: torch.dtype = torch.float32, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape or (4,)).to(dtype), requires_grad=dtype.is_floating_point)


def step(p: torch.nn.Parameter, grad: Any, **options: Any) -> None:
    optimizer = AdamW([p], **options)
    p.grad = grad
    optimizer.step()


def shared() -> None:
    p = a()
    q = torch.nn.Parameter(p.detach()[:2])
    optimizer = AdamW([p, q])
    p.grad, q.grad = torch.ones(4), torch.ones(2)
    optimizer.step()


def released(**options: Any) -> None:
    with fusedoptim.step_in_backward(AdamW([a()], **options)):
        pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: step(a(torch.float32, 3, 3), torch.eye(3).to_sparse()), "SparseAdam"),
        (lambda: AdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))]), "view_as_real"),
        (lambda: AdamW([a(torch.float8_e4m3fn)]), "unsupported dtype"),
        (lambda: AdamW([a()], differentiable=True), "no backward pass"),
        (lambda: AdamW([a()], foreach=True), "fused already"),
        (lambda: AdamW([a()], state_dtype=torch.float16), "Invalid state_dtype"),
        (lambda: AdamW([a()], state_dtype="int4"), "Invalid state_dtype"),
        (lambda: step(a(torch.float16), torch.ones(4).half(), master="remainder"), "upper part"),
        (lambda: step(a(torch.float16), torch.ones(4).half(), rounding={"param": "stochastic"}), "stochastic"),
        (shared, "shares memory"),
        (lambda: released(max_grad_norm=1.0), "max_grad_norm"),
        (lambda: released(skip_nonfinite=True), "skip_nonfinite"),
    ],
)
def test_what_raises_an_error(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()

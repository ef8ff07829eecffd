"""Every compiled program is run against the rule's own function, once, on small random tensors, before it steps any
parameter."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .._rule import GROUP_OPTIONS, Group, Rule
from .trace import Program

_checked: dict[tuple[Program, torch.dtype, str], bool] = {}
_busy = threading.local()
SHAPES, STEPS = ((3, 7), (64,), (1,)), 3


def gives_the_functions_bits(program: Program, group: Group, dtype: torch.dtype, backend: str) -> bool:
    """Whether a backend's kernels and the rule's function have the same results.

    Args:
        group: one that the program is for.
        dtype: in which it computes.
    """
    if getattr(_busy, "checking", False):
        return True
    key = (program, dtype, backend)
    if key not in _checked:
        _busy.checking = True
        try:
            _checked[key] = _check(program.rule, group, dtype, backend)
        finally:
            _busy.checking = False
    return _checked[key]


def _check(rule: Rule, group: Group, dtype: torch.dtype, backend: str) -> bool:
    values = {key: value for key, value in group.items() if key not in ("params", "param_names", *GROUP_OPTIONS)}
    if isinstance(values["lr"], Tensor):
        values["lr"] = values["lr"].detach().cpu().clone()
    runs = [_run(rule, values, dtype, b) for b in (backend, "reference")]
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*runs, strict=True)
    )


def _run(rule: Rule, values: dict[str, Any], dtype: torch.dtype, backend: str) -> list[Tensor]:
    from .._base import FusedOptimizer

    # A module of its own: optimizers of the package say whose a checkpoint is.
    cls: Any = type("Check", (FusedOptimizer,), {"rule": rule, "__module__": "check"})
    g = torch.Generator("cpu").manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype, device="cpu")) for s in SHAPES]
    optimizer = cls(params, dict(values), {"backend": backend})
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=dtype, device="cpu")
        optimizer.step()
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]

"""Every compiled program is run against the rule's own function, once, on small random tensors, before it steps any
parameter."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .._rule import GROUP_OPTIONS, STORAGE, Group, Rule
from .programs import program_of
from .trace import Program

_checked: dict[tuple[Program, torch.dtype, str, str, torch.device], bool] = {}
_busy = threading.local()
SHAPES, STEPS = ((3, 7), (64,), (1,)), 3


def gives_the_functions_bits(rule: Rule, group: Group, dtype: torch.dtype, backend: str, device: torch.device) -> bool:
    """Whether a backend's kernels and the rule's function have the same results. On a GPU numbers in fp64 may differ in
    their last place, and what is computed in it is not checked.

    Args:
        group: with checked values.
        dtype: of parameters and gradients.
    """
    if getattr(_busy, "checking", False) or (dtype == torch.float64 and device.type != "cpu"):
        return True
    stored = repr([group.get(key) for key in STORAGE])
    key = (program_of(rule, group), dtype, stored, backend, device)
    if key not in _checked:
        _busy.checking = True
        try:
            _checked[key] = _check(rule, group, dtype, backend, device)
        finally:
            _busy.checking = False
    return _checked[key]


def _check(rule: Rule, group: Group, dtype: torch.dtype, backend: str, device: torch.device) -> bool:
    left_out = {"params", "param_names", *GROUP_OPTIONS} - STORAGE.keys()
    values = {key: value for key, value in group.items() if key not in left_out}
    if isinstance(values["lr"], Tensor):
        values["lr"] = values["lr"].detach().cpu().clone()
    options = {key: values.pop(key) for key in STORAGE if key in values}
    runs = [
        _run(rule, values, options, dtype, b, d) for b, d in ((backend, device), ("reference", torch.device("cpu")))
    ]
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*runs, strict=True)
    )


def _run(
    rule: Rule, values: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, backend: str, device: torch.device
) -> list[Tensor]:
    from .._base import FusedOptimizer

    # A module of its own: optimizers of the package say whose a checkpoint is.
    cls: Any = type("Check", (FusedOptimizer,), {"rule": rule, "__module__": "check"})
    g = torch.Generator("cpu").manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype, device="cpu").to(device)

    params = [torch.nn.Parameter(random(shape)) for shape in SHAPES]
    optimizer = cls(params, dict(values), {**options, "backend": backend})
    for _ in range(STEPS):
        for p in params:
            p.grad = random(tuple(p.shape))
        optimizer.step()
    return [t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())]

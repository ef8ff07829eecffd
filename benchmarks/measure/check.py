"""Whether a contender did the work that it is measured for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .data import Params, sample
from .optimizers import Work

#: Norm of a peer's distance from fusedoptim's parameters, as a share of how far these have moved in the warm-up. 16-bit
#: peers round every operation, fp32 peers compute the same up to rounding.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1}


def difference(mine: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> float:
    a, b, c = (torch.cat(parts) for parts in (mine, theirs, start))
    return float((b - a).norm() / (a - c).norm())


def complaint(
    work: Work, params: Params, optimizer: Any, start: list[Tensor], mine: list[Tensor], same_formula: bool
) -> str | None:
    """What is wrong with a contender that has made the warm-up steps: tensors that did not move or are not finite,
    states in other dtypes, results unlike fusedoptim's."""
    now = sample(params)
    if not all(part.isfinite().all() for part in now):
        return "parameters are not finite after the warm-up"
    still = sum(torch.equal(a, b) for a, b in zip(now, start, strict=True))
    if still:
        return f"{still} of {len(params)} tensors did not move in the warm-up"
    wrong = sorted({str(d).removeprefix("torch.") for d in _state_dtypes(params, optimizer)} - _expected(work))
    if wrong:
        return f"keeps states in {', '.join(wrong)} instead of {', '.join(sorted(_expected(work)))}"
    distance = difference(mine, now, start)
    if same_formula and not distance <= TOLERANCE[work.dtypes.param]:
        return f"differs from fusedoptim by {distance:.2g} of the update"
    return None


def _expected(work: Work) -> set[str]:
    dtypes = [d for d in (work.dtypes.state, work.dtypes.beside) if d is not None and d.is_floating_point]
    return {str(d).removeprefix("torch.") for d in dtypes} if work.setting.states else set()


def _state_dtypes(params: Params, optimizer: Any) -> set[torch.dtype]:
    """Of states with a parameter's shape, wherever the peer keeps them per parameter."""
    found = set()
    for p in params:
        values = optimizer.state[p].values() if p in optimizer.state else ()
        found |= {
            v.dtype
            for v in values
            if isinstance(v, Tensor) and v.shape == p.shape and v.is_floating_point() and v.dim()
        }
    return found

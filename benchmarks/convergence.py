"""``python -m benchmarks.convergence``: min ||Ax - b||^2 (10 x 5, fp64, seeded) with every optimizer, beside torch's
(NormAdaptive, which torch lacks: beside its eager reference).

Each runs for 8000 steps with a learning rate that falls as a cosine to zero, and has converged when its loss is within
one part in 10^6 of the optimum. Exits with 1 if one has not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

import fusedoptim

STEPS, TOLERANCE = 8_000, 1e-6
RUNS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02, "weight_decay": 0.0},  # decay moves the optimum
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.02},
    "Adagrad": {"lr": 0.5},
    "NormAdaptive": {"lr": 0.02},
}


def solve(make: Callable[..., torch.optim.Optimizer], a: torch.Tensor, b: torch.Tensor, **options: Any) -> float:
    """The loss after all steps, from zero."""
    x = torch.nn.Parameter(torch.zeros(a.shape[1], dtype=a.dtype))
    optimizer = make([x], **options)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = options["lr"] * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        x.grad = 2 * a.T @ (a @ x.detach() - b)
        optimizer.step()
    return float((a @ x.detach() - b).square().sum())


def main() -> int:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(10, 5, generator=g, dtype=torch.float64)
    b = torch.randn(10, generator=g, dtype=torch.float64)
    x = torch.linalg.lstsq(a, b.unsqueeze(1)).solution
    optimum = float((a @ x - b.unsqueeze(1)).square().sum())
    print(f"min ||Ax - b||^2, A 10 x 5: optimum {optimum:.10f}")
    print(f"{'optimizer':<14}{'loss':>14}{'gap':>11}{'torch loss':>16}{'gap':>11}  converged")
    converged = True
    for name, options in RUNS.items():
        loss = solve(getattr(fusedoptim, name), a, b, **options)
        peer = getattr(torch.optim, name, None)
        if peer is None:
            options = {**options, "backend": "reference"}
            peer = getattr(fusedoptim, name)
        other = solve(peer, a, b, **options)
        good = loss - optimum <= TOLERANCE * optimum
        converged = converged and good
        gap, other_gap = (loss - optimum) / optimum, (other - optimum) / optimum
        print(f"{name:<14}{loss:>14.10f}{gap:>11.1e}{other:>16.10f}{other_gap:>11.1e}  {'yes' if good else 'NO'}")
    print(f"gap: (loss - optimum) / optimum, converged up to {TOLERANCE:g}")
    print("torch has no NormAdaptive: beside it stands its eager reference")
    return 0 if converged else 1


if __name__ == "__main__":
    sys.exit(main())

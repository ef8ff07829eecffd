"""``python -m benchmarks.second_moments``: what becomes of AdamW's ``exp_avg_sq`` in fewer bits.

10,000 steps of gradients from N(0, 1): the mean of all elements, over that in fp32. Then the gradients of three
elements in eight drop to a tenth for 5,000 steps: the mean of these elements, over that in fp32. 1.00 is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedoptim
from fusedoptim import reference

from .common import arguments
from .measure.devices import DEVICES
from .measure.environment import environment, source
from .measure.results import Result, Results
from .tables import flat

BETAS = (0.95, 0.99, 0.998, 0.999, 0.9999)
SHAPE, STEPS, STEPS_AFTER_DROP = (32, 128), 10_000, 5_000
#: Those whose gradients drop.
PART = torch.arange(32 * 128).view(SHAPE) % 8 < 3
FP32 = "fp32"
#: How ``exp_avg_sq`` is kept: what a group says.
KEPT: dict[str, dict[str, Any]] = {
    FP32: {"state_dtype": torch.float32},
    "bf16 to nearest": {"state_dtype": torch.bfloat16, "rounding": "nearest"},
    "bf16": {"state_dtype": torch.bfloat16},
    "8 bits to nearest": {"state_dtype": "int8", "rounding": "nearest"},
    "8 bits": {"state_dtype": "int8"},
}


def second_moment(states: dict[str, Any]) -> Tensor:
    if "exp_avg_sq_q8" in states:
        return reference.decode("q8_squares", states["exp_avg_sq_q8"], states["exp_avg_sq_scale"])
    return states["exp_avg_sq"].float()


def measure(steps: int, steps_after_drop: int) -> list[Result]:
    """A group for each of betas and storages. All have the same gradients; their random bits are their own."""
    keys = [(beta, kept) for beta in BETAS for kept in KEPT]
    params = [nn.Parameter(torch.zeros(SHAPE)) for _ in keys]
    groups = [{"params": [p], "betas": (0.9, beta), **KEPT[kept]} for p, (beta, kept) in zip(params, keys, strict=True)]
    optimizer = fusedoptim.AdamW(groups, lr=0.0)
    g = torch.Generator().manual_seed(0)
    gradient = torch.empty(SHAPE)
    for p in params:
        p.grad = gradient
    scale = torch.ones(SHAPE)

    def go(count: int, of: Tensor) -> dict[tuple[float, str], float]:
        for _ in range(count):
            gradient.normal_(generator=g).mul_(scale)
            optimizer.step()
        found = [second_moment(optimizer.state[p])[of].double().mean().item() for p in params]
        return dict(zip(keys, found, strict=True))

    means = {f"after {steps:,} steps": go(steps, torch.ones(SHAPE, dtype=torch.bool))}
    scale[PART] = 0.1
    means[f"{steps_after_drop:,} steps after a drop"] = go(steps_after_drop, PART)
    return [
        {"beta2": f"{beta:g}", "mean over fp32's": when}
        | {kept: f"{of[beta, kept] / of[beta, FP32]:.2f}" for kept in KEPT if kept != FP32}
        for when, of in means.items()
        for beta in BETAS
    ]


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.second_moments", description=__doc__)
    p.add_argument("--quick", action="store_true", help="a hundredth of the steps: to see that it runs")
    p.add_argument("--out", type=Path, help="a results file")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(environment(DEVICES["cpu"]()), 0, args.out)
    share = 100 if args.quick else 1
    results.host, results.finished = measure(STEPS // share, STEPS_AFTER_DROP // share), True
    print(f"{flat(results.host)}\n\n{source(results.environment)}")
    results.save()
    return 0


if __name__ == "__main__":
    arguments.run(main)

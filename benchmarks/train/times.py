"""What a training run says about the optimizers' times: each number with what it is the time of."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from ..common.units import duration


def says(args: argparse.Namespace, own: Sequence[float], beside: Mapping[str, Sequence[float]] | None) -> list[str]:
    """Lines about seconds per step: of the optimizer that trains, and of those that ``--compare`` times beside it,
    fusedoptim first."""
    work = ["the update", "the gradients' norm", *(["clipping"] if args.max_grad_norm else [])]
    work += ["the average of the weights"] if args.ema is not None else []
    lines = [
        f"the training's own step of fusedoptim's {args.optimizer}{', compiled' if args.compile else ''}: "
        f"{duration(statistics.median(own))}, median of {len(own)}, right after the backward pass, with "
        f"{', '.join(work[:-1])} and {work[-1]}"
    ]
    if beside is None:
        return lines
    medians = {name: statistics.median(seconds) for name, seconds in beside.items()}
    mine, count = next(iter(medians.values())), len(next(iter(beside.values())))
    lines.append(
        f"the update alone, on copies of the parameters with the same gradients, the two in turn, medians of {count}:"
    )
    lines += [f"  {args.optimizer} of {name}: {duration(m)}, {m / mine:.2f}x" for name, m in medians.items()]
    return lines

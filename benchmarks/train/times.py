"""What a training run says about the optimizers' times: each number with what it is the time of."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from ..common.units import duration


def _p50_and_least(seconds: Sequence[float]) -> str:
    return f"{duration(statistics.median(seconds))} (p50), {duration(min(seconds))} (minimum)"


def says(args: argparse.Namespace, own: Sequence[float], beside: Mapping[str, Sequence[float]] | None) -> list[str]:
    """Lines about seconds per step of this process: of the optimizer that trains, and of those that ``--compare`` times
    beside it, fusedoptim first."""
    work = ["the update", "the gradients' norm", *(["clipping"] if args.max_grad_norm else [])]
    work += ["the average of the weights"] if args.ema is not None else []
    work += ["sending the parameters to the other processes"] if args.shard == "zero" else []
    lines = [
        f"the training's own step of fusedoptim's {args.optimizer}{', compiled' if args.compile else ''}: "
        f"{_p50_and_least(own)} of {len(own)}, right after the backward pass, with {', '.join(work[:-1])} and "
        f"{work[-1]}"
    ]
    if beside is None:
        return lines
    medians = {name: statistics.median(seconds) for name, seconds in beside.items()}
    mine, count = next(iter(medians.values())), len(next(iter(beside.values())))
    copies = {None: "copies of the parameters", "ddp": "copies of the parameters", "zero": "copies of its parameters"}
    what = copies.get(args.shard, "copies of the sharded parameters")
    lines.append(f"the update alone, on {what} with the same gradients, the two in turn, {count} times:")
    lines += [
        f"  {args.optimizer} of {name}: {_p50_and_least(seconds)}, {medians[name] / mine:.2f}x"
        for name, seconds in beside.items()
    ]
    return lines

"""``python -m benchmarks.norm_traffic``: what a norm of the whole model's gradients sends, beside torch's.

One process stands for a rank of a large world (sharded/simulated.py), and the collectives that it asks for are counted.
How long they take is estimated: a message takes ``--latency``, and its bytes over ``--bandwidth``.

- doubling: ranks exchange what they have with one that is 1, 2, 4, ... ranks away; a sum goes up a tree and down again.
- ring: each rank hands on what it got from the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fusedoptim

from .common import arguments
from .common.arguments import UsageError
from .common.units import duration, number
from .sharded.collectives import GATHER, REDUCE, Collective, collectives
from .sharded.simulated import LAYOUTS, Layout, parameters, simulated
from .tables import header, line


@dataclass(frozen=True)
class Cost:
    """Of one collective, for a rank: messages in a row, and bytes that it receives meanwhile."""

    doubling: int
    ring: int
    bytes: float

    def seconds(self, rounds: int, latency: float, bandwidth: float) -> float:
        return rounds * latency + self.bytes / bandwidth


def cost(c: Collective) -> Cost:
    """A sum of n bytes over p ranks by a ring goes round twice, an p-th of it at a time; by a tree it is pipelined."""
    steps, others = (c.ranks - 1).bit_length(), c.ranks - 1
    if c.kind == GATHER:
        return Cost(steps, others, others * c.bytes)
    if c.kind == REDUCE:
        return Cost(2 * steps, 2 * others, 2 * c.bytes * others / c.ranks)
    raise UsageError(f"no estimate for a collective of the kind {c.kind}")


def ours(params: list[nn.Parameter]) -> list[Collective]:
    """Of a step that clips; the first one also agrees on starting."""
    optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    with collectives() as found:
        optimizer.step()
    return found


def of_torch(params: list[nn.Parameter]) -> list[Collective]:
    with collectives(of_dtensors=True) as found:
        nn.utils.clip_grad_norm_(params, 1.0)
    return found


CONTENDERS: dict[str, Callable[[list[nn.Parameter]], list[Collective]]] = {
    "fusedoptim, max_grad_norm": ours,
    "torch clip_grad_norm_": of_torch,
}


def row(name: str, what: str, found: list[Collective], latency: float, bandwidth: float) -> str:
    costs = [cost(c) for c in found]
    asked = ", ".join(f"{c.kind} of {c.bytes:,} B over {c.ranks:,}" for c in found) or "none"
    seconds = [sum(c.seconds(rounds(c), latency, bandwidth) for c in costs) for rounds in (_doubling, _ring)]
    cells = [name, what, asked, number(sum(c.bytes for c in costs) / 1e6)]
    cells += [f"{sum(map(_doubling, costs)):,}", duration(seconds[0]), f"{sum(map(_ring, costs)):,}"]
    return line([*cells, duration(seconds[1])])


def _doubling(c: Cost) -> int:
    return c.doubling


def _ring(c: Cost) -> int:
    return c.ring


def measured(layout: Layout, world: int, tensors: int) -> dict[str, list[Collective]]:
    """By contender, each with parameters of its own."""
    found = {}
    with simulated(world):
        mesh = layout.mesh(world)
        for what, count in CONTENDERS.items():
            found[what] = count(parameters(mesh, layout, tensors, (8, 32)))
    return found


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.norm_traffic", description=__doc__.split("\n\n")[0])
    p.add_argument("--world", type=int, default=1024, help="ranks in all, a multiple of 8 (default: 1024)")
    p.add_argument("--tensors", type=int, default=300, help="parameters (default: 300)")
    p.add_argument("--latency", type=float, default=5.0, help="of a message, in us (default: 5)")
    p.add_argument("--bandwidth", type=float, default=25.0, help="of a rank, in GB/s (default: 25)")
    args = p.parse_args(argv)
    if args.world < 8 or args.world % 8:
        raise UsageError(f"--world must be a multiple of 8, but is {args.world}")
    if args.tensors < 1 or args.latency < 0 or not args.bandwidth > 0:
        raise UsageError("--tensors and --bandwidth must be positive, and --latency at least 0")
    torch.set_num_threads(1)
    names = ["layout", "", "collectives", "MB received", "doubling: messages", "time", "ring: messages", "time"]
    lines = header(names, 3)
    for layout in LAYOUTS.values():
        for what, found in measured(layout, args.world, args.tensors).items():
            lines.append(row(layout.says(args.world), what, found, args.latency * 1e-6, args.bandwidth * 1e9))
    print(*lines, sep="\n")
    print(
        f"\nBytes are what each rank puts in; {args.tensors} tensors; times are estimates for {args.latency:g} us per "
        f"message and {args.bandwidth:g} GB/s per rank. torch {torch.__version__}."
    )
    return 0


if __name__ == "__main__":
    arguments.run(main)

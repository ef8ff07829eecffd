"""``python -m benchmarks.large_worlds``: what a step costs one rank, in a small world and in a large one.

One process stands for the rank (sharded/simulated.py). Its shards have the same size in every world.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedoptim
from fusedoptim._dtensor import local

from .common import arguments
from .sharded.collectives import Collective, collectives
from .sharded.simulated import LAYOUTS, Layout, parameters, simulated
from .tables import header, line

#: Small enough to be quick, large enough that both dimensions of a mesh have several ranks.
WORLDS = (16, 1024)
SHARD = (8, 32)


@dataclass(frozen=True)
class Rank:
    """What a rank has after some steps, and what another step does: ``tensors`` and ``bytes`` are those that live on
    because of the optimizer, ``calls`` those of functions, Python's and C's, that the interpreter makes."""

    tensors: int
    bytes: int
    calls: int
    collectives: tuple[Collective, ...]
    us: float


@contextmanager
def _new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Within it, what is yielded gives the plain tensors and shards that have come to live since."""
    gc.collect()
    gc.freeze()  # what there is: the rest are new

    def new() -> list[Tensor]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]  # proxies pretend to be of a class
        return list({id(t): t for t in map(local, tensors)}.values())

    try:
        yield new
    finally:
        gc.unfreeze()


def _calls(step: Callable[[], object]) -> int:
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def measured(layout: Layout, world: int, tensors: int, seconds: float = 0.0, **options: Any) -> Rank:
    """Of AdamW, with these options."""
    with simulated(world), ExitStack() as stack:
        params = parameters(layout.mesh(world), layout, tensors, SHARD)
        new_tensors = stack.enter_context(_new_tensors())
        optimizer = fusedoptim.AdamW(params, **options)
        for _ in range(3):
            optimizer.step()
        living = new_tensors()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}
        with collectives() as asked:
            optimizer.step()
        calls = _calls(optimizer.step)
        least, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter_ns()
            optimizer.step()
            least = min(least, (time.perf_counter_ns() - start) * 1e-3)
        return Rank(len(living), sum(storages.values()), calls, tuple(asked), least)


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.large_worlds", description=__doc__.split("\n\n")[0])
    p.add_argument("--tensors", type=int, default=300, help="parameters (default: 300)")
    p.add_argument("--seconds", type=float, default=1.0, help="of steps for each row (default: 1)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    print(*header(["layout", "AdamW", "tensors", "bytes", "calls per step", "collectives", "step, us"], 2), sep="\n")
    for layout in LAYOUTS.values():
        for what, options in {"step": {}, "step with max_grad_norm": {"max_grad_norm": 1.0}}.items():
            for world in WORLDS:
                of = measured(layout, world, args.tensors, args.seconds, **options)
                asked = ", ".join(f"{c.kind} of {c.bytes:,} B over {c.ranks:,}" for c in of.collectives) or "none"
                counts = f"{of.tensors:,}", f"{of.bytes:,}", f"{of.calls:,}", asked, f"{of.us:,.0f}"
                print(line([layout.says(world), what, *counts]))
    print("\nThe simulated gather itself copies what a rank puts in once per rank: half a microsecond for each.")
    return 0


if __name__ == "__main__":
    arguments.run(main)

"""``python -m benchmarks.sharded_host``: how long ``step()`` keeps the host over sharded parameters, beside plain ones.

One process stands for a rank (sharded/simulated.py): its collectives are asked for and send nothing, so that all that
the host does is measured and no wait for another process. Shards have as many elements as the plain parameters, so few
that all steps are host time.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import fusedoptim

from .common import arguments
from .measure.devices import DEVICES
from .measure.environment import environment, source
from .measure.optimizers import SETTINGS
from .measure.results import Result, Results, rounded
from .sharded.simulated import LAYOUTS, parameters, simulated
from .tables import flat

COUNT, SHARD, WORLD = 300, (8, 32), 2
MAX_NORM = 1.0
OURS, FUSED = "fusedoptim", "torch fused"
STEP, CLIPPED = "step", "clip + step"
Call = Callable[[], object]
Make = Callable[[list[nn.Parameter]], Call]


def _ours(params: list[nn.Parameter]) -> Call:
    return SETTINGS["AdamW"].make(params).step


def _ours_clipped(params: list[nn.Parameter]) -> Call:
    return SETTINGS["AdamW"].make(params, max_grad_norm=MAX_NORM).step


def _clip_before(params: list[nn.Parameter], clip: Callable[..., object], step: Call) -> Call:
    def both() -> None:
        clip(params, MAX_NORM)
        step()

    return both


def _ours_apart(params: list[nn.Parameter]) -> Call:
    return _clip_before(params, fusedoptim.clip_grad_norm_, _ours(params))


def _torch(**how: bool) -> Make:
    return lambda params: torch.optim.AdamW(params, **SETTINGS["AdamW"].options, **how).step


def _torch_clipped(**how: bool) -> Make:
    make = _torch(**how)
    return lambda params: _clip_before(params, nn.utils.clip_grad_norm_, make(params))


#: What is measured, and by whom; fusedoptim's first. Its clipping is part of its step, or apart as torch's is.
CONTENDERS: dict[tuple[str, str], Make] = {
    (STEP, OURS): _ours,
    (STEP, FUSED): _torch(fused=True),
    (STEP, "torch foreach"): _torch(foreach=True),
    (STEP, "torch for-loop"): _torch(foreach=False),
    (CLIPPED, OURS): _ours_clipped,
    (CLIPPED, "fusedoptim, clip_grad_norm_ apart"): _ours_apart,
    (CLIPPED, FUSED): _torch_clipped(fused=True),
    (CLIPPED, "torch foreach"): _torch_clipped(foreach=True),
    (CLIPPED, "torch for-loop"): _torch_clipped(foreach=False),
}


@dataclass
class Row:
    """Microseconds of every step, by whether parameters are plain or sharded."""

    what: str
    name: str
    us: dict[str, list[float]] = field(default_factory=lambda: {"plain": [], "sharded": []})

    def least(self, kind: str) -> float:
        """What other processes add is no step's."""
        return min(self.us[kind])


@dataclass(frozen=True)
class Goal:
    """Of a ratio."""

    ratio: float
    limit: float
    at_least: bool

    def __str__(self) -> str:
        reached = self.ratio >= self.limit if self.at_least else self.ratio <= self.limit
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{'' if reached else ' (missed)'}"


def results_of(rows: list[Row]) -> list[Result]:
    """Least times and their ratios; goals are those of fusedoptim's sharded step, over its plain one, and of torch's
    fused one over it."""
    ours = {row.what: row.least("sharded") for row in rows if row.name == OURS}
    found = []
    for row in rows:
        plain, sharded = row.least("plain"), row.least("sharded")
        ratios = {"sharded / plain": sharded / plain, "sharded / fusedoptim's": sharded / ours[row.what]}
        goals = {
            (STEP, OURS): Goal(ratios["sharded / plain"], 1.3, at_least=False),
            (STEP, FUSED): Goal(ratios["sharded / fusedoptim's"], 40.0, at_least=True),
        }
        goal = str(goals.get((row.what, row.name), ""))
        times = {"plain, us": plain, "sharded, us": sharded, "steps": len(row.us["sharded"])}
        found.append({"AdamW": row.what, "": row.name, **times, **ratios, "goal": goal})
    return found


def sample(call: Call, us: list[float], steps: int) -> None:
    for _ in range(steps):
        start = time.perf_counter_ns()
        call()
        us.append((time.perf_counter_ns() - start) * 1e-3)


def measure(seconds: float, at_least: int = 3, steps: int = 5) -> list[Row]:
    """All take turns, so that what slows the machine down slows everyone down; who has had its share of the time, and
    a few rounds, stops."""
    rows = [Row(what, name) for what, name in CONTENDERS]
    with simulated(WORLD):
        layout = LAYOUTS["fsdp2"]
        mesh = layout.mesh(WORLD)
        turns = []
        for row, make in zip(rows, CONTENDERS.values(), strict=True):
            plain = [nn.Parameter(torch.ones(SHARD)) for _ in range(COUNT)]
            for p in plain:
                p.grad = torch.ones_like(p)
            for kind, params in (("plain", plain), ("sharded", parameters(mesh, layout, COUNT, SHARD))):
                call = make(params)
                sample(call, [], 3)
                turns.append((call, row.us[kind]))
        share, collecting = seconds * 1e6 / len(turns), gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for number in itertools.count():
                going = [(call, us) for call, us in turns if number < at_least or sum(us) < share]
                if not going:
                    break
                for call, us in going:
                    sample(call, us, steps)
        finally:
            if collecting:
                gc.enable()
    return rows


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.sharded_host", description=__doc__.split("\n\n")[0])
    p.add_argument("--seconds", type=float, default=60.0, help="in all, besides preparations (default: 60)")
    p.add_argument("--out", type=Path, help="a results file")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(environment(DEVICES["cpu"]()), 0, args.out)
    results.host, results.finished = rounded(results_of(measure(args.seconds))), True
    print(f"{flat(results.host)}\n\n{source(results.environment)}")
    results.save()
    return 0


if __name__ == "__main__":
    arguments.run(main)

"""``python -m benchmarks.host``: how long ``step()`` keeps the host, until it returns.

Without a GPU the kernels are replaced by some that do nothing (no_launch.py), so that what is measured is everything
before the launch. With ``--device cuda``: real steps, each from an idle device.
"""

from __future__ import annotations

import gc
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .common import arguments
from .common.arguments import UsageError
from .common.files import write_atomically
from .measure.cases import CASES, Case
from .measure.devices import DEVICES
from .measure.environment import environment, source
from .measure.no_launch import no_launch
from .measure.optimizers import SETTINGS
from .measure.timing import quantiles
from .tables import header, line

NO_LAUNCH = "host, no launch"
HOST_CASES = {c.name: c for c in (Case("1x8", ((8,),)), *(CASES[n] for n in ("300x1024", "2000x64", "465-groups")))}
#: Microseconds that a step of AdamW or SGD may take before the launch.
GOALS = {"1x8": 5.0, "300x1024": 60.0, "465-groups": 150.0}
STEPS = 10


@dataclass
class Row:
    """``pause`` is how many seconds pass between two steps, as in a loop that works on something else meanwhile."""

    what: str
    optimizer: str
    case: str
    threads: int
    pause: float
    us: list[float] = field(default_factory=list)

    @property
    def goal(self) -> float | None:
        return GOALS.get(self.case) if self.what == NO_LAUNCH and not self.pause else None

    def result(self) -> dict[str, Any]:
        """The goal is for the least time: what other processes add is not the step's."""
        us = {"min": min(self.us), **quantiles(self.us)}
        goal = self.goal
        return {**asdict(self), "us": us, "goal": goal, "reached": None if goal is None else us["min"] <= goal}


def make(name: str, case: Case, device: torch.device) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in case.shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[i :: case.groups]} for i in range(case.groups)]
    optimizer = SETTINGS[name].make(groups, backend="cuda")
    for _ in range(3):
        optimizer.step()
    return optimizer


def sample(row: Row, optimizer: torch.optim.Optimizer, on_gpu: bool) -> None:
    """A few steps; what waits for the device or the pause is not timed."""
    torch.set_num_threads(row.threads)
    for _ in range(1 if row.pause else STEPS):
        if on_gpu:
            torch.cuda.synchronize()
        if row.pause:
            time.sleep(row.pause)
        start = time.perf_counter_ns()
        optimizer.step()
        row.us.append((time.perf_counter_ns() - start) * 1e-3)


def measure(rows: list[Row], device: torch.device, seconds: float, at_most: int) -> None:
    """All rows take turns, so that what slows the machine down slows every row down."""
    keys = dict.fromkeys((r.optimizer, r.case) for r in rows)
    optimizers = {key: make(key[0], HOST_CASES[key[1]], device) for key in keys}
    threads = torch.get_num_threads()
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for number in range(at_most):
            if number >= 3 and time.perf_counter() >= end:
                break
            for row in rows:
                sample(row, optimizers[row.optimizer, row.case], device.type == "cuda")
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def table(rows: list[Row]) -> str:
    lines = header(["", "optimizer", "case", "threads", "pause, ms", "min, us", "median, us", "goal"], 3)
    for r in map(Row.result, rows):
        goal = "" if r["goal"] is None else f"<= {r['goal']:g}{'' if r['reached'] else ' (missed)'}"
        numbers = f"{r['threads']}", f"{r['pause'] * 1e3:g}", f"{r['us']['min']:.1f}", f"{r['us']['median']:.1f}"
        lines.append(line([r["what"], r["optimizer"], r["case"], *numbers, goal]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.host", description=__doc__.split("\n\n")[0])
    p.add_argument("--device", choices=("none", "cuda"), default="none", help="none (default): nothing is launched")
    p.add_argument("--optimizer", action="append", help="default: AdamW, SGD")
    p.add_argument("--case", action="append", help=f"default: {', '.join(HOST_CASES)}")
    p.add_argument("--pause", action="append", type=float, help="seconds between steps; default: 0, on a GPU also 0.02")
    p.add_argument("--threads", action="append", type=int, help="of torch's; default: all, on a GPU also 1")
    p.add_argument("--seconds", type=float, default=8.0, help="in all, besides preparations")
    p.add_argument("--rounds", type=int, default=1000, help="at most so many")
    p.add_argument("--out", type=Path, help="a JSON file for the results")
    args = p.parse_args(argv)
    on_gpu, everywhere = args.device == "cuda", torch.get_num_threads()
    names = arguments.known("--optimizer", args.optimizer or ["AdamW", "SGD"], SETTINGS)
    cases = arguments.known("--case", args.case, HOST_CASES)
    device = DEVICES["cuda" if on_gpu else "cpu"]()
    if device.problem() is not None:
        raise UsageError("--device cuda: torch finds no CUDA device; --device none needs none")
    rows = [
        Row("host" if on_gpu else NO_LAUNCH, name, case, threads, pause)
        for pause in args.pause or ([0.0, 0.02] if on_gpu else [0.0])
        for threads in args.threads or dict.fromkeys((everywhere, 1) if on_gpu else (everywhere,))
        for name in names
        for case in cases
    ]
    with nullcontext() if on_gpu else no_launch():
        measure(rows, device.torch_device, args.seconds, args.rounds)
    about = environment(device)
    print(f"{table(rows)}\n\n{source(about)}")
    if args.out:
        text = json.dumps({"environment": about, "rows": [r.result() for r in rows]}, indent=1).encode()
        write_atomically(args.out, lambda f: f.write(text + b"\n"))
    return 0


if __name__ == "__main__":
    arguments.run(main)

"""``python -m benchmarks.storages --out FILE.json``: how long AdamW steps take on one large tensor with parameters and
states in fewer bits, beside a copy of memory. Interleaved: medians of times, and of ratios within a round. Steps on a
GPU are CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fusedoptim

from .common import arguments
from .measure.devices import DEVICES, device_named
from .measure.environment import environment, source
from .measure.results import COPY, Result, Results, rounded
from .tables import storages

STOCHASTIC = {"rounding": {"exp_avg_sq": "stochastic"}}
#: By name: the parameter's dtype, the options, and the bytes that a step moves per element.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "fp32": (torch.float32, {}, 28),
    "bf16, nearest": (torch.bfloat16, {}, 14),
    "bf16, v stochastic": (torch.bfloat16, STOCHASTIC, 14),
    "bf16, all stochastic": (torch.bfloat16, {"rounding": "stochastic"}, 14),
    "remainder, fp32 states": (torch.bfloat16, {"master": "remainder", "state_dtype": torch.float32}, 26),
    "remainder, bf16 states": (torch.bfloat16, {"master": "remainder"}, 18),
    "remainder, 8-bit states": (torch.bfloat16, {"master": "remainder", "state_dtype": "int8"}, 14.125),
    "remainder8, 8-bit states": (torch.bfloat16, {"master": "remainder8", "state_dtype": "int8"}, 12.125),
    "fp32 master and states": (torch.bfloat16, {"master": torch.float32}, 30),
    "fp32, bf16 states": (torch.float32, {"state_dtype": torch.bfloat16}, 20),
    "fp32, 8-bit states": (torch.float32, {"state_dtype": "int8"}, 16.125),
}
ROW, ROUNDS, STEPS = 4096, 15, 4


def step_of(dtype: torch.dtype, options: dict[str, Any], elements: int, device: str, backend: str | None) -> Any:
    """A function that steps, as a CUDA graph where there is a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (elements // ROW, ROW)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))
    p.grad = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(1e-2).to(dtype)
    optimizer = fusedoptim.AdamW([p], backend=backend, **options)
    optimizer.step()
    if device == "cpu":
        return optimizer.step
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    return lambda _kept=optimizer: graph.replay()


def milliseconds(run: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        return (time.perf_counter() - start) * 1e3 / STEPS
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(STEPS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def measure(device: str, backend: str | None, elements: int) -> list[Result]:
    a, b = (torch.empty(elements, device=device) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {COPY: lambda: b.copy_(a)}
    moved = {COPY: 8.0}
    for name, (dtype, options, size) in STORAGES.items():
        runs[name] = step_of(dtype, options, elements, device, backend)
        moved[name] = size
    rounds = [{name: milliseconds(run, device) for name, run in runs.items()} for _ in range(ROUNDS)]
    return [
        {
            "storage": name,
            "bytes": moved[name],
            "elements": elements,
            "ms": median(times[name] for times in rounds),
            "over_fp32": median(times[name] / times["fp32"] for times in rounds),
            "share_of_copy": median(moved[name] / moved[COPY] * times[COPY] / times[name] for times in rounds),
        }
        for name in runs
    ]


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.storages", description=__doc__)
    p.add_argument("--device", default="cpu", help=f"one of {', '.join(DEVICES)} (default: cpu)")
    p.add_argument("--backend", help="another than the best")
    p.add_argument("--elements", type=int, help="of the tensor (default: 2^28 on a GPU, 2^25 on the CPU)")
    p.add_argument("--out", type=Path, help="a results file")
    args = p.parse_args(argv)
    device = arguments.known("--device", [args.device], DEVICES)[0]
    results = Results(environment(device_named(device)), 0, args.out)
    results.storages = rounded(measure(device, args.backend, args.elements or 1 << (25 if device == "cpu" else 28)))
    results.finished = True
    print(f"{storages([results])}\n\n{source(results.environment)}", flush=True)
    for row in results.storages:
        print(f"{row['storage']}: {row['share_of_copy']:.2f} of copy")
    print(f"{device}: {len(STORAGES)} ways to store")
    results.save()
    return 0


if __name__ == "__main__":
    arguments.run(main)

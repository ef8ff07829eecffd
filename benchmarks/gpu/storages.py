"""``python -m benchmarks.gpu.storages --out FILE.json``: how long AdamW steps take with parameters and states in fewer
bits, on one large tensor, beside a copy of memory. Interleaved; the least of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedoptim

from ..common import arguments
from ..common.files import write_atomically

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
    "fp32, 8-bit states": (torch.float32, {"state_dtype": "int8"}, 16.125),
}
ROW, ROUNDS, STEPS = 4096, 5, 4


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


def main() -> int:
    p = arguments.Parser(prog="python -m benchmarks.gpu.storages", description=__doc__)
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    p.add_argument("--backend", help="another than the best")
    p.add_argument("--elements", type=int, default=1 << 28)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    device, elements = args.device, args.elements
    a, b = (torch.empty(elements, device=device) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: b.copy_(a)}
    moved = {"copy": 8.0}
    for name, (dtype, options, size) in STORAGES.items():
        runs[name] = step_of(dtype, options, elements, device, args.backend)
        moved[name] = size
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            least[name] = min(least[name], milliseconds(run, device))
    copy = moved["copy"] / least["copy"]
    rows = [
        {"storage": name, "bytes": moved[name], "ms": ms, "share_of_copy": moved[name] / ms / copy}
        for name, ms in least.items()
    ]
    for row in rows:
        print(f"{row['storage']:<26}{row['bytes']:>8} B {row['ms']:>9.3f} ms {row['share_of_copy']:>7.3f} of copy")
    print(f"{device}: {elements} elements, {len(rows) - 1} ways to store", flush=True)
    if args.out:
        found = {"device": device, "backend": args.backend, "elements": elements, "rows": rows}
        write_atomically(args.out, lambda f: f.write(json.dumps(found, indent=1).encode()))
    return 0


if __name__ == "__main__":
    arguments.run(main)

"""``python -m benchmarks.compiled``: a compiled step of AdamW beside torch's compiled foreach code: seconds to compile,
and milliseconds per step, interleaved. torch's takes minutes to compile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import fusedoptim

from .common import arguments
from .measure.timing import quantiles


def make(cls: Callable[..., torch.optim.Optimizer], tensors: int, elements: int) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(elements)
    return cls(params)


def main() -> int:
    p = arguments.Parser(prog="python -m benchmarks.compiled", description=__doc__)
    p.add_argument("--tensors", type=int, default=300)
    p.add_argument("--elements", type=int, default=1024, help="of each tensor")
    p.add_argument("--rounds", type=int, default=100)
    args = p.parse_args()
    size = args.tensors, args.elements
    steps: dict[str, Callable[[], object]] = {
        "fusedoptim": make(fusedoptim.AdamW, *size).step,
        "fusedoptim compiled": torch.compile(make(fusedoptim.AdamW, *size).step, fullgraph=True),
        "torch foreach compiled": torch.compile(make(lambda ps: torch.optim.AdamW(ps, foreach=True), *size).step),
    }
    first, seconds = {}, {name: [] for name in steps}
    for name, step in steps.items():
        start = time.perf_counter()
        for _ in range(2):  # some compile anew once states exist
            step()
        first[name] = time.perf_counter() - start
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    print(f"AdamW, {args.tensors} tensors of {args.elements} elements, torch {torch.__version__}")
    print("| | first two steps, s | step, ms |\n|---|---:|---:|")
    for name in steps:
        print(f"| {name} | {first[name]:.1f} | {quantiles(seconds[name])['median'] * 1e3:.3f} |")
    return 0


if __name__ == "__main__":
    arguments.run(main)

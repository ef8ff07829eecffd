"""``python -m benchmarks.gpu.steps``: a few steps of every optimizer, compared with the CPU, for tools that watch
kernels. With --profiled, a step each of what a profiler is to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fusedoptim

from ..common import arguments
from ..measure import plan
from ..measure.data import Data
from ..measure.optimizers import SETTINGS
from ..measure.peers import ours

#: One element, a tail alone, a tile and a tail, several chunks; and more tensors than kernel arguments can name.
SIZES, MANY = (1, 17, 1025, 70_001), (3,) * 4100
STEPS = 3
#: What only memory limits; what should find gradients in the L2 again; what is over soon.
PROFILED = [("AdamW", dtype, "64M") for dtype in ("fp32", "bf16", "bf16+fp32")]
PROFILED += [("NormAdaptive", "fp32", "gpt2-small"), ("AdamW", "fp32", "300x1024"), ("AdamW", "fp32", "465-groups")]


def placed(values: Tensor, sizes: Sequence[int], device: str) -> list[Tensor]:
    """In memory of their own; many as views of one buffer, because allocations take their time under a tool."""
    if sizes is MANY:
        return list(values.to(device, copy=True).split(sizes))
    return [part.to(device, copy=True) for part in values.split(sizes)]


def stepped(make: Any, backend: str | None, device: str, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Parameters, which are the first of the values, after a step with each of the others."""
    params = [torch.nn.Parameter(x) for x in placed(values[0], sizes, device)]
    optimizer = make(params, backend=backend)
    for gradients in values[1:]:
        for p, g in zip(params, placed(gradients, sizes, device), strict=True):
            p.grad = g
        optimizer.step()
    return torch.cat([p.detach() for p in params]).cpu()


def check(device: str) -> int:
    """Its own backend against the CPU kernels, which are fast; these against the reference."""
    witness, dtypes = "reference" if device == "cpu" else None, ("float32", "bfloat16", "float16", "float64")
    sets: list[Any] = [(s.make, s.name, d, SIZES) for s in SETTINGS.values() for d in dtypes]
    # Without states, which would be allocations again.
    sets.append((lambda p, **k: fusedoptim.SGD(p, max_grad_norm=1.0, **k), "SGD+clip", "float32", MANY))
    wrong = 0
    for make, name, dtype, sizes in sets:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(sum(sizes), generator=generator).to(getattr(torch, dtype)) for _ in range(1 + STEPS)]
        if not torch.equal(stepped(make, device, device, values, sizes), stepped(make, witness, "cpu", values, sizes)):
            wrong += 1
            print(f"{name} {dtype}, {len(sizes)} tensors: other bits than {witness or 'the CPU'}'s")
    print(f"{device}: {len(sets)} sets of tensors, {STEPS} steps each, {wrong} wrong", flush=True)
    return min(1, wrong)


def profiled(device: str) -> int:
    for key in PROFILED:
        row = plan.row((*key, "kept"))
        data = Data(row.case, row.work.dtypes.param, torch.device(device), 1)
        params = data.parameters()
        data.give_gradients(params, 0)
        ours(row.work, data.groups(params, 1e-3)).step()
        print(f"{device}: {' '.join(key)}", flush=True)
    return 0


def main() -> int:
    p = arguments.Parser(prog="python -m benchmarks.gpu.steps", description=__doc__)
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    p.add_argument("--profiled", action="store_true")
    args = p.parse_args()
    return (profiled if args.profiled else check)(args.device)


if __name__ == "__main__":
    arguments.run(main)

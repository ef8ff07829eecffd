"""``python -m benchmarks.gpu.steps``: a few steps of every optimizer, compared with the CPU, for tools that watch
kernels. With --low, with parameters and states in fewer bits; with --profiled, a step each of what a profiler is to
look at."""

from __future__ import annotations

import math
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
from ..storages import STORAGES

#: One element, a tail alone, a tile and a tail, several chunks; and more tensors than kernel arguments can name.
SIZES, MANY = ((1,), (17,), (1025,), (70_001,)), ((3,),) * 4100
#: Rows of whole blocks, of others, and of none.
ROWS = ((33, 170), (17, 256), (300, 64), (1025,))
STEPS = 3
Shapes = Sequence[tuple[int, ...]]
#: What only memory limits; what should find gradients in the L2 again; what is over soon.
PROFILED = [("AdamW", dtype, "64M") for dtype in ("fp32", "bf16", "bf16+fp32")]
PROFILED += [("NormAdaptive", "fp32", "gpt2-small"), ("AdamW", "fp32", "300x1024"), ("AdamW", "fp32", "465-groups")]


def placed(values: Tensor, shapes: Shapes, device: str) -> list[Tensor]:
    """In memory of their own; many as views of one buffer, because allocations take their time under a tool."""
    if shapes is MANY:
        values = values.to(device, copy=True)
    parts = values.split([math.prod(shape) for shape in shapes])
    return [
        (part if shapes is MANY else part.to(device, copy=True)).view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def stepped(make: Any, backend: str | None, device: str, values: Sequence[Tensor], shapes: Shapes) -> Tensor:
    """Parameters, which are the first of the values, after a step with each of the others."""
    params = [torch.nn.Parameter(x) for x in placed(values[0], shapes, device)]
    optimizer = make(params, backend=backend)
    for gradients in values[1:]:
        for p, g in zip(params, placed(gradients, shapes, device), strict=True):
            p.grad = g
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params]).cpu()


def ordinary() -> list[Any]:
    """How an optimizer is made, its name, the dtype, the shapes."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    sets: list[Any] = [(s.make, s.name, d, SIZES) for s in SETTINGS.values() for d in dtypes]
    # Without states, which would be allocations again.
    sets.append((lambda p, **k: fusedoptim.SGD(p, max_grad_norm=1.0, **k), "SGD+clip", torch.float32, MANY))
    return sets


def low() -> list[Any]:
    return [
        (lambda p, _own=options, **k: fusedoptim.AdamW(p, ema_decay=0.9, **_own, **k), name, dtype, ROWS)
        for name, (dtype, options, _) in STORAGES.items()
    ]


def check(device: str, sets: list[Any]) -> int:
    """Its own backend against the CPU kernels, which are fast; these against the reference."""
    witness = "reference" if device == "cpu" else None
    wrong = 0
    for make, name, dtype, shapes in sets:
        generator, n = torch.Generator().manual_seed(0), sum(map(math.prod, shapes))
        values = [torch.randn(n, generator=generator).to(dtype) for _ in range(1 + STEPS)]
        found = stepped(make, device, device, values, shapes)
        if not torch.equal(found, stepped(make, witness, "cpu", values, shapes)):
            wrong += 1
            print(f"{name} {dtype}, {len(shapes)} tensors: other bits than {witness or 'the CPU'}'s")
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
    p.add_argument("--low", action="store_true")
    p.add_argument("--profiled", action="store_true")
    args = p.parse_args()
    return profiled(args.device) if args.profiled else check(args.device, low() if args.low else ordinary())


if __name__ == "__main__":
    arguments.run(main)

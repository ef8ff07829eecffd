"""``python -m benchmarks.gpu_steps``: a few steps of every optimizer, compared with the CPU, for tools
that watch or measure kernels. With --large, main kernels at a size that only memory limits, for a profiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedoptim import _backends

from . import arguments
from .cases import Shape
from .optimizers import SETTINGS

#: One element, a tail alone, a tile and a tail, several chunks; and more tensors than kernel arguments can name.
SHAPES: tuple[Shape, ...] = ((1,), (17,), (1025,), (70_001,))
MANY: tuple[Shape, ...] = ((3,),) * 4500
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = 3
LARGE = 1 << 26


def stepped(backend: str | None, device: str, name: str, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Parameters, which are the first of the values, after a step with each of the others."""
    params = [torch.nn.Parameter(x.to(device, copy=True)) for x in values[0]]
    optimizer = SETTINGS[name].make(params, backend=backend)
    for gradients in values[1:]:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to(device)
        optimizer.step()
    return [p.detach().cpu() for p in params]


def check(backend: str, device: str) -> int:
    """Against the CPU kernels, which are fast; these against the reference."""
    witness = "reference" if backend == "cpu" else None
    sets = [(name, dtype, SHAPES) for name in SETTINGS for dtype in DTYPES]
    if device != "cpu":
        sets += [(name, torch.float32, MANY) for name in ("AdamW", "NormAdaptive")]
    wrong = 0
    for name, dtype, shapes in sets:
        generator = torch.Generator().manual_seed(0)
        values = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(1 + STEPS)]
        mine, right = stepped(backend, device, name, values), stepped(witness, "cpu", name, values)
        if not all(map(torch.equal, mine, right)):
            wrong += 1
            print(f"{backend}: {name} {dtype}, {len(shapes)} tensors: other bits than {witness or 'the CPU'}'s")
    print(f"{backend}: {len(sets)} sets of tensors, {STEPS} steps each, {wrong} wrong")
    return 1 if wrong else 0


def large(backend: str, device: str) -> int:
    for name in ("AdamW", "SGD", "NormAdaptive"):
        for dtype in (torch.float32, torch.bfloat16):
            p = torch.nn.Parameter(torch.zeros(LARGE, dtype=dtype, device=device))
            p.grad = torch.ones_like(p)
            optimizer = SETTINGS[name].make([p], backend=backend)
            optimizer.step()
            print(f"{backend}: {name} {dtype}", flush=True)
    return 0


def main() -> int:
    p = arguments.Parser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    p.add_argument("--large", action="store_true")
    p.add_argument("--backend", help="this one alone (default: all that have kernels for the device)")
    args = p.parse_args()
    device = torch.device(args.device)
    able = [
        b.name
        for b in _backends.BACKENDS.values()
        if b.devices is not None and b.takes(device) and b.problem(device) is None
    ]
    able = [name for name in able if args.backend in (None, name)]
    if not able:
        print(f"no {args.backend or 'backend'} kernels for {args.device}; python -m fusedoptim says why")
        return 1
    return max(large(b, args.device) if args.large else check(b, args.device) for b in able)


if __name__ == "__main__":
    arguments.run(main)

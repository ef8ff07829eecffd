"""A check that the backends here give the reference's bits: a second of one core, longer where others keep the cores
busy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

import fusedoptim

from . import AdamW, FusedOptimizer, Lion, StepOptions
from ._backends import is_own

#: All that a step can do around its rule.
OPTIONS: StepOptions = {
    "max_grad_norm": 1.0,
    "clip_grad_value": 0.01,
    "ema_decay": 0.9,
    "skip_nonfinite": True,
    "zero_grad_in_step": True,
}
_exported = [getattr(fusedoptim, name) for name in fusedoptim.__all__]
_classes = [c for c in _exported if isinstance(c, type) and issubclass(c, FusedOptimizer) and c is not FusedOptimizer]
OPTIMIZERS: dict[str, Callable[..., FusedOptimizer]] = {
    cls.__name__: partial(cls, **cls._self_check) for cls in _classes if not is_own(cls.rule)
}
OPTIMIZERS["AdamW with all options"] = partial(AdamW, **OPTIONS)
#: Of the rules that are compiled when they are used, which takes half a second for each dtype.
COMPILED: dict[str, Callable[..., FusedOptimizer]] = {"Lion": partial(Lion, **Lion._self_check)}
SIZES = (0, 1, 17, 1025, 40_000)


def differing(
    backend: str, device: str, optimizers: Mapping[str, Callable[..., FusedOptimizer]] = OPTIMIZERS
) -> list[str]:
    """Steps every optimizer six times in every dtype. Returns what differed from the reference on the CPU, where
    torch's own operations have the contract's roundings; [] is success."""
    bad = []
    for name, make in optimizers.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            runs = []
            for b, where in ((backend, device), ("reference", "cpu")):
                g = torch.Generator("cpu").manual_seed(0)
                params = [torch.nn.Parameter(torch.randn(n, generator=g, device="cpu").to(where, dtype)) for n in SIZES]
                optimizer = make(params, backend=b)
                for _ in range(6):
                    for p in params:
                        p.grad = torch.randn(p.shape, generator=g, device="cpu").to(where, dtype)
                    optimizer.step()
                runs.append([t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())])
            if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
                bad.append(f"{name} {dtype}")
    return bad

"""A check that the backends here give the reference's bits: a second of one core, longer where others keep the cores
busy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import SGD, Adagrad, Adam, AdamW, FusedOptimizer, NormAdaptive, RMSprop, StepOptions

OPTIMIZERS: dict[str, Callable[..., FusedOptimizer]] = {
    "Adam": lambda p, **k: Adam(p, amsgrad=True, weight_decay=0.1, **k),
    "AdamW": AdamW,
    "SGD": lambda p, **k: SGD(p, momentum=0.9, dampening=0.1, **k),
    "RMSprop": lambda p, **k: RMSprop(p, momentum=0.9, centered=True, **k),
    "Adagrad": lambda p, **k: Adagrad(p, lr_decay=0.1, **k),
    "NormAdaptive": NormAdaptive,
    "AdamW with all options": lambda p, **k: AdamW(p, **OPTIONS, **k),
}
#: All that a step can do around its rule.
OPTIONS: StepOptions = {
    "max_grad_norm": 1.0,
    "clip_grad_value": 0.01,
    "ema_decay": 0.9,
    "skip_nonfinite": True,
    "zero_grad_in_step": True,
}
SIZES = (0, 1, 17, 1025, 40_000)


def differing(backend: str, device: str) -> list[str]:
    """Steps every optimizer five times in every dtype. Returns what differed from the reference on the CPU, where
    torch's own operations have the contract's roundings; [] is success."""
    bad = []
    for name, make in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            runs = []
            for b, where in ((backend, device), ("reference", "cpu")):
                g = torch.Generator("cpu").manual_seed(0)
                params = [torch.nn.Parameter(torch.randn(n, generator=g, device="cpu").to(where, dtype)) for n in SIZES]
                optimizer = make(params, backend=b)
                for _ in range(5):
                    for p in params:
                        p.grad = torch.randn(p.shape, generator=g, device="cpu").to(where, dtype)
                    optimizer.step()
                runs.append([t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())])
            if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
                bad.append(f"{name} {dtype}")
    return bad

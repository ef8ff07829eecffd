"""Lion as one writes it for speed without a kernel: torch's foreach functions, a call for each operation."""

from __future__ import annotations

from typing import Any

import torch


class ForeachLion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675), with the roundings of :class:`fusedoptim.Lion`."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            grads, averages = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            update = torch._foreach_sign(torch._foreach_lerp(averages, grads, 1 - beta1))
            torch._foreach_add_(params, update, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - beta2)

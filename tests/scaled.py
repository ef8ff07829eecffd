"""Training under a GradScaler."""

from __future__ import annotations

import torch


def train(optimizer: torch.optim.Optimizer, params: list, steps: int, overflow: set[int]) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(step)
        loss = sum((p * torch.randn(p.shape, generator=g)).sum() for p in params)
        scaler.scale(loss).backward()
        if step in overflow:
            params[step % len(params)].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales

"""Parameters and gradients of a case: random, the same for every contender, and in memory that has been touched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Shape

#: Large tensors repeat this many random numbers, which takes a second where fresh ones would take a minute.
POOL = (1 << 20) + 7
Params = list[torch.nn.Parameter]


class Data:
    """Gradients are shared, because a step only reads them; every contender has parameters of its own.

    With ``sets=2`` two sets of gradients take turns, so that no address repeats from a step to the next.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, sets: int, seed: int = 0) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        generator = torch.Generator().manual_seed(seed)
        # As large as weights are, so that bf16 can resolve a step; gradients of 1 keep every state far from denormals.
        self._weights = self._pool(generator, 0.02)
        gradients = self._pool(generator, 1.0)
        self.gradients = [self._sparse(self._tensors(gradients, 31 * k)) for k in range(sets)]

    def _pool(self, generator: torch.Generator, scale: float) -> Tensor:
        return (torch.randn(POOL, generator=generator) * scale).to(self.device, self.dtype)

    def _tensors(self, pool: Tensor, offset: int) -> list[Tensor]:
        tensors = []
        for shape in self.case.shapes:
            tensors.append(self._filled(shape, pool, offset))
            offset += math.prod(shape)
        return tensors

    def _filled(self, shape: Shape, pool: Tensor, offset: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        flat, done = tensor.view(-1), 0
        while done < flat.numel():
            start = (offset + done) % POOL
            n = min(POOL - start, flat.numel() - done)
            flat[done : done + n] = pool[start : start + n]
            done += n
        return tensor

    def _sparse(self, gradients: list[Tensor]) -> list[Tensor]:
        """With the case's share of zero rows; the last one, which samples look at, stays."""
        for g in gradients if self.case.live > 1 else ():
            rows = torch.arange(len(g), device=self.device)
            g[(rows % self.case.live != 0) & (rows != len(g) - 1)] = 0
        return gradients

    def parameters(self) -> Params:
        return [torch.nn.Parameter(t) for t in self._tensors(self._weights, 0)]

    def groups(self, params: Params, lr: float) -> list[dict[str, Any]]:
        """Each group with a learning rate of its own, between once and twice ``lr``."""
        per_group = -(-len(params) // self.case.groups)
        starts = range(0, len(params), per_group)
        return [{"params": params[s : s + per_group], "lr": lr * (1 + n / len(starts))} for n, s in enumerate(starts)]

    def give_gradients(self, params: Params, step: int) -> None:
        """Puts the gradients in place where they are not: an optimizer may have taken them away, and then it would
        step nothing."""
        for p, g in zip(params, self.gradients[step % len(self.gradients)], strict=True):
            if p.grad is not g:
                p.grad = g

    def renew_gradients(self, params: Params, step: int) -> None:
        """As ``zero_grad(set_to_none=True)`` and a backward pass: other tensors, at other addresses."""
        for p in params:
            p.grad = None
        for p, g in zip(params, self.gradients[step % len(self.gradients)], strict=True):
            p.grad = g.view_as(g)


def sample(params: Params) -> list[Tensor]:
    """The first and the last few elements of every tensor, on the CPU."""
    parts = [torch.cat((flat[:8], flat[-8:])) for flat in (p.detach().reshape(-1) for p in params)]
    lengths = [part.numel() for part in parts]
    return list(torch.cat(parts).double().cpu().split(lengths))  # type: ignore[no-untyped-call]

"""A backend with tables on a device beside the CPU's kernels: what tests of all such backends share."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from cases import (
    Case,
    assert_same_bits,
    assert_same_optimizers,
    force_grad,
    gradient,
    parameters,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Kernels(Protocol):
    backend: str
    #: Programs take milliseconds: sizes and steps have to be small.
    slow: bool

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        """Makes a step. How many kernels it launched."""


def pair(
    kernels: Kernels, case: Case, shapes: list, dtype: torch.dtype, against: str = "cpu", **options: object
) -> tuple[list, list, object, object]:
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    return (
        mine,
        theirs,
        case.make(mine, backend=kernels.backend, **options),
        case.make(theirs, backend=against, **options),
    )


def moved(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins so many elements behind an aligned address."""
    return torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:].copy_(x)


#: An optimizer's options, and those of three groups: one with a limit, one with another, one without.
AROUND: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "norm": ({}, [{"max_grad_norm": 0.5}, {"max_grad_norm": 3.0}, {}]),
    "value": ({}, [{"clip_grad_value": 0.3}, {"clip_grad_value": 1e-3}, {}]),
    "average": ({}, [{"ema_decay": 0.75}, {"ema_decay": 0.3}, {}]),
    "zeros": ({"zero_grad_in_step": True}, [{}, {}, {}]),
    "skipping": ({"skip_nonfinite": True}, [{}, {}, {}]),
    "all": (
        {"zero_grad_in_step": True, "skip_nonfinite": True},
        [
            {"max_grad_norm": 0.5, "clip_grad_value": 0.01, "ema_decay": 0.75},
            {"max_grad_norm": 1e4, "ema_decay": 0.0},
            {"clip_grad_value": 0.2, "ema_decay": 0.999},
        ],
    ),
}
MEASURING = ("norm", "skipping", "all")


class Both:
    """An optimizer of the kernels under test and the CPU's, on equal parameters."""

    def __init__(self, kernels: Kernels, case: Case, params: list[torch.Tensor], around: str) -> None:
        options, groups = AROUND[around]
        self.kernels, self.zeroes = kernels, "zero_grad_in_step" in options
        self.params, self.optimizers = [], []
        for backend in (kernels.backend, "cpu"):
            own = [torch.nn.Parameter(p.detach().clone()) for p in params]
            members = [{"params": own[i::3], **group} for i, group in enumerate(groups)]
            self.params.append([p for member in members for p in member["params"]])
            self.optimizers.append(case.make(members, backend=backend, **options))

    def set_gradients(self, step: int) -> None:
        """Half of them in another dtype than their parameters, of 64 bits only for parameters of as many; those of
        several dimensions in another order; one is missing."""
        for params in self.params:
            for i, p in enumerate(params):
                dtypes = DTYPES if p.dtype == torch.float64 else DTYPES[2:] + DTYPES[:1]
                g = gradient(p, step, i, dtypes[(step + i) % len(dtypes)] if i % 2 else p.dtype)
                p.grad = None
                if len(params) <= 3 or i != step % len(params):
                    force_grad(p, g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() > 1 else g)

    def make_step(self, launches: int, scaling: tuple[float, float] | None = None) -> None:
        """Makes a step, and compares everything."""
        before = [[None if p.grad is None else p.grad.detach().clone() for p in params] for params in self.params]
        a, b = self.optimizers
        if scaling is not None:
            for o in (a, b):
                o.grad_scale, o.found_inf = (torch.tensor(x) for x in scaling)
        assert self.kernels.launches(a) == launches
        b.step()
        if scaling is not None:
            for o in (a, b):
                del o.grad_scale, o.found_inf
        assert_same_optimizers(a, b)
        assert a.skipped_steps.item() == b.skipped_steps.item()
        if a.last_grad_norm is not None:
            assert_same_bits(a.last_grad_norm, b.last_grad_norm, "the norm")
        for params, old in zip(self.params, before, strict=True):
            for p, g in zip(params, old, strict=True):
                if g is not None:
                    assert_same_bits(p.grad.detach(), torch.zeros_like(g) if self.zeroes else g, "a gradient")

    def values(self) -> list[torch.Tensor]:
        """Of the kernels under test: all parameters and states."""
        o = self.optimizers[0]
        states = [v for p in self.params[0] for v in o.state.get(p, {}).values() if v is not None]
        return [torch.as_tensor(v).detach().clone() for v in (*self.params[0], *states)]


def assert_unchanged(now: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for x, y in zip(now, before, strict=True):
        assert_same_bits(x, y)

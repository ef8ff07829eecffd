"""What tests on a GPU share: the same parameters there and on the CPU, and the kernels that a call launches."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import (
    Case,
    parameters,
    set_gradients,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Params = list[torch.nn.Parameter]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def on_gpu(params: Params) -> Params:
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def pair(
    backend: str, case: Case, shapes: list, dtype: torch.dtype, **options: object
) -> tuple[Params, Params, object, object]:
    """The same parameters on the GPU and on the CPU, and an optimizer for each."""
    theirs = parameters(shapes, dtype)
    mine = on_gpu(theirs)
    return mine, theirs, case.make(mine, backend=backend, **options), case.make(theirs, backend="cpu", **options)


def set_both(mine: Params, theirs: Params, step: int) -> None:
    set_gradients(theirs, step)
    for p, q in zip(mine, theirs, strict=True):
        p.grad = None if q.grad is None else q.grad.cuda()


def kernels_of(call: object) -> list[str]:
    """The names of the kernels that a call launches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]


def steady(optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()

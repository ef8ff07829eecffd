"""Fake tensors (``FakeTensorMode``), which have shapes, dtypes and devices, but no memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

_is_fake_in_cpp = getattr(torch._C, "_is_fake_tensor", lambda t: False)


def is_fake(t: Tensor) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter):
        return bool(_is_fake_in_cpp(t))
    return bool(fake_tensor.is_fake(t))


def alike(t: Tensor) -> AbstractContextManager[Any]:
    """Within it new tensors are fake if this one is."""
    mode = fake_tensor.maybe_get_fake_mode(t) if is_fake(t) else None
    return nullcontext() if mode is None else mode

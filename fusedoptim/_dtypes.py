"""The dtypes that a step takes, and those that it computes in."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of parameters, gradients and states of the parameter's shape.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: The same in a message.
NAMES = "float32, float64, bfloat16 or float16"


def compute_dtype(p: Tensor) -> torch.dtype:
    """In which a parameter is updated, and its moving average kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32

from __future__ import annotations
from collections.abc import Iterator
from contextlib import contextmanager
import torch
_sqrt=torch.Tensor.sqrt; _sqrt_=torch.Tensor.sqrt_
from fusedoptim.reference import correctly_rounded_sqrt
@contextmanager
def ieee_sqrt():
    def s(x):
        torch.Tensor.sqrt=_sqrt
        try: return correctly_rounded_sqrt(x)
        finally: torch.Tensor.sqrt=s
    def si(x): return x.copy_(s(x))
    torch.Tensor.sqrt=s; torch.Tensor.sqrt_=si
    try: yield
    finally: torch.Tensor.sqrt=_sqrt; torch.Tensor.sqrt_=_sqrt_

"""Memory layouts of equal values, where those are."""

from __future__ import annotations

from collections.abc import Callable

import torch

Maker = Callable[[torch.Tensor], torch.Tensor]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, with gaps between the elements."""
    out = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[..., ::2]
    return out.copy_(x)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element off every larger alignment."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def backwards_slice(x: torch.Tensor) -> torch.Tensor:
    """A corner of a larger tensor."""
    big = torch.zeros([n + 2 for n in x.shape], dtype=x.dtype, device=x.device)
    view = big[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


LAYOUTS: dict[str, Maker] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "transposed": transposed,
    "strided": strided,
    "misaligned": misaligned,
    "slice": backwards_slice,
}

"""The norm of all gradients, as steps measure it, and how many steps were skipped for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._distributed import refuse_norm_of_shards
from ._dtensor import whole
from ._members import BoundParam, has_gradient
from ._rule import Group, Rule
from ._states import HasStates


class HasNorms(HasStates, Protocol):
    """What an optimizer has whose steps measure norms."""

    _norms: NormResults
    #: Whether no step can: parameters are parts of tensors, and nothing says where the others are.
    _has_no_norm: bool
    #: Whether all ranks have found together that a step can be made.
    _agreed: bool


def norm_is_measured(options: Mapping[str, Any], groups: Iterable[Group]) -> bool:
    """On all ranks alike: with ``norm_group`` others may have parameters of a group that has none here."""
    if options["skip_nonfinite"]:
        return True
    # Asked at every step: a generator would take three times as long.
    clipped = [g["params"] for g in groups if g.get("max_grad_norm") is not None]
    return bool(clipped) and (options["norm_group"] is not None or any(clipped))


def check_whole_tensors(rule: Rule, optimizer: str, measured: bool) -> None:
    """Of parameters that are parts of tensors, nobody has a norm: no rule can have each tensor's, and nobody that of
    all, unless process groups say where the other parts are.

    Args:
        measured: whether a step measures that of all in this process alone.

    Raises:
        ValueError: if a step needs one.
    """
    if measured or rule.sums:
        what = optimizer if rule.sums else "max_grad_norm, as skip_nonfinite,"
        refuse_norm_of_shards(what, for_clipping=not rule.sums)


class NormResults:
    """What steps write on the devices of their parameters, so that nothing waits for it.

    Attributes:
        by_device: two fp64 numbers: the norm of all gradients in the last step, NaN so far, and how many steps were
            skipped because it was not finite.
    """

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Tensor] = {}

    def make_for(self, members: Mapping[torch.device, Sequence[BoundParam]], measured: bool) -> None:
        """Makes those of these devices, and drops all others. The count goes along where parameters were moved.

        Args:
            measured: whether steps measure a norm. It is 0 already where no gradient is, because no kernel runs there.
        """
        before = next(iter(self.by_device.values()), None)
        found = {}
        for device, of_device in members.items():
            stats = self.by_device.get(device)
            if stats is None:
                stats = torch.tensor([math.nan, 0.0], dtype=torch.float64, device=device)
                if before is not None:
                    stats[1].copy_(before[1])
            if measured and not any(has_gradient(m.param) for m in of_device):
                stats[0] = 0.0
            found[device] = stats
        self.by_device = found

    def last(self, params: Iterable[Tensor]) -> Tensor:
        """The norm, fp32, or fp64 if a parameter has it. There must be one."""
        stats = next(iter(self.by_device.values()))  # all devices have the same
        wide = any(p.dtype == torch.float64 for p in params)
        return stats[0].to(torch.float64 if wide else torch.float32, copy=True)

    def skipped(self) -> Tensor:
        for stats in self.by_device.values():
            return stats[1].to(torch.int64)
        return torch.zeros((), dtype=torch.int64, device="cpu")

    def are_finite(self) -> bool:
        """Waits for the devices."""
        return all(math.isfinite(stats[0].item()) for stats in self.by_device.values())


def given_norm(norm: Tensor | float, options: Mapping[str, Any], groups: Iterable[Group]) -> Tensor:
    """A norm that somebody else measured, as steps take it: 0-dim.

    Raises:
        ValueError: if it is none, or if no step asks for one.
    """
    if not norm_is_measured(options, groups):
        raise ValueError(
            "grad_norm= is for max_grad_norm and skip_nonfinite, and this optimizer has neither: set one of them, or "
            "leave it out"
        )
    value = norm if isinstance(norm, Tensor) else torch.tensor(float(norm), dtype=torch.float64, device="cpu")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"grad_norm must be one number, but is a tensor of shape {tuple(value.shape)}, {value.dtype}")
    return whole(value.detach()).reshape(())

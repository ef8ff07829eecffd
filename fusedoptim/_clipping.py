"""Clips gradients that belong to no optimizer: a step of the rule ``clip``, on every device that has some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import _backends, _native, _versions, reference
from ._devices import device_guard, make_launcher, stream_of
from ._dtensor import aligned, dtensor_class, is_dtensor, local, same_layout
from ._dtypes import DTYPES, compute_dtype
from ._exchange import Exchange, RefusedElsewhere
from ._joint_runner import combine
from ._overlap import overlaps_itself, sharing
from ._rule import EMA


class Part(Protocol):
    """The gradients on one device. ``numbers`` and the parts of a step are as a Runner has them."""

    numbers: Tensor
    #: Two fp64 numbers, of which the first is the norm.
    stats: Tensor

    def run(self, max_norm: float | None, limit: float | None) -> None:
        """All parts at once."""

    def measure(self) -> None: ...

    def reduce(self) -> None: ...

    def update(self, max_norm: float | None, limit: float | None, refusals: Tensor | None = None) -> None:
        """Changes nothing if any rank refuses."""


class Clipping:
    """Of parameters' gradients, which are ready for it."""

    def __init__(self, parts: Sequence[Part], exchange: Exchange | None, dtensors: list[Tensor], wide: bool) -> None:
        self.parts, self.exchange, self.dtensors = parts, exchange, dtensors
        self.dtype = torch.float64 if wide else torch.float32
        self.refusals: Tensor | None = None

    @classmethod
    def of(cls, params: Sequence[Tensor], exchange: Exchange | None, backend: str | None) -> Clipping:
        """Looks at all gradients, and places those of DTensors as the parameters are.

        Args:
            exchange: for a norm; None where none is measured.

        Raises:
            ValueError: if kernels cannot take one of them.
        """
        dtensor = dtensor_class()
        sharded = [dtensor is not None and isinstance(p, dtensor) for p in params]
        for i, p in enumerate(params):
            if p.grad is not None:
                _check(p, p.grad, i, sharded[i])
        of_device: dict[torch.device, dict[int, Tensor]] = {}
        dtensors = []
        for i, p in enumerate(params):
            grad = p.grad
            if grad is None:
                continue
            if sharded[i]:
                placed = aligned(p, grad)
                if placed is not grad:
                    p.grad = placed
                dtensors.append(placed)
                grad = local(placed)
            of_device.setdefault(grad.device, {})[i] = grad
        if not of_device:  # on this rank
            of_device[params[0].device if params else torch.device("cpu")] = {}
        _check_memory([g for on_device in of_device.values() for g in on_device.values()])
        elsewhere = len(of_device) > 1 or (exchange is not None and exchange.adds)
        wide = any(p.dtype == torch.float64 for p in params if elsewhere or p.grad is not None)
        parts = [_make_part(backend, device, g, len(params), wide) for device, g in of_device.items()]
        return cls(parts, exchange if exchange is not None and exchange.adds else None, dtensors, wide)

    def run(self, max_norm: float | None, limit: float | None) -> Tensor:
        """Returns the norm, if there is a max_norm. Infinity only measures."""
        scales = limit is not None or max_norm != math.inf
        if max_norm is None or (len(self.parts) == 1 and self.exchange is None):
            for part in self.parts:
                part.run(max_norm, limit)
        else:
            for part in self.parts:
                part.measure()
            refusals = combine(self.parts, self.exchange, of_tensors=False)
            if refusals.device.type == "cpu" and refusals.item() != 0:
                raise RefusedElsewhere
            self.refusals = refusals if self.exchange is not None and refusals.device.type != "cpu" else None
            for part in self.parts:
                part.reduce()
                if self.exchange is not None and self.exchange.size == 0 and self.exchange.sum is not None:
                    part.stats[0] = reference.norm_of([self.exchange.sum], False)
                if scales:
                    part.update(max_norm, limit, self.refusals)
        if scales:
            self._count()
        return self.parts[0].stats[0].to(self.dtype)

    def scale(self, max_norm: float) -> None:
        """After a norm was measured."""
        for part in self.parts:
            part.update(max_norm, None, self.refusals)
        self._count()

    def _count(self) -> None:
        """A DTensor has a version counter of its own."""
        if self.dtensors:
            _versions.by_torch(self.dtensors)


def _check(p: Tensor, g: Tensor, i: int, sharded: bool) -> None:
    """Raises ValueError for a gradient that kernels cannot take."""
    shard = g
    if sharded:
        if not is_dtensor(g) or g.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
            kind = type(g).__name__
            raise ValueError(f"the gradient of parameter {i} is no DTensor on its parameter's mesh, but a {kind}")
        shard = local(g)
        if shard.dtype != g.dtype or shard.layout != g.layout or shard.device != g.device:
            raise ValueError(
                f"the gradient of parameter {i} has a shard of {shard.dtype}, {shard.layout}, {shard.device}"
            )
        if same_layout(p, g) and shard.shape != local(p).shape:
            raise ValueError(f"the gradient of parameter {i} has a shard of shape {tuple(shard.shape)}")
    plain = type(shard) is Tensor or (sharded and hasattr(shard, "wait"))  # see aligned
    if not plain or g.dtype not in DTYPES or g.layout != torch.strided or g.device != p.device or g.shape != p.shape:
        raise ValueError(
            f"the gradient of parameter {i} ({type(shard).__name__}, {g.dtype}, {g.layout}, shape {tuple(g.shape)}) "
            "cannot be clipped together with others' parts"
        )


def _check_memory(grads: list[Tensor]) -> None:
    """Raises ValueError if two elements are at one place."""
    if _native._C is not None:  # which sees in a tenth of the time that nothing is unusual
        look = _native._C.Look({}, [], [], [], [], None, EMA, False, None)
        if False not in look.at(grads) and look.all_apart():
            return
    if any(g.is_neg() or overlaps_itself(g) for g in grads) or sharing(grads) is not None:
        raise ValueError("gradients share memory, and all elements are scaled side by side: use .clone()")


def _make_part(backend: str | None, device: torch.device, grads: dict[int, Tensor], size: int, wide: bool) -> Part:
    chosen = _backends.choose(backend, device)
    if chosen == "reference":
        return _EagerPart(device, grads, size, wide)
    return _NativePart(chosen, device, grads, size, wide)


class _NativePart:
    """With compiled kernels, or Triton's."""

    def __init__(self, backend: str, device: torch.device, grads: dict[int, Tensor], size: int, wide: bool) -> None:
        assert _native._C is not None
        self.device, self.grads = device, list(grads.values())
        self.stream = stream_of(device)
        with device_guard(device):
            self.stats = torch.empty(2, dtype=torch.float64, device=device)
            self.numbers = torch.zeros(size + 1, dtype=torch.float64, device=device)
            launcher = make_launcher(backend, device)
            self.clipper = _native._C.Clipper(launcher, self.stats.data_ptr(), self.numbers, list(grads), size, wide)
            torch.ops.fusedoptim._hand_over(self.grads, self.clipper.number)

    def run(self, max_norm: float | None, limit: float | None) -> None:
        with device_guard(self.device):
            measures = max_norm is not None
            self.clipper.run(self.stream(), measures, _off_below_0(max_norm), _off_below_0(limit))
        self._count(max_norm, limit)

    def measure(self) -> None:
        with device_guard(self.device):
            self.clipper.measure(self.stream())

    def reduce(self) -> None:
        with device_guard(self.device):
            self.clipper.reduce(self.stream())

    def update(self, max_norm: float | None, limit: float | None, refusals: Tensor | None = None) -> None:
        found = None if refusals is None else refusals.to(self.device, torch.float32)
        with device_guard(self.device):
            address = 0 if found is None else found.data_ptr()
            self.clipper.update(self.stream(), _off_below_0(max_norm), _off_below_0(limit), address)
        self._count(max_norm, limit)

    def _count(self, max_norm: float | None, limit: float | None) -> None:
        if _off_below_0(max_norm) >= 0 or limit is not None:
            _versions.by_torch(self.grads)


def _off_below_0(x: float | None) -> float:
    return -1.0 if x is None or x == math.inf else x


class _EagerPart:
    """With the functions of fusedoptim.reference."""

    def __init__(self, device: torch.device, grads: dict[int, Tensor], size: int, wide: bool) -> None:
        self.grads, self.wide = grads, wide
        self.numbers = torch.zeros(size + 1, dtype=torch.float64, device=device)
        self.stats = torch.full((2,), math.nan, dtype=torch.float64, device=device)

    def run(self, max_norm: float | None, limit: float | None) -> None:
        if max_norm is not None:
            self.measure()
            self.reduce()
        if limit is not None or _off_below_0(max_norm) >= 0:
            self.update(max_norm, limit)

    def measure(self) -> None:
        for i, g in self.grads.items():
            self.numbers[i] = reference.sum_of_squares(g.to(compute_dtype(g)))

    def reduce(self) -> None:
        self.stats[0] = reference.norm_of(list(self.numbers[:-1]), self.wide)

    def update(self, max_norm: float | None, limit: float | None, refusals: Tensor | None = None) -> None:
        if refusals is not None and refusals.item() != 0:
            return
        norm = self.stats[0].to(torch.float64 if self.wide else torch.float32)
        group = {"max_grad_norm": max_norm, "clip_grad_value": limit}
        for g in self.grads.values():
            g.copy_(reference.clipped(g.to(compute_dtype(g)), norm, group))

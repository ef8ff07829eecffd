"""Which backend steps a device's parameters, and why not another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _native

#: Names that the ``backend=`` argument takes.
NAMES = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """``problem`` says why it cannot be used here and what to do about it; None if it can. ``devices`` are the device
    types whose parameters it steps; None means all of them."""

    name: str
    devices: tuple[str, ...] | None
    problem: Callable[[], str | None]


def _cpu_problem() -> str | None:
    return _native.problem


def _cuda_problem() -> str | None:
    return "this version of fusedoptim has no CUDA kernels"


def _triton_problem() -> str | None:
    return "this version of fusedoptim has no Triton kernels"


BACKENDS = {
    b.name: b
    for b in (
        Backend("cuda", ("cuda",), _cuda_problem),
        Backend("triton", ("cuda", "xpu"), _triton_problem),
        Backend("cpu", ("cpu",), _cpu_problem),
        Backend("reference", None, lambda: None),
    )
}

_warned: set[str] = set()


def check_name(name: str | None) -> None:
    """Raises ValueError for a backend that does not exist, RuntimeError for one that cannot be used here."""
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; choose one of {', '.join(map(repr, NAMES))}, or None")
    problem = BACKENDS[name].problem()
    if problem is not None:
        raise RuntimeError(f"backend={name!r} cannot be used: {problem}. backend=None takes the best that there is")


def choose(name: str | None, device: torch.device) -> str:
    """The backend for a device: the one asked for, else the first that can. Warns once if that is the slow one."""
    if name is not None:
        devices = BACKENDS[name].devices
        if devices is not None and device.type not in devices:
            raise ValueError(
                f"backend={name!r} cannot step parameters on {device}: it handles {' and '.join(devices)}. "
                "Use backend=None, which chooses per device"
            )
        return name
    causes = []
    for b in BACKENDS.values():
        if b.devices is None or device.type not in b.devices:
            continue
        problem = b.problem()
        if problem is None:
            return b.name
        causes.append(f"{b.name}: {problem}")
    if device.type not in _warned:
        _warned.add(device.type)
        cause = "; ".join(causes) or f"no backend has kernels for {device.type!r} devices"
        warnings.warn(
            f"fusedoptim steps parameters on {device.type!r} with its eager reference, correctly and slowly ({cause}). "
            "Run `python -m fusedoptim` for details, or pass backend='reference' to say that you want it.",
            stacklevel=2,
        )
    return "reference"

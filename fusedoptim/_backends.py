"""Which backend steps a device's parameters, and why not another."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _native, reference
from ._rule import Rule
from ._warnings import warn

#: Names that the ``backend=`` argument takes.
NAMES = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """``problem(device)`` says why it cannot be used here, on a device or (None) at all, and what to do about it; None
    if it can. ``devices`` are the device types whose parameters it steps; None means all of them."""

    name: str
    devices: tuple[str, ...] | None
    problem: Callable[[torch.device | None], str | None]
    #: Whether it keeps the states called "step" on the parameters' device.
    steps_on_device: bool = False

    def takes(self, device: torch.device) -> bool:
        return self.devices is None or device.type in self.devices


def _cpu_problem(device: torch.device | None) -> str | None:
    return _native.problem


def _cuda_problem(device: torch.device | None) -> str | None:
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs, and this is a ROCm build of torch"
    problem = _native.cuda_problem()
    if problem is not None or cuda_on_host():
        return problem
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; see what torch.cuda.init() says"
    return None if device is None else _native.cuda_device_problem(device.index or 0)


def _triton_problem(device: torch.device | None) -> str | None:
    problem = _native.triton_problem()
    if problem is not None or triton_interprets():
        return problem
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch finds no GPU"
    return None


def triton_interprets() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU: slowly, for tests and for looking into kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cuda_on_host() -> bool:
    """Whether the CUDA kernels that are loaded were compiled for the host, for tests. They then step CPU parameters."""
    return _native._C is not None and bool(_native._C.cuda_on_host())


BACKENDS = {
    b.name: b
    for b in (
        Backend("cuda", ("cuda",) if torch.version.hip is None else (), _cuda_problem, steps_on_device=True),
        Backend("triton", ("cuda", "xpu"), _triton_problem, steps_on_device=True),
        Backend("cpu", ("cpu",), _cpu_problem),
        Backend("reference", None, lambda device: None),
    )
}

_warned: set[str] = set()


def check_name(name: str | None) -> None:
    """Raises ValueError for a backend that does not exist, RuntimeError for one that cannot be used here."""
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; choose one of {', '.join(map(repr, NAMES))}, or None")
    problem = BACKENDS[name].problem(None)
    if problem is not None:
        raise RuntimeError(f"backend={name!r} cannot be used: {problem}. backend=None takes the best that there is")


def choose(name: str | None, device: torch.device, rule: Rule | None = None) -> str:
    """The backend for a device: the one asked for, else the first that can. Warns once if that is not the first.

    Args:
        rule: the one that is to be stepped; None for one that has kernels.
    """
    if rule is not None and is_own(rule):
        return _for_own(name, device, rule)
    if name is not None:
        backend = BACKENDS[name]
        on_host = (name == "cuda" and cuda_on_host()) or (name == "triton" and triton_interprets())
        if not backend.takes(device) and not (on_host and device.type == "cpu"):
            raise ValueError(
                f"backend={name!r} cannot step parameters on {device}: it handles "
                f"{' and '.join(backend.devices or ())}. Use backend=None, which chooses per device"
            )
        problem = backend.problem(device)
        if problem is not None:
            raise RuntimeError(f"backend={name!r} cannot be used: {problem}")
        return name
    found, causes = with_kernels(device)
    if found is None:
        causes = causes or [f"no backend has kernels for {device.type!r} devices"]
        _warn(device, "its eager reference, correctly and slowly", causes)
        return "reference"
    if causes:
        _warn(device, f"its {found.capitalize()} kernels, which are nearly as fast", causes)
    return found


def for_hidden_shards(chosen: str, asked: str | None) -> str:
    """In place of the chosen one, where DTensors keep their shards where no kernel's table can follow them."""
    if chosen == "reference":
        return chosen
    cause = f"torch {torch.__version__} keeps the shards of DTensors in another place than this version knows"
    if asked is not None:
        raise RuntimeError(f"backend={asked!r} cannot be used: {cause}. Install a newer fusedoptim, or an older torch")
    if "shards" not in _warned:
        _warned.add("shards")
        warn(
            f"{cause}: DTensors are stepped by the eager reference, correctly and slowly. Install a newer fusedoptim, "
            "or an older torch"
        )
    return "reference"


def is_own(rule: Rule) -> bool:
    """Whether it is a user's: kernels compute what the package's own functions specify, and nothing else."""
    return rule.reference is not getattr(reference, rule.name, None)


def _for_own(name: str | None, device: torch.device, rule: Rule) -> str:
    """Its function is compiled for the CPU, and by Triton for everything else."""
    if name == "reference":
        return name
    compiled = "cpu" if device.type == "cpu" else "triton"
    if name is None or name == compiled:
        problem = _own_problem(BACKENDS[compiled], device, rule)
        if problem is None:
            return compiled
        if name is None:
            warn_own(rule, problem)
            return "reference"
        raise RuntimeError(f"backend={name!r} cannot be used for the rule {rule.name!r}: {problem}")
    if name == "triton" and triton_interprets():
        return name
    if name == "cuda":
        raise RuntimeError(
            f"backend='cuda' cannot be used: its kernels come with the package, and the rule {rule.name!r} is a "
            f"function of its own. Leave out backend=, or pass {compiled!r}"
        )
    raise ValueError(
        f"backend={name!r} cannot step parameters on {device}: leave out backend=, which chooses per device"
    )


def _own_problem(backend: Backend, device: torch.device, rule: Rule) -> str | None:
    from .own_rules import compiler, libraries

    if not backend.takes(device):
        return f"no backend has kernels for {device.type!r} devices"
    problem = backend.problem(device) or libraries.excess(rule)
    return problem or (compiler.problem() if backend.name == "cpu" else None)


def warn_own(rule: Rule, cause: str) -> None:
    """That a rule is stepped by its function, once."""
    if rule.name not in _warned:
        _warned.add(rule.name)
        warn(
            f"nothing is compiled for the rule {rule.name!r} ({cause}): its own eager function steps it, correctly and "
            "slowly. backend='reference' says that this is meant"
        )


def with_kernels(device: torch.device) -> tuple[str | None, list[str]]:
    """The first backend that can step a device's parameters with kernels, and why those before it cannot."""
    causes: list[str] = []
    for backend in BACKENDS.values():
        if backend.devices is None or not backend.takes(device):
            continue
        problem = backend.problem(device)
        if problem is None:
            return backend.name, causes
        causes.append(f"{backend.name}: {problem}")
    return None, causes


def _warn(device: torch.device, how: str, causes: list[str]) -> None:
    if device.type in _warned:
        return
    _warned.add(device.type)
    warn(
        f"fusedoptim steps parameters on {device.type!r} with {how} ({'; '.join(causes)}). "
        "Run `python -m fusedoptim` for details, or pass backend= to say which you want."
    )

"""What a measurement was made on and with."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import fusedoptim
from fusedoptim import _native

from ..common.commit import commit
from .devices import Device

#: Distributions whose versions matter where they are installed.
PACKAGES = ["triton", "deepspeed", "bitsandbytes", "apex", "transformer-engine", "torchao", "torch-optimi", "heavyball"]


def _cpu() -> str:
    with contextlib.suppress(OSError):
        name = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        if name:
            return name[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _program() -> str:
    """The module, or the package, that is run."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def environment(device: Device) -> dict[str, object]:
    return {
        "device": device.name,
        "fusedoptim": fusedoptim.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.{_program()} {shlex.join(sys.argv[1:])}".rstrip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": _native._C.cpu_capability() if _native._C else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "cache_bytes": device.cache_bytes(),
        #: Processes that want to run, on average over the last minute, before this run adds its own.
        "load": os.getloadavg()[0],
        **device.describe(),
        "packages": _versions(),
    }


def machine(environment: dict[str, Any]) -> str:
    e = environment
    if e["device"] == "cuda":
        return f"{e['gpu']}, driver {e.get('driver', 'unknown')}, {e['cores']} cores"
    return f"{e['cpu']}, {e['threads']} threads, {e['capability']}"


def source(environment: dict[str, Any]) -> str:
    """The line below a table that says where it comes from."""
    e = environment
    versions = {"torch": e["torch"], **e["packages"]}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    system = f"Python {e['python']}, {e['system']}"
    return f"{machine(e)}; {text}; {system}; commit {e['commit']}, {str(e['date'])[:10]}; `{e['command']}`"

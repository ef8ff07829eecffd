"""``python -m fusedoptim``: what is installed, which backends work here and why the others do not, and whether the
results are right. Exits with 1 if they are not, or if no compiled backend steps the parameters of a device here (the
CPU, a GPU), even where that was wanted."""

from __future__ import annotations

import platform
import sys
import time

import torch

from . import __version__, _installation, _native
from ._backends import BACKENDS, cuda_on_host, with_kernels
from ._selfcheck import OPTIMIZERS, differing


def main() -> int:
    print(
        f"fusedoptim {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    kind = "installed" if _installation.SOURCE_FOLDER is None else "a source folder"
    print(f"package: {_installation.PACKAGE} ({kind})")
    if _native._C is not None:
        c = _native._C
        print(f"library: built with torch {c.torch_version} and compiler {c.compiler}, for torch >= 2.10")
        others = ", ".join(n for n in c.cpu_capabilities() if n != c.cpu_capability())
        print(f"CPU: {c.cpu_capability()} (also here: {others or 'none'}), {torch.get_num_threads()} threads")
    else:
        print(f"library: not available: {_native.problem}")
    print("backends:")
    for backend in BACKENDS.values():
        problem = backend.problem(None)
        if problem is not None and _native.problem is not None:
            problem = problem.replace(_native.problem, "see the library")
        print(f"  {backend.name:<10} {'available' if problem is None else f'not available: {problem}'}")
    failed = False
    for name, device in (("cuda", "cpu" if cuda_on_host() else "cuda"), ("cpu", "cpu")):
        if BACKENDS[name].problem(None) is not None:
            continue
        start = time.perf_counter()
        bad = differing(name, device)
        seconds = time.perf_counter() - start
        result = f"FAILED for {', '.join(bad)}" if bad else "the reference's bits"
        print(f"self-check: {name}, {len(OPTIMIZERS)} optimizers in 4 dtypes: {result} ({seconds:.1f} s)")
        failed = failed or bool(bad)
    if failed:
        print("Results are wrong on this machine: use backend='reference', and please report this output.")
    slow = [
        kind for kind in ("cpu", "cuda", "xpu") if _present(kind) and with_kernels(torch.device(kind, 0))[0] is None
    ]
    if slow:
        print(f"Parameters on {' and '.join(slow)} are stepped by the eager reference, slowly. The causes stand above.")
    return int(failed or bool(slow))


def _present(kind: str) -> bool:
    return kind == "cpu" or bool(getattr(torch, kind).is_available())


if __name__ == "__main__":
    sys.exit(main())

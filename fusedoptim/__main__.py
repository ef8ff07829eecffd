"""``python -m fusedoptim``: what is installed, which backends work here and why the others do not, and whether the
results are right. Exits with 1 if they are not, or if no compiled backend steps the parameters of a device here (the
CPU, a GPU), even where that was wanted."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import torch

from . import __version__, _installation, _native
from ._backends import BACKENDS, Backend, cuda_on_host, with_kernels
from ._selfcheck import COMPILED, OPTIMIZERS, differing
from .own_rules import cache, compiler


def main() -> int:
    print(
        f"fusedoptim {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    wheel = _installation.wheel()
    installed = f"installed from the wheel {wheel}" if wheel else "installed"
    kind = installed if _installation.SOURCE_FOLDER is None else "a source folder"
    print(f"package: {_installation.PACKAGE} ({kind})")
    if _native._C is not None:
        c = _native._C
        print(f"library: built with torch {c.torch_version} and compiler {c.compiler}, for torch >= 2.10")
        others = ", ".join(n for n in c.cpu_capabilities() if n != c.cpu_capability())
        print(f"CPU: {c.cpu_capability()} (also here: {others or 'none'}), {torch.get_num_threads()} threads")
        print(f"kernels that came with it: CPU: {', '.join(c.compiled_cpu_capabilities())}; CUDA: {_cuda_kernels()}")
    else:
        print(f"library: not available: {_native.problem}")
    print("backends:")
    for backend in BACKENDS.values():
        usable, problem = _where(backend)
        if _native.problem is not None:
            problem = problem.replace(_native.problem, "see the library")
        if problem:
            has = f"available on {' and '.join(map(str, usable))}, but " if usable else ""
            problem = f"{has}not available: {problem}"
        print(f"  {backend.name:<10} {problem or 'available'}")
    failed = False
    for name in ("cuda", "cpu"):
        usable, _ = _where(BACKENDS[name])
        if not usable:
            continue
        device = str(usable[0])
        start = time.perf_counter()
        bad = differing(name, device)
        seconds = time.perf_counter() - start
        result = f"FAILED for {', '.join(bad)}" if bad else "the reference's bits"
        print(f"self-check: {name}, {len(OPTIMIZERS)} optimizers in 4 dtypes: {result} ({seconds:.1f} s)")
        failed = failed or bool(bad)
    failed = _check_compiled() or failed
    if failed:
        print("Results are wrong on this machine: use backend='reference', and please report this output.")
    slow = [str(device) for device in _devices() if with_kernels(device)[0] is None]
    if slow:
        print(f"Parameters on {' and '.join(slow)} are stepped by the eager reference, slowly. The causes stand above.")
    return int(failed or bool(slow))


def _cuda_kernels() -> str:
    path = _native.cuda_library()
    if not path.exists():
        return "none"
    for_what = _native.cuda_targets(path) or "a library that does not load, or say for what"
    return for_what + (f" (not its own: {path})" if path.parent != Path(__file__).parent else "")


def _check_compiled() -> bool:
    """Says what rules of one's own are compiled with. Whether one was, and is wrong."""
    problem = (_native.problem and "see the library") or compiler.problem()
    if problem is not None:
        print(f"rules of one's own on the CPU: stepped by their functions, slowly: {problem}")
        return False
    start = time.perf_counter()
    bad = differing("cpu", "cpu", COMPILED)
    result = f"FAILED for {', '.join(bad)}" if bad else "the reference's bits"
    print(f"rules of one's own: compiled with {compiler.compiler()}, {cache.problem() or f'kept in {cache.folder()}'}")
    print(
        f"self-check: {', '.join(COMPILED)}, compiled here, in 4 dtypes: {result} ({time.perf_counter() - start:.1f} s)"
    )
    return bool(bad)


def _devices() -> list[torch.device]:
    """The CPU and the GPUs that torch sees."""
    present = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    gpus = [torch.device(kind, i) for kind in present for i in range(getattr(torch, kind).device_count())]
    return [torch.device("cpu"), *gpus]


def _where(backend: Backend) -> tuple[list[torch.device], str]:
    """The devices here that a backend can step the parameters of, and why it cannot on the others; "" if there are no
    others."""
    problem = backend.problem(None)
    if problem is not None:
        return [], problem
    if backend.name == "cuda" and cuda_on_host():
        return [torch.device("cpu")], ""
    problems = {device: backend.problem(device) for device in _devices() if backend.takes(device)}
    causes = dict.fromkeys(problem for problem in problems.values() if problem is not None)  # alike for GPUs of a kind
    return [device for device, problem in problems.items() if problem is None], "; ".join(causes)


if __name__ == "__main__":
    sys.exit(main())

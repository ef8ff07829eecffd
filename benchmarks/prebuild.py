"""``python -m benchmarks.prebuild OUTDIR``: compiled libraries for another machine's Python, torch and GPU, made here.

In a virtual environment with that torch, from a clean export of the commit. ``--install DIR``, on the other machine,
puts them in place if they are of its sources and load there, and builds otherwise. Works without torch around it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .common import arguments
from .common.arguments import UsageError
from .common.commit import commit
from .common.files import make_folder
from .gpu.plans import GPU_TESTS, QUOTIENTS

ROOT = Path(__file__).parent.parent
REPORT, CUDA = "_build.json", "_C_cuda.so"
PACKAGES = ("setuptools>=70.1", "ninja", "pybind11", "numpy", "pytest", "pytest-xdist", "hypothesis")
#: The CUDA kernels in other ways, for benchmarks.ab: what nvcc is told.
VARIANTS = {"branching": "-DFUSEDOPTIM_BRANCHING_QUOTIENTS", "six-blocks": "-DFUSEDOPTIM_BLOCKS=6"}
#: Exits with the reason if one of the libraries does not load, which needs no GPU.
LOADS = "import sys; from fusedoptim import _native; sys.exit(_native.problem or _native.cuda_problem())"

#: The digest of all that libraries are made from, in a folder. By its file, because the package needs torch.
sources = runpy.run_path(str(ROOT / "fusedoptim" / "_digest.py"))["sources"]


def libraries(folder: Path) -> list[Path]:
    return [*folder.glob("_C.*.so"), *folder.glob("_C_cuda*.so")]


def say(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Runs a command and shows it. Raises UsageError if it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([*map(str, command)], cwd=cwd or ROOT, env={**os.environ, **environment})
    if done.returncode:
        raise UsageError(f"{command[0]} failed with exit code {done.returncode}")


# ---- on the machine that they are for ----


def unfit(folder: Path) -> str | None:
    """Why the libraries in the folder are not to be used."""
    try:
        report = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError) as error:
        return f"there are none in {folder} ({error})"
    # Not by the commit's name, which a note of what was measured in between changes.
    if report.get("sources") != sources(ROOT):
        return "csrc or setup.py have changed since"
    return None


def install(folder: Path | None) -> int:
    """Takes what was made beforehand, else builds. 0 if both libraries load in the end."""
    package = ROOT / "fusedoptim"
    why = "none were given" if folder is None else unfit(folder)
    if folder is not None and why is None:
        for path in [*libraries(folder), folder / REPORT]:
            shutil.copy(path, package)
        loaded = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True)
        if loaded.returncode == 0:
            of = json.loads((folder / REPORT).read_text())["commit"]
            print(f"libraries made beforehand, of commit {of}, whose sources are those of {commit()}")
            return 0
        why = (loaded.stderr.strip().splitlines() or ["they do not load"])[-1]
    print(f"building, because libraries made beforehand are not used: {why}", flush=True)
    for path in libraries(package):
        path.unlink()
    start = time.monotonic()
    say(sys.executable, "setup.py", "build_ext", "--inplace", FUSEDOPTIM_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    say(sys.executable, "-c", LOADS)
    print(f"libraries built here in {time.monotonic() - start:.0f} s")
    return 0


# ---- beforehand ----


def interpreter(version: str) -> str:
    """A Python of that version: on the PATH or among pyenv's. Others of that name may be no more than a pointer."""
    for found in (f"python{version}", *sorted(glob.glob(f"{Path.home()}/.pyenv/versions/{version}*/bin/python"))):
        try:
            done = subprocess.run([found, "-V"], capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.startswith(f"Python {version}."):
            return found
    raise UsageError(f"no Python {version} was found: name one with --python")


def environment(folder: Path, python: str | None, version: str, torch: str) -> Path:
    """The Python of a virtual environment with that torch, which is made if it is not there."""
    inside = folder / "bin" / "python3"
    if not inside.exists():
        say(python or interpreter(version), "-m", "venv", folder)
    asked = [inside, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if found.partition("+")[0] != torch:
        say(inside, "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES)
    return inside


def export(folder: Path) -> str:
    """Puts the commit's files there. Returns the commit's name."""
    name = commit()
    if name.endswith("+changes"):
        raise UsageError("tracked files have changed: commit them")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True)
    if archive.returncode:
        raise UsageError(f"git archive failed: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return name


def build(python: Path, out: Path, architectures: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        name = export(tree)
        options = {"TORCH_CUDA_ARCH_LIST": architectures, "FUSEDOPTIM_BUILD_CUDA": "1"}
        say(python, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **options)
        say(python, "-c", LOADS, cwd=tree)
        say(python, "-m", "fusedoptim", cwd=tree)
        # What the GPU's minutes are for should not fail for want of an import.
        options_of_tests = ("-q", "-o", "addopts=", "--collect-only", "-m", "gpu", *GPU_TESTS.split(), QUOTIENTS)
        say(python, "-m", "pytest", *options_of_tests, cwd=tree)
        report = json.loads((tree / "fusedoptim" / REPORT).read_text())
        for path in libraries(out):
            path.unlink()
        for path in libraries(tree / "fusedoptim"):
            shutil.copy(path, out)
        for variant, flags in VARIANTS.items():
            (tree / "fusedoptim" / CUDA).unlink()
            say(python, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **options, NVCC_APPEND_FLAGS=flags)
            shutil.copy(tree / "fusedoptim" / CUDA, out / f"_C_cuda.{variant}.so")
        report |= {"commit": name, "architectures": architectures}
        (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def needs(path: Path) -> str:
    """The newest versions of the system's libraries that it asks for."""
    table = subprocess.run(["objdump", "-T", str(path)], capture_output=True, text=True).stdout
    newest = {}
    for name, number in re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", table):
        newest[name] = max(newest.get(name, (0,)), tuple(map(int, number.split("."))))
    return ", ".join(f"{name} {'.'.join(map(str, number))}" for name, number in sorted(newest.items()))


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.prebuild", description=__doc__)
    p.add_argument("out", metavar="OUTDIR", type=Path, nargs="?", help="where to put them, for example build/prebuilt")
    p.add_argument("--install", metavar="DIR", help="take them from there into this checkout, or build ('none': build)")
    p.add_argument("--venv", type=Path, default=ROOT / "build" / "venv", help="(default: build/venv)")
    p.add_argument("--python", help="the interpreter to make it with")
    p.add_argument("--version", default="3.12", help="of Python (default: 3.12)")
    p.add_argument("--torch", default="2.11.0", help="its version (default: 2.11.0)")
    p.add_argument("--architectures", default="9.0", help="as in TORCH_CUDA_ARCH_LIST (default: 9.0)")
    args = p.parse_args(argv)
    if (args.out is None) == (args.install is None):
        p.error("give either OUTDIR or --install DIR")
    if args.install is not None:
        return install(None if args.install == "none" else Path(args.install).resolve())
    make_folder(args.out, "OUTDIR")
    python = environment(args.venv.absolute(), args.python, args.version, args.torch)
    build(python, args.out, args.architectures)
    for path in libraries(args.out):
        print(f"{path}: {path.stat().st_size >> 10} KiB, needs {needs(path)}")
    name = json.loads((args.out / REPORT).read_text())["commit"]
    print(f"there: bash benchmarks/gpu_check.sh OUTDIR --plan first --commit {name} --prebuilt {args.out}")
    return 0


if __name__ == "__main__":
    arguments.run(main)

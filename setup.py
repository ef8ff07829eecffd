"""Builds the compiled part of fusedoptim. Installing never fails for want of a compiler: what could not be built is
left out, said here and, with its cause, by ``python -m fusedoptim``.

Environment: FUSEDOPTIM_BUILD_CUDA=0 leaves the CUDA kernels out, 1 builds them for a torch without CUDA, too;
or the path of a _C_cuda.so takes that one;
TORCH_CUDA_ARCH_LIST says for which GPUs, MAX_JOBS how many processes compile at once."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

torch_version: str | None = None
missing: str | None = None
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    torch_version = torch.__version__
    if shutil.which(get_cxx_compiler()) is None:
        missing = (
            f"no C++ compiler called {get_cxx_compiler()!r} was found: "
            "install one (Debian, Ubuntu: apt-get install g++) or set CXX"
        )
except ImportError as error:
    BuildExtension = build_ext

    def CppExtension(name: str, sources: list[str], **_: object) -> Extension:
        return Extension(name, sources)

    missing = f"torch could not be imported while building ({error}): install it first (pip install torch)"

HERE = Path(__file__).parent.absolute()
#: The CUDA kernels are a library of their own, which needs nothing of torch.
CUDA_SOURCES = [HERE / "csrc" / "cuda" / name for name in ("launch.cu", "old_glibc.cpp")]
SOURCES = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp") if p not in CUDA_SOURCES)
FLAGS = [
    "-O3",
    "-g0",
    # Exact results: no contraction of a*b + c. The other two let the compiler vectorise, and change no value.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
    "-Wno-uninitialized",  # false alarms in GCC 12's own AVX-512 header
    "-Wno-maybe-uninitialized",
    "-Wno-unused-parameter",  # in torch's stable headers
    # The oldest torch that the library is to run on.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# For the tests: memory errors and undefined behaviour in the kernels end the process. -O1, as -O0, takes half as long
# again to compile.
LINK_FLAGS: list[str] = []
#: "1", or the instruction set whose loops are compiled beside the portable ones: those of each take minutes.
SANITIZE = os.environ.get("FUSEDOPTIM_SANITIZE", "")
if SANITIZE:
    FLAGS = [f for f in FLAGS if f != "-g0"] + ["-Og", "-g1", "-fno-omit-frame-pointer"]
    LINK_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    FLAGS += LINK_FLAGS
    for name in {"avx2", "avx512"} - {SANITIZE} if SANITIZE != "1" else ():
        SOURCES.remove(str(Path("csrc", "cpu", f"kernels_{name}.cpp")))
        FLAGS.append(f"-DFUSEDOPTIM_WITHOUT_{name.upper()}")


# ---- the CUDA kernels ----

#: Unless the environment says otherwise, they are built where torch is a CUDA build.
BUILD_CUDA = os.environ.get("FUSEDOPTIM_BUILD_CUDA", "")
if BUILD_CUDA not in ("", "0", "1") and not Path(BUILD_CUDA).is_file():
    raise SystemExit(
        f"FUSEDOPTIM_BUILD_CUDA={BUILD_CUDA!r} is unknown: 0 leaves the CUDA kernels out, 1 builds them in any case, "
        "the path of a _C_cuda.so that was built from the same sources takes that, and without it they are built where "
        "torch is a CUDA build and nvcc is found"
    )
NVCC_FLAGS = [
    *("-shared", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    # Exact results, as above. Division and square roots are IEEE by default.
    "-fmad=false",
    # The driver is all that it needs to find when it runs.
    *("-cudart", "static"),
    # GPUs side by side.
    *("--threads", os.environ.get("MAX_JOBS") or "0"),
]


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes[:2] if home), "nvcc"]
    return next((found for c in (*candidates, f"{homes[2]}/bin/nvcc") if c and (found := shutil.which(c))), None)


#: Machine code for GPUs from Turing on, as far as the compiler knows them; it serves later ones of the same major
#: version, too. Those of other versions get theirs from PTX, by the driver's compiler.
EVERYWHERE = "7.5;8.0;9.0+PTX;10.0;12.0"


def architectures(nvcc: str) -> list[str]:
    """nvcc's options for the GPUs to build for: those of TORCH_CUDA_ARCH_LIST, else those here, else EVERYWHERE."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
    if not wanted:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        known = [item for item in EVERYWHERE.split(";") if f"compute_{item.split('+')[0].replace('.', '')}" in listed]
        wanted = ";".join(known) or "8.0+PTX"
    options = []
    for item in re.split(r"[;, ]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {item!r}; items look like 8.0 or 9.0+PTX")
        number = match[1] + match[2]
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return options


def say(text: str) -> None:
    print(f"fusedoptim: {text}", flush=True)


def run_and_say(command: list[str], name: str, every: float = 30.0) -> tuple[int, str]:
    """Runs a command, and shows that it still does. Returns its exit code and what it printed."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while True:
        try:
            output, _ = process.communicate(timeout=every)
        except subprocess.TimeoutExpired:
            say(f"{name} has run for {time.monotonic() - start:.0f} s")
        else:
            say(f"{name} took {time.monotonic() - start:.0f} s")
            return process.returncode, output


def build_cuda(target: Path, memory: Path) -> str | None:
    """Builds target/_C_cuda.so; returns why that was not possible. ``memory`` keeps the command of the last build."""
    if BUILD_CUDA == "0":
        return "FUSEDOPTIM_BUILD_CUDA=0 left them out: unset it"
    library = target / "_C_cuda.so"
    if BUILD_CUDA not in ("", "1"):
        memory.unlink(missing_ok=True)  # of a library that was compiled here
        if not (library.exists() and library.samefile(BUILD_CUDA)):
            shutil.copy(BUILD_CUDA, copy := library.with_suffix(".new"))
            os.replace(copy, library)  # a process that runs the old one keeps it
        return None
    if torch_version is None or missing is not None:
        return missing
    if torch.version.cuda is None and BUILD_CUDA != "1":
        return "torch is not a CUDA build: install one (https://pytorch.org)"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found: install the CUDA toolkit or set CUDA_HOME"
    command = [nvcc, *NVCC_FLAGS, *architectures(nvcc), *map(str, CUDA_SOURCES), "-o", str(library)]
    read = [*CUDA_SOURCES, *(p for p in (HERE / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))]
    newest = max(p.stat().st_mtime for p in read)
    line = " ".join(command)
    unchanged = memory.exists() and memory.read_text() == line
    if unchanged and library.exists() and library.stat().st_mtime > newest:
        return None
    print(line, flush=True)
    targets = ", ".join(re.findall(r"code=(\w+)", line))
    say(f"nvcc compiles the CUDA kernels for {targets}: half a minute of one core for each")
    say("FUSEDOPTIM_BUILD_CUDA=0 leaves them out; TORCH_CUDA_ARCH_LIST=9.0 is for one kind of GPU")
    code, output = run_and_say(command, "nvcc")
    if code != 0:
        print(output, flush=True)
        errors = [text for text in output.splitlines() if "error" in text.lower()]
        return f"nvcc failed: {errors[0] if errors else output.strip()[-500:]}"
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(line)
    return None


def copy_headers(to: Path) -> None:
    """What rules of one's own are compiled with travels with the package (fusedoptim/own_rules/compiler.py)."""
    for part in ("core", "cpu", "rules"):
        (to / part).mkdir(parents=True, exist_ok=True)
        for header in (HERE / "csrc" / part).glob("*.h"):
            shutil.copy(header, to / part)


class BuildWhatCanBeBuilt(BuildExtension):
    """torch's own build command, which here reports instead of failing."""

    def run(self) -> None:
        digest = runpy.run_path(str(HERE / "fusedoptim" / "_digest.py"))["sources"](HERE)
        report = {"torch": torch_version, "sources": digest, "cpu": None, "cuda": None}
        self.write_header(digest)
        target = (HERE if self.inplace or self.editable_mode else Path(self.build_lib)) / "fusedoptim"
        target.mkdir(parents=True, exist_ok=True)
        if target.parent != HERE:
            copy_headers(target / "include")
        with ThreadPoolExecutor(1) as beside:  # half a minute of one core for each kind of GPU
            cuda = beside.submit(build_cuda, target, Path(self.build_temp) / "_C_cuda.command")
            try:
                if missing is not None:
                    raise RuntimeError(missing)
                super().run()
            except Exception as error:
                traceback.print_exc()
                report["cpu"] = f"{type(error).__name__}: {error}".strip()[:2000]
                (target.parent / self.get_ext_filename("fusedoptim._C")).unlink(missing_ok=True)  # it would not fit
                self.extensions = []
                say(f"installing without its compiled kernels: {report['cpu']}")
        try:
            report["cuda"] = cuda.result()
        except Exception as error:
            report["cuda"] = f"{type(error).__name__}: {error}"
        if report["cuda"]:
            (target / "_C_cuda.so").unlink(missing_ok=True)  # it would not fit
            say(f"installing without its CUDA kernels: {report['cuda']}")
        (target / "_build.json").write_text(json.dumps(report, indent=1) + "\n")

    def write_header(self, digest: str) -> None:
        """Tells module.cpp what the library is made from. As an option of the compiler's, it would make it compile
        all files anew."""
        header = Path(self.build_temp).absolute() / "generated" / "fusedoptim_sources.h"
        text = f'#define FUSEDOPTIM_SOURCES "{digest}"\n'
        if not header.exists() or header.read_text() != text:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)
        for extension in self.extensions:
            extension.include_dirs.append(str(header.parent))


setup(
    ext_modules=[CppExtension("fusedoptim._C", SOURCES, extra_compile_args={"cxx": FLAGS}, extra_link_args=LINK_FLAGS)],
    cmdclass={"build_ext": BuildWhatCanBeBuilt},
)

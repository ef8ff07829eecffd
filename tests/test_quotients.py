"""The CUDA kernels' roots and quotients without branches (csrc/cuda/lanes.cuh): IEEE's bits, or something
that has the element worked out again."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import FLAGS, WARNINGS

from benchmarks.gpu.toolkit import tool

SOURCE = Path(__file__).parent / "cuda_host" / "quotients.cu"
#: Numbers to go through, and which of them on the host: all floats; all mantissas of a divisor; made up ones.
SWEEPS = {"roots": (1 << 32, 251), "divisors": (1 << 23, 1), "ratios": (1 << 33, 4099)}
#: What share of them may be refused: all would be right as well.
REFUSED = {"roots": 0.1, "divisors": 0.0, "ratios": 0.5}


class Counts(ctypes.Structure):
    _fields_ = (("checked", ctypes.c_uint64), ("wrong", ctypes.c_uint64), ("refused", ctypes.c_uint64))


def sweep(library: Path, name: str) -> Counts:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes = [ctypes.c_uint64] * 3 + [ctypes.c_void_p]
    count, stride = SWEEPS[name]
    counts = Counts()
    assert function(0, count, stride, ctypes.addressof(counts)) == 0
    return counts


def check(counts: Counts, name: str) -> None:
    assert counts.wrong == 0, f"{counts.wrong} of {counts.checked}"
    assert counts.checked > 1_000_000
    assert counts.refused <= counts.checked * REFUSED[name]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quotients") / "host.so"
    model = SOURCE.with_name("cuda_on_host.h")
    fused = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text() else []
    command = ["g++", *FLAGS, *WARNINGS, *fused, "-include", str(model), "-x", "c++", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", SWEEPS)
def test_on_the_host(on_host: Path, name: str) -> None:
    check(sweep(on_host, name), name)


def compiled(folder: Path, architecture: str) -> Path:
    target = folder / "gpu.so"
    flags = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-arch={architecture}", "-shared"]
    subprocess.run(
        [tool("nvcc"), *flags, "-Xcompiler", "-fPIC,-fvisibility=hidden", str(SOURCE), "-o", str(target)], check=True
    )
    return target


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("quotients"), "native")


needs_nvcc = pytest.mark.skipif(shutil.which(tool("nvcc")) is None, reason="needs nvcc")


@needs_nvcc
def test_what_runs_on_a_gpu_compiles_without_one(tmp_path: Path) -> None:
    assert compiled(tmp_path, "sm_90").exists()


@pytest.mark.gpu
@needs_nvcc
@pytest.mark.parametrize("name", SWEEPS)
def test_on_a_gpu(on_gpu: Path, name: str) -> None:
    """With the hardware's own approximations."""
    check(sweep(on_gpu, name), name)

"""What a step cannot be faster than: a copy within the device's memory, and a plain pass with its reads and writes.

Neither depends on the size beyond the caches, so both take sizes of their own and are compared by bandwidth.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .devices import MIB, Call, Device
from .optimizers import Work

COPY_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}
#: Elements of the plain pass, unless the case has fewer.
STREAM_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}


@dataclass(frozen=True)
class Limit:
    """A call, and the bytes that it reads and writes."""

    call: Call
    bytes: int


def copy(device: Device) -> Limit:
    """torch's own copy, which is a memcpy in parallel or a device-to-device copy."""
    source, target = (_array(COPY_BYTES[device.name] // 4, torch.float32, device) for _ in range(2))
    return Limit(lambda: target.copy_(source), 2 * source.nbytes)


def stream(device: Device, work: Work, elements: int) -> Limit:
    """On the CPU the C loop of stream.c, on a GPU the Triton kernel of stream_triton.py.

    Raises OSError, ImportError or subprocess.CalledProcessError where there is no C compiler with OpenMP, or no Triton.
    """
    n = min(elements, STREAM_ELEMENTS[device.name])
    n -= n % 2  # whole words of two 16-bit elements
    dtypes = work.dtypes
    gradient = _array(n, dtypes.param, device)
    written = [_array(n, dtype, device) for dtype in work.written]
    return Limit(_PASSES[device.name](written, gradient, n), gradient.nbytes + 2 * sum(a.nbytes for a in written))


def memory(device: Device, work: Work) -> int:
    """What both take up."""
    resident = work.resident_per_element + work.dtypes.param.itemsize
    return 2 * COPY_BYTES[device.name] + int(STREAM_ELEMENTS[device.name] * resident)


def _array(n: int, dtype: torch.dtype, device: Device) -> Tensor:
    return torch.ones(n, dtype=dtype, device=device.torch_device)


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*command, str(source), "-o", str(target)], check=True, capture_output=True)
        return ctypes.CDLL(str(target))


def _in_c(written: list[Tensor], gradient: Tensor, n: int) -> Call:
    library = _library()
    size = gradient.dtype.itemsize
    same = [a for a in written[1:] if a.dtype.itemsize == size]
    others = [a for a in written[1:] if a.dtype.itemsize != size]
    arrays = [written[0], gradient, *same, *others]
    pointers = (ctypes.c_void_p * 5)(*(a.data_ptr() for a in arrays))
    wide = bool(others) and others[0].dtype.itemsize > size
    words = ctypes.c_ssize_t(n * size // 4)

    def run(keep: object = arrays) -> None:
        library.stream(pointers, len(same), len(others), int(wide), words)

    return run


def _in_triton(written: list[Tensor], gradient: Tensor, n: int) -> Call:
    from .stream_triton import stream as launch

    return lambda: launch(written, gradient, n)


_PASSES: dict[str, Callable[[list[Tensor], Tensor, int], Call]] = {"cpu": _in_c, "cuda": _in_triton}

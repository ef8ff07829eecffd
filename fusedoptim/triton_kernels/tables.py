"""Offsets, in bytes, and constants of the tables on the device, by their names in csrc/cuda/table_layout.h."""

from __future__ import annotations

import zlib

import triton.language as tl

from .._native import _C

assert _C is not None
_LAYOUT = _C.table_layout()
#: An argument of every kernel: Triton's cache on disk sees the names of offsets, but not their values.
DIGEST = zlib.crc32(repr(sorted(_LAYOUT.items())).encode())


def __getattr__(name: str) -> tl.constexpr:
    if name not in _LAYOUT:
        raise AttributeError(name)
    return tl.constexpr(_LAYOUT[name])

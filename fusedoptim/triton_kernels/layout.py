"""Offsets, in bytes, and constants of the tables on the device, by their names in csrc/gpu/table_layout.h."""

from __future__ import annotations

import zlib
from types import ModuleType

import triton.language as tl

from .._native import _C

assert _C is not None
_LAYOUT = _C.table_layout()


def of_rule(name: str) -> ModuleType:
    """The columns of a compiled rule's hyper-parameters in a group's row, and the numbers of its states, by name:
    ``BETAS_0`` is that of ``betas[0]``. A module, because kernels may look into nothing else."""
    rule = _C.find_rule(name)
    assert rule is not None, name
    found = ModuleType(name)
    for key, value in rule.layout.items():
        setattr(found, key, tl.constexpr(value))
    return found


#: An entry's kind, as kernels take it (update.py): the width of its first fields, and where the others begin.
BITS, _OPERANDS = 4, _LAYOUT["OPERANDS"]
WIDTH, MASK = tl.constexpr(BITS), tl.constexpr((1 << BITS) - 1)
STEP, VARIANT, USED = (tl.constexpr(BITS * (_OPERANDS + k)) for k in range(3))
#: How many of an entry's operands are states.
STATES = _LAYOUT["OPERANDS"] - _LAYOUT["FIRST_STATE"]
#: An argument of every kernel: Triton's cache on disk sees the names of offsets, but not their values.
DIGEST = zlib.crc32(
    repr([sorted(_LAYOUT.items()), [sorted(_C.find_rule(r).layout.items()) for r in _C.rules()]]).encode()
)


def __getattr__(name: str) -> tl.constexpr:
    if name not in _LAYOUT:
        raise AttributeError(name)
    return tl.constexpr(_LAYOUT[name])

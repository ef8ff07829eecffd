"""Offsets, in bytes, and constants of the tables on the device, by their names in csrc/gpu/table_layout.h."""

from __future__ import annotations

import zlib

import triton.language as tl

from .._native import _C

assert _C is not None
_LAYOUT = _C.table_layout()


#: An entry's kind, as kernels take it (update.py): the width of its first fields, and where the others begin.
BITS, _OPERANDS = 4, _LAYOUT["OPERANDS"]
WIDTH, MASK = tl.constexpr(BITS), tl.constexpr((1 << BITS) - 1)
STEP, VARIANT, USED, HALVES = (tl.constexpr(BITS * (_OPERANDS + k)) for k in (0, 1, 3, 5))
VARIANT_MASK = tl.constexpr(0xFF)
WORDS, IN_BLOCKS = (tl.constexpr(HALVES.value + BITS * (_LAYOUT["MAX_SLOTS"] + k)) for k in (0, 1))
#: Random words that an element may need: one has bits for two operands.
MAX_WORDS = tl.constexpr((_LAYOUT["MAX_SLOTS"] + 3) // 2)
_STOCHASTIC = [_LAYOUT[name] for name in ("BF16_STOCHASTIC", "Q8_STOCHASTIC", "Q8_SQUARES_STOCHASTIC")]
#: An argument of every kernel: Triton's cache on disk sees the names of offsets, but not their values.
DIGEST = zlib.crc32(repr(sorted(_LAYOUT.items())).encode())


def packed(kind: tuple[tuple[int, ...], int, int, int], halves: list[int], used: int | None = None) -> int:
    """What code a tensor needs, as kernels take it: see update.py.

    Args:
        kind: the storages of all operands, the dtype of the step, the variant, and a bit for each state that is used.
        halves: which half of its random words each state is rounded with.
        used: a bit for each operand that is read; by default for all that there are.
    """
    storages, step, variant, states = kind
    first = _LAYOUT["FIRST_STATE"]
    if used is None:
        used = states << first | (1 << first) - 1
    rounded = [(storages[0], 0), *zip(storages[first:], halves, strict=False)]  # but for the moving average
    words = {half // 2 for storage, half in rounded if storage in _STOCHASTIC}
    fields = [
        *((BITS * k, storage) for k, storage in enumerate(storages)),
        (STEP.value, step),
        (VARIANT.value, variant),
        (USED.value, used),
        *((HALVES.value + BITS * k, half) for k, half in enumerate(halves)),
        (WORDS.value, sum(1 << word for word in words)),
        (IN_BLOCKS.value, any(storage >= _LAYOUT["Q8"] and used >> k & 1 for k, storage in enumerate(storages))),
    ]
    return sum(int(value) << at for at, value in fields)


def __getattr__(name: str) -> tl.constexpr:
    if name not in _LAYOUT:
        raise AttributeError(name)
    return tl.constexpr(_LAYOUT[name])

"""The formulas of low precision once more, in the integers of Python and NumPy: what the package's own reference and
every kernel are compared with. Sources: csrc/core/storage.h, block.h and random_bits.h."""

from __future__ import annotations

from typing import Any

import numpy as np

Bits = np.ndarray  # of fp32 numbers, uint32, unless something else is said


def bits(x: Any) -> Bits:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def floats(u: Any) -> np.ndarray:
    return np.ascontiguousarray(u, np.uint32).view(np.float32)


def is_nan(u: Bits) -> np.ndarray:
    return (u & 0x7FFFFFFF) > 0x7F800000


# ---- 16 bits, and what is kept beside them ----


def to_bf16_stochastic(u: Bits, random: np.ndarray) -> np.ndarray:
    rounded = np.where(is_nan(u), u | 0x400000, u + random.astype(np.uint32))
    return (rounded >> 16).astype(np.uint16)


def split(u: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The element, and the remainder in 16 bits."""
    u = np.where(is_nan(u), np.uint32(0x7FC00000), u)
    return (u + np.uint32(0x8000) >> 16).astype(np.uint16), (u & 0xFFFF).astype(np.uint16)


def split24(u: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The element, and the remainder in 8 bits, of a number rounded to 24 bits: nearest, ties to even."""
    u = np.where(is_nan(u), np.uint32(0x7FC00000), u).astype(np.uint64)
    below, kept = u & 0xFF, u >> 8
    kept = kept + ((below > 128) | ((below == 128) & (kept & 1 == 1)))
    return (kept + 0x80 >> 8).astype(np.uint16), (kept & 0xFF).astype(np.uint8)


def join(upper: np.ndarray, rest: np.ndarray) -> Bits:
    """rest: signed, in units of the last place of fp32."""
    rest = np.where((upper & 0x7FFF == 0) & (rest < 0), 0, rest.astype(np.int64))
    return ((upper.astype(np.int64) << 16) + rest & 0xFFFFFFFF).astype(np.uint32)


def encode(storage: str, u: Bits, random: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What is in parts of other sizes than blocks."""
    if storage == "bf16_stochastic":
        return to_bf16_stochastic(u, random), None
    return split(u) if storage == "bf16_remainder" else split24(u)


# ---- 8 bits, a block at a time ----

BLOCK = 128
#: Bits of the mantissa, largest code, and what a block's largest number is scaled to: of signed numbers, of squares.
FORMATS = {False: (5, 127, 14.75), True: (4, 255, 63487.0)}


def encode_block(x: np.ndarray, squares: bool, random: np.ndarray | None = None) -> tuple[np.ndarray, np.float32]:
    """The codes of up to 128 numbers, int64, and their scale."""
    mantissa, largest, top = FORMATS[squares]
    u = bits(x)
    widest = int((u & 0x7FFFFFFF).max())
    if widest >= 0x7F800000:
        return np.zeros(len(u), np.int64), np.float32(np.nan)
    if widest == 0:
        return np.zeros(len(u), np.int64), np.float32(0)
    scale = max(floats([widest])[0], np.float32(2.0**-100))
    inverse = np.float32(top) / scale
    rho = np.int64(1 << 22 - mantissa) if random is None else random.astype(np.int64) << 7 - mantissa
    logarithm = bits(np.abs(floats(u)) * inverse + np.float32(1)).astype(np.int64) - 0x3F800000
    codes = np.minimum(logarithm + rho >> 23 - mantissa, largest)
    if squares:
        return np.where((codes == 0) & (floats(u) > 0), 1, codes), scale
    return np.where(u >> 31 == 1, -codes, codes), scale


def decode_block(codes: np.ndarray, scale: np.float32, squares: bool) -> np.ndarray:
    mantissa, _, top = FORMATS[squares]
    unit = np.float32(scale) * (np.float32(1) / np.float32(top))
    size = floats(0x3F800000 + (np.abs(codes.astype(np.int64)) << 23 - mantissa)) - np.float32(1)
    return np.where(codes < 0, -(size * unit), size * unit)


# ---- random bits ----


def split_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def stream(seed: int, parameter: int, step: int) -> int:
    return split_mix(split_mix(split_mix(seed) ^ parameter) ^ step)


def random_words(upper: int, lower: np.ndarray, stream: int, word: int) -> np.ndarray:
    """Of elements whose indices in the whole tensor have these halves, uint32."""
    key = split_mix(stream ^ (word + upper * 256))
    x = lower.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(key % 2**32)
    x = (x ^ x >> 16) * np.uint32(0x21F0AAAD) + np.uint32(key >> 32)
    x = (x ^ x >> 15) * np.uint32(0x735A2D97)
    return x ^ x >> 15


def random_halves(n: int, stream: int, half: int) -> np.ndarray:
    """16 bits for each of the first elements of a tensor, int64."""
    return (random_words(0, np.arange(n), stream, half // 2) >> half % 2 * 16 & 0xFFFF).astype(np.int64)

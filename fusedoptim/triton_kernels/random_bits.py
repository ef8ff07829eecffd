"""Random bits for rounding, as csrc/core/random_bits.h makes them: of the seed, the parameter, its step and an
element's place in the whole tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as L
from .arithmetic import hyper
from .codec import load_i64


@triton.jit
def split_mix(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_stream(row, entry, step):
    """Of one parameter in one step. step: its number, fp64."""
    seed = hyper(row, L.ROUNDING_SEED).to(tl.int64).to(tl.uint64)
    of_entry = split_mix(seed) ^ load_i64(entry + L.ENTRY_ID).to(tl.uint64)
    return split_mix(split_mix(of_entry) ^ step.to(tl.int64).to(tl.uint64))


@triton.jit
def keys_of(stream, index, KIND: tl.constexpr):
    """Of the words that a kind takes, for elements with these indices, int64: one key serves those whose indices have
    the same upper half."""
    upper = (index.to(tl.uint64) >> 32) << 8
    keys = (upper,)
    if (KIND >> L.WORDS) & 1:
        keys = (split_mix(stream ^ upper),)
    for word in tl.static_range(1, L.MAX_WORDS):
        if (KIND >> L.WORDS + word) & 1:
            keys = keys + (split_mix(stream ^ (upper | word)),)
        else:
            keys = keys + (keys[0],)
    return keys


@triton.jit
def random_word(index, key):
    """index: the lower half, uint32."""
    x = index * 0x9E3779B1 + key.to(tl.uint32)
    x ^= x >> 16
    x = x * 0x21F0AAAD + (key >> 32).to(tl.uint32)
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def random_words(index, keys, KIND: tl.constexpr):
    """index: int64, or its lower half. Words that the kind does not take are like the first."""
    lower = index.to(tl.uint32)
    words = (lower,)
    if (KIND >> L.WORDS) & 1:
        words = (random_word(lower, keys[0]),)
    for word in tl.static_range(1, L.MAX_WORDS):
        if (KIND >> L.WORDS + word) & 1:
            words = words + (random_word(lower, keys[word]),)
        else:
            words = words + (words[0],)
    return words


@triton.jit
def random_half(words, KIND: tl.constexpr, K: tl.constexpr):
    """The 16 bits that operand K is rounded with, if it is rounded stochastically."""
    D: tl.constexpr = (KIND >> L.WIDTH * K) & L.MASK
    HALF: tl.constexpr = 0 if K < L.FIRST_STATE else (KIND >> L.HALVES + L.WIDTH * (K - L.FIRST_STATE)) & L.MASK
    if (D == L.BF16_STOCHASTIC) | (D == L.Q8_STOCHASTIC) | (D == L.Q8_SQUARES_STOCHASTIC):
        word = words[HALF // 2]
        return word >> 16 if HALF % 2 == 1 else word & 0xFFFF
    else:
        return words[0]

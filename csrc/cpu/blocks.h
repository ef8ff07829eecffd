// Codes of core/block.h for the CPU: a block between its bytes and fp32 in the L1 cache.
#pragma once

#include "../core/block.h"
#include "codec.h"

namespace fusedoptim {

// n: elements of one row, from its element `at` on, a block's first. scales: of that row.
template <class M>
__attribute__((noinline)) void decode_blocks(float* out, const uint8_t* codes, const float* scales, Storage s,
                                             int64_t at, int64_t n) {
  using B = Bits<M>;
  using I = typename B::I;
  using U = typename B::U;
  const BlockFormat f = block_format(s);
  for (int64_t k = 0; k < n; k += kBlock) {
    const float unit = block_unit(f, scales[(at + k) / kBlock]);
    const int64_t end = n - k < kBlock ? n : k + kBlock;
    int64_t i = k;
    for (; i + M::width <= end; i += M::width) {
      const I code = f.squares ? B::N::load(codes + i) : B::N::load(reinterpret_cast<const int8_t*>(codes) + i);
      const I sign = code & static_cast<int32_t>(0x80000000u);
      const I magnitude = code < 0 ? -code : code;
      const I bits = 0x3f800000 + (magnitude << (23 - f.mantissa));
      const auto x = (B::value(B::template cast<U>(bits)) - M::set(1.0f)) * M::set(unit);
      M::store(out + i, B::value(B::of(x) ^ B::template cast<U>(sign)));
    }
    for (; i < end; ++i) out[i] = block_value(f, codes[i], unit);
  }
}

// random: the low half of a word is an element's 16 bits, once shifted; null if none are used.
template <class M>
__attribute__((noinline)) void encode_blocks(uint8_t* codes, float* scales, const float* in, Storage s, int64_t at,
                                             int64_t n, const uint32_t* random) {
  using B = Bits<M>;
  using I = typename B::I;
  using U = typename B::U;
  const BlockFormat f = block_format(s);
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t end = n - k < kBlock ? n : k + kBlock;
    I widest = {};
    int64_t i = k;
    for (; i + M::width <= end; i += M::width) {
      const I bits = B::template cast<I>(B::of(M::load(in + i)) & 0x7fffffffu);
      widest = widest > bits ? widest : bits;
    }
    uint32_t each[M::width], largest = 0;
    memcpy(each, &widest, sizeof(each));
    for (uint32_t x : each) largest = x > largest ? x : largest;
    for (; i < end; ++i) {
      const uint32_t x = bits_of(in[i]) & 0x7fffffffu;
      largest = x > largest ? x : largest;
    }
    const float scale = block_scale(largest), inverse = block_inverse(f, scale);
    scales[(at + k) / kBlock] = scale;
    i = k;
    for (; inverse > 0 && i + M::width <= end; i += M::width) {
      const U u = B::of(M::load(in + i)), size = u & 0x7fffffffu;
      U rounding = U{} + block_half(f);
      if (random) {
        memcpy(&rounding, random + i, sizeof(rounding));
        rounding = rounding << (7 - f.mantissa);
      }
      const U bits = B::of(B::value(size) * M::set(inverse) + M::set(1.0f));
      I c = B::template cast<I>((bits - 0x3f800000u + rounding) >> (23 - f.mantissa));
      c = c > f.largest ? I{} + f.largest : c;
      if (f.squares)
        c = (c == 0) & (B::template cast<I>(size) > 0) ? I{} + 1 : c;
      else
        c = B::template cast<I>(u) < 0 ? -c : c;
      B::N::store(codes + i, B::template cast<U>(c));
    }
    for (; i < end; ++i) {
      const uint32_t rounding = random ? block_random(f, random[i]) : block_half(f);
      codes[i] = block_byte(f, in[i], block_code(f, in[i], inverse, rounding));
    }
  }
}

// 16 random bits for each of n elements.
template <class M>
__attribute__((noinline)) void random_halves(uint32_t* out, const uint32_t* indices, int64_t n, RandomKey key,
                                             int half) {
  using U = typename Bits<M>::U;
  int64_t i = 0;
  for (; i + M::width <= n; i += M::width) {
    U index;
    memcpy(&index, indices + i, sizeof(index));
    const U bits = random_word(index, key) >> (half % 2 * 16) & 0xffffu;
    memcpy(out + i, &bits, sizeof(bits));
  }
  for (; i < n; ++i) out[i] = random_word(indices[i], key) >> (half % 2 * 16) & 0xffffu;
}

}  // namespace fusedoptim

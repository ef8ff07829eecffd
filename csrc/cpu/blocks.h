// Codes of core/block.h for the CPU: a block between its bytes and fp32 in the L1 cache.
#pragma once

#include "../core/block.h"
#include "passes.h"
#include "tuning.h"

namespace fusedoptim {

template <class M, bool squares>
FUSEDOPTIM_INLINE void decode_block(float* out, const uint8_t* codes, float scale, int64_t n) {
  using B = Bits<M>;
  using I = typename B::I;
  using U = typename B::U;
  constexpr BlockFormat f = block_format(squares ? Storage::q8_squares : Storage::q8);
  const float unit = block_unit(f, scale);
  int64_t i = 0;
  for (; i + M::width <= n; i += M::width) {
    const I code = squares ? B::load(codes + i) : B::load(reinterpret_cast<const int8_t*>(codes) + i);
    const I magnitude = squares || code >= 0 ? code : -code;
    const I bits = 0x3f800000 + (magnitude << (23 - f.mantissa));
    const auto x = (B::value(bits_as<U>(bits)) - M::set(1.0f)) * M::set(unit);
    M::store(out + i, squares ? x : B::value(B::of(x) ^ (bits_as<U>(code) & 0x80000000u)));
  }
  for (; i < n; ++i) out[i] = block_value(f, codes[i], unit);
}

// Of the bits of n numbers without their signs.
template <class M>
FUSEDOPTIM_INLINE uint32_t largest_of(const float* in, int64_t n) {
  using B = Bits<M>;
  using I = typename B::I;
  I widest = {};
  int64_t i = 0;
  for (; i + M::width <= n; i += M::width) {
    const I bits = bits_as<I>(B::of(M::load(in + i)) & 0x7fffffffu);
    widest = widest > bits ? widest : bits;
  }
  uint32_t each[M::width], largest = 0;
  memcpy(each, &widest, sizeof(each));
  for (uint32_t x : each) largest = x > largest ? x : largest;
  for (; i < n; ++i) {
    const uint32_t x = bits_of(in[i]) & 0x7fffffffu;
    largest = x > largest ? x : largest;
  }
  return largest;
}

// n: of one block.
template <class M, bool squares, bool stochastic>
FUSEDOPTIM_INLINE void encode_block(uint8_t* codes, const float* in, int64_t n, float inverse, RandomHalves random) {
  using B = Bits<M>;
  using I = typename B::I;
  using U = typename B::U;
  constexpr BlockFormat f = block_format(squares ? Storage::q8_squares : Storage::q8);
  int64_t i = 0;
  for (; inverse > 0 && i + M::width <= n; i += M::width) {
    const U u = B::of(M::load(in + i)), size = u & 0x7fffffffu;
    U rounding = U{} + block_half(f);
    if constexpr (stochastic) rounding = load_random<M>(random, i) << (7 - f.mantissa);
    const U bits = B::of(B::value(size) * M::set(inverse) + M::set(1.0f));
    I c = bits_as<I>((bits + (rounding - 0x3f800000u)) >> (23 - f.mantissa));
    c = c > f.largest ? I{} + f.largest : c;
    if (squares) {
      const I least = bits_as<I>(size) > 1 ? I{} + 1 : bits_as<I>(size);  // 0 for 0, else 1
      c = c > least ? c : least;
    } else {
      c = bits_as<I>(u) < 0 ? -c : c;
    }
    B::store(codes + i, bits_as<U>(c));
  }
  for (; i < n; ++i) {
    const uint32_t rounding = stochastic ? block_random(f, random.at(i)) : block_half(f);
    codes[i] = block_byte(f, in[i], block_code(f, in[i], inverse, rounding));
  }
}

// n elements of one row, at most those of a tile, from a block's first on. scales: from that block's on.
template <class M>
__attribute__((noinline)) void decode_blocks(float* out, const uint8_t* codes, const float* scales, Storage s,
                                             int64_t n) {
  const bool squares = block_format(s).squares;
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t in_block = n - k < kBlock ? n - k : kBlock;
    const float scale = scales[k / kBlock];
    if (squares)
      decode_block<M, true>(out + k, codes + k, scale, in_block);
    else
      decode_block<M, false>(out + k, codes + k, scale, in_block);
  }
}

// Scales come first, of all blocks: each takes a division, for which the next block's need not wait.
template <class M, bool squares, bool stochastic>
FUSEDOPTIM_INLINE void encode_blocks_as(uint8_t* codes, float* scales, const float* in, int64_t n,
                                        RandomHalves random) {
  constexpr BlockFormat f = block_format(squares ? Storage::q8_squares : Storage::q8);
  float inverse[tuning::kTileElements / kBlock];
  for (int64_t k = 0; k < n; k += kBlock) {
    const float scale = block_scale(largest_of<M>(in + k, n - k < kBlock ? n - k : kBlock));
    scales[k / kBlock] = scale;
    inverse[k / kBlock] = block_inverse(f, scale);
  }
  for (int64_t k = 0; k < n; k += kBlock) {
    const RandomHalves from_here{stochastic ? random.words + k : nullptr, random.shift};
    encode_block<M, squares, stochastic>(codes + k, in + k, n - k < kBlock ? n - k : kBlock, inverse[k / kBlock],
                                         from_here);
  }
}

template <class M>
__attribute__((noinline)) void encode_blocks(uint8_t* codes, float* scales, const float* in, Storage s, int64_t n,
                                             RandomHalves random) {
  switch (s) {
    case Storage::q8:
      return encode_blocks_as<M, false, false>(codes, scales, in, n, random);
    case Storage::q8_stochastic:
      return encode_blocks_as<M, false, true>(codes, scales, in, n, random);
    case Storage::q8_squares:
      return encode_blocks_as<M, true, false>(codes, scales, in, n, random);
    default:
      return encode_blocks_as<M, true, true>(codes, scales, in, n, random);
  }
}

}  // namespace fusedoptim

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

// Numbers are gone through in groups: those beyond the last are zeros.
template <class M>
constexpr int kGroup = 4 * M::width;

// Of the bits of numbers without their signs.
template <class M>
FUSEDOPTIM_INLINE uint32_t largest_of(const float* in, int64_t n) {
  using B = Bits<M>;
  using I = typename B::I;
  I widest[4] = {};
  for (int64_t i = 0; i < n; i += kGroup<M>)
    for (int j = 0; j < 4; ++j) {
      const I bits = bits_as<I>(B::of(M::load(in + i + j * M::width)) & 0x7fffffffu);
      widest[j] = widest[j] > bits ? widest[j] : bits;
    }
  uint32_t each[kGroup<M>], largest = 0;
  memcpy(each, &widest, sizeof(each));
  for (uint32_t x : each) largest = x > largest ? x : largest;
  return largest;
}

// The codes of a register of numbers. None is held within a limit: the largest number's code is the largest, however
// the inverse rounds and whatever is added.
template <class M, bool squares, bool stochastic>
FUSEDOPTIM_INLINE typename Bits<M>::Register encode_register(const float* in, float inverse, RandomHalves random,
                                                             int64_t i) {
  using B = Bits<M>;
  using U = typename B::U;
  using Register = typename B::Register;
  constexpr BlockFormat f = block_format(squares ? Storage::q8_squares : Storage::q8);
  const U u = B::of(M::load(in + i)), size = u & 0x7fffffffu;
  U rounding = U{} + block_half(f);
  if constexpr (stochastic) rounding = load_random<M>(random, i, 7 - f.mantissa);
  const U bits = B::of(B::value(size) * M::set(inverse) + M::set(1.0f));
  const U c = (bits + (rounding - 0x3f800000u)) >> (23 - f.mantissa);
  if constexpr (!squares) return M::with_sign_of(bits_as<Register>(u), bits_as<Register>(c));
  const U least = size == 0 ? U{} : U{} + 1u;
  return bits_as<Register>(c > least ? c : least);
}

// n: of one block.
template <class M, bool squares, bool stochastic>
FUSEDOPTIM_INLINE void encode_block(uint8_t* codes, const float* in, int64_t n, float inverse, RandomHalves random) {
  if (!(inverse > 0)) {
    memset(codes, 0, n);
    return;
  }
  for (int64_t i = 0; i < n; i += kGroup<M>) {
    typename Bits<M>::Register c[4];
    for (int j = 0; j < 4; ++j) c[j] = encode_register<M, squares, stochastic>(in, inverse, random, i + j * M::width);
    if (i + kGroup<M> <= n) {
      M::template store_bytes<!squares>(codes + i, c[0], c[1], c[2], c[3]);
    } else {
      uint8_t last[kGroup<M>];
      M::template store_bytes<!squares>(last, c[0], c[1], c[2], c[3]);
      memcpy(codes + i, last, n - i);
    }
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

// n elements from element i of a tensor on, wherever that is in its row and block. codes: from there on; scales: of
// all.
template <class M>
__attribute__((noinline)) void decode_pieces_of_blocks(float* out, const uint8_t* codes, const float* scales, Storage s,
                                                       int64_t row, int64_t i, int64_t n) {
  const bool squares = block_format(s).squares;
  int64_t in_row = i % row, block = i / row * blocks_of_row(row) + in_row / kBlock;
  for (int64_t k = 0, length; k < n; k += length, ++block) {
    const int64_t block_end = kBlock - in_row % kBlock, row_end = row - in_row;
    length = block_end < row_end ? block_end : row_end;
    length = length < n - k ? length : n - k;
    if (squares)
      decode_block<M, true>(out + k, codes + k, scales[block], length);
    else
      decode_block<M, false>(out + k, codes + k, scales[block], length);
    in_row = length == row_end ? 0 : in_row + length;
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

// As decode_blocks(). Numbers and words have room up to a whole group.
template <class M>
__attribute__((noinline)) void encode_blocks(uint8_t* codes, float* scales, float* in, Storage s, int64_t n,
                                             RandomHalves random) {
  static_assert(kBlock % kGroup<M> == 0 && tuning::kTileElements % kBlock == 0);
  for (int64_t k = n; k % kGroup<M>; ++k) in[k] = 0;
  const bool squares = block_format(s).squares;
  if (is_stochastic(s) && squares && random.shift == 16)  // a second moment, mostly, and the shift a constant
    return encode_blocks_as<M, true, true>(codes, scales, in, n, {random.words, 16});
  if (is_stochastic(s) && squares) return encode_blocks_as<M, true, true>(codes, scales, in, n, random);
  if (is_stochastic(s)) return encode_blocks_as<M, false, true>(codes, scales, in, n, random);
  if (squares) return encode_blocks_as<M, true, false>(codes, scales, in, n, random);
  return encode_blocks_as<M, false, false>(codes, scales, in, n, random);
}

}  // namespace fusedoptim

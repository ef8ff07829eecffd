// Registers of two 16-bit numbers in each lane: 2*width elements at once, those of even index and those of odd. A shift
// or a blend each makes fp32 of them and back, and no lane changes place. NaNs are left to others: see any_nan.
#pragma once

#include "codec.h"

namespace fusedoptim {

constexpr bool can_pair(Storage s) { return reads_as_bf16(s) || s == Storage::bf16_remainder; }

template <class M>
struct Pairs {
  using B = Bits<M>;
  using V = typename M::V;
  using U = typename B::U;
  // Of 16 bits, twice as many.
  typedef int16_t Halves __attribute__((vector_size(sizeof(U))));

  FUSEDOPTIM_INLINE static U load_bits(const void* data, int64_t i) {
    U u;
    memcpy(&u, static_cast<const uint16_t*>(data) + i, sizeof(u));
    return u;
  }
  template <class H>
  FUSEDOPTIM_INLINE static void store_bits(void* data, int64_t i, H x) {
    memcpy(static_cast<uint16_t*>(data) + i, &x, sizeof(x));
  }
  using Register = typename B::Register;
  FUSEDOPTIM_INLINE static Halves less_but_0(Halves a, Halves b) {
    return bits_as<Halves>(M::subtract_unsigned_16(bits_as<Register>(a), bits_as<Register>(b)));
  }
  // The lower 16 bits of each lane of the one, the upper of the other.
  FUSEDOPTIM_INLINE static U with_upper(U lower, U upper) {
    return bits_as<U>(M::with_upper(bits_as<Register>(lower), bits_as<Register>(upper)));
  }

  template <Storage s>
  FUSEDOPTIM_INLINE static void load(const Operand& o, int64_t i, V& even, V& odd) {
    const U x = load_bits(o.data, i);
    if constexpr (reads_as_bf16(s)) {
      even = B::value(x << 16);
      odd = B::value(x & 0xffff0000u);
    } else {  // as join(): one below 0 borrows from the upper half, unless that is 0
      const Halves upper = bits_as<Halves>(x), low = bits_as<Halves>(load_bits(o.extra, i));
      const Halves rest = low & ~(((upper & 0x7fff) == 0) & low >> 15);
      const U high = bits_as<U>(static_cast<Halves>(upper + (rest >> 15))), r = bits_as<U>(rest);
      even = B::value(with_upper(r, high << 16));
      odd = B::value(with_upper(r >> 16, high));
    }
  }

  // random: words, of which half `half` is this operand's.
  template <Storage s, int half>
  FUSEDOPTIM_INLINE static void store(const Operand& o, int64_t i, V even, V odd, const U (&random)[2]) {
    const U a = B::of(even), b = B::of(odd);
    if constexpr (s == Storage::bf16_stochastic) {
      store_bits(o.data, i, with_upper((a + half_of<half>(random[0])) >> 16, b + half_of<half>(random[1])));
    } else {
      // As upper_part(): the lower half rounds up from its middle on; to nearest, a middle is taken back from what is
      // even. A lower half of 0 has nothing to give.
      const Halves low = bits_as<Halves>(with_upper(a, b << 16)), high = bits_as<Halves>(with_upper(a >> 16, b));
      const Halves up = s == Storage::bf16 ? less_but_0(low, static_cast<Halves>(~high & 1)) : low;
      store_bits(o.data, i, static_cast<Halves>(high - (up >> 15)));
      if constexpr (s == Storage::bf16_remainder) store_bits(o.extra, i, low);
    }
  }
  template <int half>
  FUSEDOPTIM_INLINE static U half_of(U word) {
    return half == 0 ? word & 0xffffu : word >> 16;
  }

  // One by one, whatever they are.
  static __attribute__((noinline)) void store_slowly(Operand o, int64_t i, V even, V odd, U random_even, U random_odd,
                                                     int shift) {
    alignas(64) float x[2][M::width], in_order[2 * M::width];
    alignas(64) uint32_t words[2][M::width], words_in_order[2 * M::width];
    M::store(x[0], even);
    M::store(x[1], odd);
    memcpy(words[0], &random_even, sizeof(U));
    memcpy(words[1], &random_odd, sizeof(U));
    for (int k = 0; k < 2 * M::width; ++k) {
      in_order[k] = x[k % 2][k / 2];
      words_in_order[k] = words[k % 2][k / 2];
    }
    store_some<M>(in_order, o, i, 2 * M::width, {words_in_order, shift});
  }
};

}  // namespace fusedoptim

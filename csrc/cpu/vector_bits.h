// Integers of 32 bits beside the lanes of an instruction set (see rules/common.h), by the compiler's own vectors: what
// core/storage.h does to the bits of a number, for a register of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/random_bits.h"
#include "../core/storage.h"

namespace fusedoptim {

template <int width>
struct Integers {
  typedef uint32_t U __attribute__((vector_size(4 * width)));
  typedef int32_t I __attribute__((vector_size(4 * width)));
  FUSEDOPTIM_INLINE static U counting() {
    uint32_t x[width];
    for (int k = 0; k < width; ++k) x[k] = k;
    U u;
    memcpy(&u, x, sizeof(u));
    return u;
  }
};
template <>
struct Integers<1> {
  using U = uint32_t;
  using I = int32_t;
  FUSEDOPTIM_INLINE static U counting() { return 0; }
};

template <class To, class From>
FUSEDOPTIM_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// M: lanes of fp32.
template <class M>
struct Bits {
  using V = typename M::V;
  using U = typename Integers<M::width>::U;
  using I = typename Integers<M::width>::I;
  using Register = decltype(M::widen(static_cast<const uint16_t*>(nullptr)));  // the instruction set's own

  FUSEDOPTIM_INLINE static U of(V v) { return bits_as<U>(v); }
  FUSEDOPTIM_INLINE static V value(U u) { return bits_as<V>(u); }
  template <class Narrow>
  FUSEDOPTIM_INLINE static I load(const Narrow* x) {
    return bits_as<I>(M::widen(x));
  }
  template <class Narrow>
  FUSEDOPTIM_INLINE static void store(Narrow* x, U u) {
    M::narrow(x, bits_as<Register>(u));
  }

  // 16 random bits in each lane; the result in the upper half.
  FUSEDOPTIM_INLINE static U round_stochastic(V v, U random) {
    const U u = of(v);
    return v != v ? u | 0x400000u : u + random;
  }
  FUSEDOPTIM_INLINE static U splittable(V v) { return v != v ? U{} + 0x7fc00000u : of(v); }
  FUSEDOPTIM_INLINE static U splittable24(V v) {
    const U u = splittable(v);
    return (u + 0x7fu + (u >> 8 & 1u)) & 0xffffff00u;
  }
  FUSEDOPTIM_INLINE static V join(const uint16_t* upper, I rest) {
    const I u = load(upper);
    rest = ((u & 0x7fff) == 0) & (rest < 0) ? I{} : rest;
    return value(bits_as<U>(u << 16) + bits_as<U>(rest));
  }
};

// Words of random bits for registers of elements that follow each other. stride: elements between two lanes.
template <class M>
class RandomWords {
 public:
  using U = typename Integers<M::width>::U;

  FUSEDOPTIM_INLINE RandomWords(uint32_t index, RandomKey key, uint32_t stride = 1)
      : key_(key),
        x_(weyl_number<U>(Integers<M::width>::counting() * stride + index, key)),
        advance_(kWeylStep * M::width * stride) {}
  FUSEDOPTIM_INLINE U next() {
    const U word = mixed_word(x_, key_);
    x_ += advance_;
    return word;
  }
  // Of each lane's element, and of the one that follows it.
  FUSEDOPTIM_INLINE void next_pair(U (&word)[2]) {
    word[0] = mixed_word(x_, key_);
    word[1] = mixed_word(x_ + kWeylStep, key_);
    x_ += advance_;
  }

 private:
  RandomKey key_;
  U x_;
  uint32_t advance_;
};

}  // namespace fusedoptim

// Integers of 32 bits beside the lanes of an instruction set (see rules/common.h), by the compiler's own vectors: the
// codecs of core/storage.h for a register of elements.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../core/random_bits.h"
#include "../core/storage.h"

namespace fusedoptim {

template <int width>
struct Integers {
  typedef uint32_t U __attribute__((vector_size(4 * width)));
  typedef int32_t I __attribute__((vector_size(4 * width)));
  template <class Narrow>
  struct Of {
    typedef Narrow type __attribute__((vector_size(sizeof(Narrow) * width)));
  };
  template <class Narrow>
  FUSEDOPTIM_INLINE static I load(const Narrow* x) {
    typename Of<Narrow>::type v;
    memcpy(&v, x, sizeof(v));
    return __builtin_convertvector(v, I);
  }
  template <class Narrow>
  FUSEDOPTIM_INLINE static void store(Narrow* x, U u) {
    const auto v = __builtin_convertvector(u, typename Of<Narrow>::type);
    memcpy(x, &v, sizeof(v));
  }
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
  template <class Narrow>
  FUSEDOPTIM_INLINE static I load(const Narrow* x) {
    return *x;
  }
  template <class Narrow>
  FUSEDOPTIM_INLINE static void store(Narrow* x, U u) {
    *x = static_cast<Narrow>(u);
  }
  FUSEDOPTIM_INLINE static U counting() { return 0; }
};

// M: lanes of fp32.
template <class M>
struct Bits {
  using V = typename M::V;
  using N = Integers<M::width>;
  using U = typename N::U;
  using I = typename N::I;

  template <class To, class From>
  FUSEDOPTIM_INLINE static To cast(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
  }
  FUSEDOPTIM_INLINE static U of(V v) { return cast<U>(v); }
  FUSEDOPTIM_INLINE static V value(U u) { return cast<V>(u); }
  FUSEDOPTIM_INLINE static auto is_nan(U u) { return cast<I>(u & 0x7fffffffu) > 0x7f800000; }

  // The result in the upper half.
  FUSEDOPTIM_INLINE static U round_stochastic(V v, U random) {
    const U u = of(v);
    return is_nan(u) ? u | 0x400000u : u + random;
  }
  FUSEDOPTIM_INLINE static U splittable(V v) {
    const U u = of(v);
    return is_nan(u) ? U{} + 0x7fc00000u : u;
  }
  FUSEDOPTIM_INLINE static U splittable24(V v) {
    const U u = splittable(v);
    return (u + 0x7fu + (u >> 8 & 1u)) & 0xffffff00u;
  }
  FUSEDOPTIM_INLINE static V join(const uint16_t* upper, I rest) {
    const I u = N::load(upper);
    rest = ((u & 0x7fff) == 0) & (rest < 0) ? I{} : rest;
    return value(cast<U>(u << 16) + cast<U>(rest));
  }
};

// A register of elements in a storage that is no dtype.
template <class M>
FUSEDOPTIM_INLINE typename M::V load_stored_lanes(const void* data, const void* extra, Storage s, int64_t i) {
  using B = Bits<M>;
  const uint16_t* const x = static_cast<const uint16_t*>(data) + i;
  switch (s) {
    case Storage::bf16_remainder:
      return B::join(x, B::N::load(static_cast<const int16_t*>(extra) + i));
    case Storage::bf16_remainder8:
      return B::join(x, B::N::load(static_cast<const int8_t*>(extra) + i) * 256);
    case Storage::bf16_master:
    case Storage::f16_master: {
      const bool is_bf16 = s == Storage::bf16_master;
      const typename M::V master = M::load(static_cast<const float*>(extra) + i);
      const auto rounded = B::of(is_bf16 ? M::as_bf16(master) : M::as_f16(master));
      const auto element = B::of(is_bf16 ? M::load_bf16(x) : M::load_f16(x));
      return B::value(rounded == element ? B::of(master) : element);
    }
    default:
      return M::load_bf16(x);
  }
}

// random: 16 bits for each element.
template <class M>
FUSEDOPTIM_INLINE void store_stored_lanes(void* data, void* extra, Storage s, int64_t i, typename M::V v,
                                          typename Bits<M>::U random) {
  using B = Bits<M>;
  uint16_t* const x = static_cast<uint16_t*>(data) + i;
  switch (s) {
    case Storage::bf16_remainder: {
      const auto u = B::splittable(v);
      B::N::store(x, (u + 0x8000u) >> 16);
      return B::N::store(static_cast<uint16_t*>(extra) + i, u);
    }
    case Storage::bf16_remainder8: {
      const auto u = B::splittable24(v);
      B::N::store(x, (u + 0x8000u) >> 16);
      return B::N::store(static_cast<uint8_t*>(extra) + i, u >> 8);
    }
    case Storage::bf16_master:
      M::store_bf16(x, v);
      return M::store(static_cast<float*>(extra) + i, v);
    case Storage::f16_master:
      M::store_f16(x, v);
      return M::store(static_cast<float*>(extra) + i, v);
    default:
      return B::N::store(x, B::round_stochastic(v, random) >> 16);
  }
}

template <class M>
FUSEDOPTIM_INLINE typename M::V as_stored_lanes(typename M::V v, Storage s, typename Bits<M>::U random) {
  using B = Bits<M>;
  switch (s) {
    case Storage::bf16:
      return M::as_bf16(v);
    case Storage::f16:
      return M::as_f16(v);
    case Storage::bf16_stochastic:
      return B::value(B::round_stochastic(v, random) & 0xffff0000u);
    case Storage::bf16_remainder:
      return B::value(B::splittable(v));
    case Storage::bf16_remainder8:
      return B::value(B::splittable24(v));
    default:
      return v;
  }
}

}  // namespace fusedoptim

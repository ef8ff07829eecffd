// Between an operand's storage and registers of the compute type. For whole registers the storage is known when this is
// compiled; the last few elements of a tensor are gone through one by one, whatever their storage.
#pragma once

#include "../core/operand.h"
#include "vector_bits.h"

namespace fusedoptim {

// 16 random bits for each of some elements: a half of their words.
struct RandomHalves {
  const uint32_t* words = nullptr;  // null: zeros, for what is not rounded stochastically
  int shift = 0;

  FUSEDOPTIM_INLINE uint32_t at(int64_t k) const { return words ? words[k] >> shift & 0xffffu : 0; }
};

// M, the lanes of an instruction set, makes them distinct (see core/strided.h). Operands are passed by value: of one
// whose address is known elsewhere, a loop would read the fields anew after every store.
template <class M, class T = typename M::T>
__attribute__((noinline)) void load_some(T* out, Operand o, int64_t i, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = load_stored<T>(o.data, o.extra, o.storage, i + k);
}
template <class M, class T = typename M::T>
__attribute__((noinline)) void store_some(const T* in, Operand o, int64_t i, int64_t n, RandomHalves random) {
  for (int64_t k = 0; k < n; ++k) store_stored<T>(o.data, o.extra, o.storage, i + k, in[k], random.at(k));
}

constexpr bool reads_as_bf16(Storage s) { return s == Storage::bf16 || s == Storage::bf16_stochastic; }

template <class M, Storage s>
FUSEDOPTIM_INLINE typename M::V load(const Operand& o, int64_t i) {
  using T = typename M::T;
  if constexpr (s == storage_of(kCompute<T>)) {
    return M::load(static_cast<const T*>(o.data) + i);
  } else {
    using B = Bits<M>;
    const uint16_t* const x = static_cast<const uint16_t*>(o.data) + i;
    if constexpr (reads_as_bf16(s)) return M::load_bf16(x);
    if constexpr (s == Storage::f16) return M::load_f16(x);
    if constexpr (s == Storage::bf16_remainder) return B::join(x, B::load(static_cast<const int16_t*>(o.extra) + i));
    if constexpr (s == Storage::bf16_remainder8)
      return B::join(x, B::load(static_cast<const int8_t*>(o.extra) + i) * 256);
    if constexpr (s == Storage::bf16_master || s == Storage::f16_master) {
      constexpr bool is_bf16 = s == Storage::bf16_master;
      const typename M::V master = M::load(static_cast<const float*>(o.extra) + i);
      const auto rounded = B::of(is_bf16 ? M::as_bf16(master) : M::as_f16(master));
      const auto element = B::of(is_bf16 ? M::load_bf16(x) : M::load_f16(x));
      return B::value(rounded == element ? B::of(master) : element);
    }
  }
}

// random: 16 bits for each element.
template <class M, Storage s>
FUSEDOPTIM_INLINE void store(const Operand& o, int64_t i, typename M::V v, typename Integers<M::width>::U random) {
  using T = typename M::T;
  if constexpr (s == storage_of(kCompute<T>)) {
    M::store(static_cast<T*>(o.data) + i, v);
  } else {
    using B = Bits<M>;
    uint16_t* const x = static_cast<uint16_t*>(o.data) + i;
    if constexpr (s == Storage::bf16 || s == Storage::bf16_master) M::store_bf16(x, v);
    if constexpr (s == Storage::f16 || s == Storage::f16_master) M::store_f16(x, v);
    if constexpr (extra_size_of(s) == 4) M::store(static_cast<float*>(o.extra) + i, v);
    if constexpr (s == Storage::bf16_stochastic) B::store(x, B::round_stochastic(v, random) >> 16);
    if constexpr (s == Storage::bf16_remainder) {
      const auto u = B::splittable(v);
      B::store(x, (u + 0x8000u) >> 16);
      B::store(static_cast<uint16_t*>(o.extra) + i, u);
    }
    if constexpr (s == Storage::bf16_remainder8) {
      const auto u = B::splittable24(v);
      B::store(x, (u + 0x8000u) >> 16);
      B::store(static_cast<uint8_t*>(o.extra) + i, u >> 8);
    }
  }
}

// A parameter as it reads once it was stored.
template <class M, Storage s>
FUSEDOPTIM_INLINE typename M::V as_stored(typename M::V v, typename Integers<M::width>::U random) {
  if constexpr (s == Storage::bf16) return M::as_bf16(v);
  if constexpr (s == Storage::f16) return M::as_f16(v);
  if constexpr (!is_dtype(s)) {
    using B = Bits<M>;
    if constexpr (s == Storage::bf16_stochastic) return B::value(B::round_stochastic(v, random) & 0xffff0000u);
    if constexpr (s == Storage::bf16_remainder) return B::value(B::splittable(v));
    if constexpr (s == Storage::bf16_remainder8) return B::value(B::splittable24(v));
  }
  return v;
}

}  // namespace fusedoptim

// Between an operand's storage and registers of the compute type: M::width elements at once, or the last few.
#pragma once

#include "../core/operand.h"
#include "vector_bits.h"

namespace fusedoptim {

// A storage that is looked up for every register: a branch that never changes within a tensor.
inline constexpr int kAnyStorage = -1;

// Random bits for a register of elements. Lanes of fp64 take theirs one by one.
template <class M>
struct RandomBits {
  using U = typename Integers<M::width>::U;
  U word[kWords];
  FUSEDOPTIM_INLINE U half(int k) const { return word[k / 2] >> (k % 2 * 16) & 0xffffu; }
};

// fixed: the storage, where it is known when compiled. full: all of the register; else its first n elements, and zeros.
template <class M, int fixed, bool full>
FUSEDOPTIM_INLINE typename M::V load(const Operand& o, int64_t i, int n) {
  using T = typename M::T;
  const Storage s = fixed != kAnyStorage && full ? static_cast<Storage>(fixed) : o.storage;
  if constexpr (full && sizeof(T) == 4) {
    if (s == Storage::f32) return M::load(static_cast<const float*>(o.data) + i);
    if (s == Storage::bf16) return M::load_bf16(static_cast<const uint16_t*>(o.data) + i);
    if (s == Storage::f16) return M::load_f16(static_cast<const uint16_t*>(o.data) + i);
    if (!is_dtype(s)) return load_stored_lanes<M>(o.data, o.extra, s, i);
  } else if constexpr (full) {
    if (s == Storage::f64) return M::load(static_cast<const double*>(o.data) + i);
  }
  alignas(64) T x[M::width] = {};
  for (int k = 0; k < (full ? M::width : n); ++k) x[k] = load_stored<T>(o.data, o.extra, s, i + k);
  return M::load(x);
}

template <class M, int fixed, bool full>
FUSEDOPTIM_INLINE void store(const Operand& o, int64_t i, int n, typename M::V v, typename RandomBits<M>::U random) {
  using T = typename M::T;
  const Storage s = fixed != kAnyStorage && full ? static_cast<Storage>(fixed) : o.storage;
  if constexpr (full && sizeof(T) == 4) {
    if (s == Storage::f32) return M::store(static_cast<float*>(o.data) + i, v);
    if (s == Storage::bf16) return M::store_bf16(static_cast<uint16_t*>(o.data) + i, v);
    if (s == Storage::f16) return M::store_f16(static_cast<uint16_t*>(o.data) + i, v);
    if (!is_dtype(s)) return store_stored_lanes<M>(o.data, o.extra, s, i, v, random);
  } else if constexpr (full) {
    if (s == Storage::f64) return M::store(static_cast<double*>(o.data) + i, v);
  }
  alignas(64) T x[M::width];
  uint32_t bits[M::width];
  M::store(x, v);
  memcpy(bits, &random, sizeof(bits));
  for (int k = 0; k < (full ? M::width : n); ++k) store_stored<T>(o.data, o.extra, s, i + k, x[k], bits[k]);
}

// A parameter as it reads once it was stored.
template <class M, int fixed>
FUSEDOPTIM_INLINE typename M::V as_stored(typename M::V v, Storage s, typename RandomBits<M>::U random) {
  if constexpr (fixed != kAnyStorage) s = static_cast<Storage>(fixed);
  if constexpr (sizeof(typename M::T) == 4) return as_stored_lanes<M>(v, s, random);
  return v;
}

}  // namespace fusedoptim

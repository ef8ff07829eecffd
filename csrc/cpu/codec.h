// Between an operand's storage and registers of the compute type: M::width elements at once, or the last few.
#pragma once

#include "../core/operand.h"

namespace fusedoptim {

// A storage that is looked up for every register: a branch that never changes within a tensor.
inline constexpr int kAnyDType = -1;

// fixed: the storage, where it is known when compiled. full: all of the register; else its first n elements, and zeros.
template <class M, int fixed, bool full>
FUSEDOPTIM_INLINE typename M::V load(const Operand& o, int64_t i, int n) {
  using T = typename M::T;
  const DType d = fixed != kAnyDType && full ? static_cast<DType>(fixed) : o.storage;
  if constexpr (full && sizeof(T) == 4) {
    if (d == DType::f32) return M::load(static_cast<const float*>(o.data) + i);
    if (d == DType::bf16) return M::load_bf16(static_cast<const uint16_t*>(o.data) + i);
    if (d == DType::f16) return M::load_f16(static_cast<const uint16_t*>(o.data) + i);
  } else if constexpr (full) {
    if (d == DType::f64) return M::load(static_cast<const double*>(o.data) + i);
  }
  alignas(64) T x[M::width] = {};
  for (int k = 0; k < (full ? M::width : n); ++k) x[k] = load_element<T>(o.data, d, i + k);
  return M::load(x);
}

template <class M, int fixed, bool full>
FUSEDOPTIM_INLINE void store(const Operand& o, int64_t i, int n, typename M::V v) {
  using T = typename M::T;
  const DType d = fixed != kAnyDType && full ? static_cast<DType>(fixed) : o.storage;
  if constexpr (full && sizeof(T) == 4) {
    if (d == DType::f32) return M::store(static_cast<float*>(o.data) + i, v);
    if (d == DType::bf16) return M::store_bf16(static_cast<uint16_t*>(o.data) + i, v);
    if (d == DType::f16) return M::store_f16(static_cast<uint16_t*>(o.data) + i, v);
  } else if constexpr (full) {
    if (d == DType::f64) return M::store(static_cast<double*>(o.data) + i, v);
  }
  alignas(64) T x[M::width];
  M::store(x, v);
  for (int k = 0; k < (full ? M::width : n); ++k) store_element<T>(o.data, d, i + k, x[k]);
}

// A parameter as it reads once it was stored.
template <class M, int fixed>
FUSEDOPTIM_INLINE typename M::V as_stored(typename M::V v, DType d) {
  if constexpr (fixed != kAnyDType) d = static_cast<DType>(fixed);
  if constexpr (sizeof(typename M::T) == 4) {
    if (d == DType::bf16) return M::as_bf16(v);
    if (d == DType::f16) return M::as_f16(v);
  }
  return v;
}

}  // namespace fusedoptim

// Lanes of one element for the update rules (see rules/common.h), for any CPU. Without a hardware fma the C library's
// is called: slow, and the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/dtype.h"

namespace fusedoptim::portable {

template <class Scalar>
struct Lane {
  using T = Scalar;
  using V = Scalar;
  static constexpr int width = 1;
  static constexpr bool has_pairs = false;
  FUSEDOPTIM_INLINE static V set(T x) { return x; }
  FUSEDOPTIM_INLINE static V fma(V a, V b, V c) { return std::fma(a, b, c); }
  FUSEDOPTIM_INLINE static V sqrt(V a) { return std::sqrt(a); }
  FUSEDOPTIM_INLINE static V max(V a, V b) { return (a != a || a > b) ? a : b; }
  FUSEDOPTIM_INLINE static V clamp(V a, V b) { return a > b ? b : a < -b ? -b : a; }
  FUSEDOPTIM_INLINE static V load(const T* x) { return *x; }
  FUSEDOPTIM_INLINE static void store(T* x, V v) { *x = v; }
  template <class Narrow>
  FUSEDOPTIM_INLINE static int32_t widen(const Narrow* x) {
    return *x;
  }
  template <class Narrow>
  FUSEDOPTIM_INLINE static void narrow(Narrow* x, uint32_t v) {
    *x = static_cast<Narrow>(v);
  }
  template <bool is_signed>
  FUSEDOPTIM_INLINE static void store_bytes(uint8_t* x, int32_t a, int32_t b, int32_t c, int32_t d) {
    x[0] = static_cast<uint8_t>(a), x[1] = static_cast<uint8_t>(b);
    x[2] = static_cast<uint8_t>(c), x[3] = static_cast<uint8_t>(d);
  }
  FUSEDOPTIM_INLINE static int32_t with_sign_of(int32_t other, int32_t x) { return other < 0 ? -x : x; }
  FUSEDOPTIM_INLINE static V load_bf16(const uint16_t* x) { return bf16_to_f32(*x); }
  FUSEDOPTIM_INLINE static void store_bf16(uint16_t* x, V v) { *x = f32_to_bf16(v); }
  FUSEDOPTIM_INLINE static V as_bf16(V v) { return bf16_to_f32(f32_to_bf16(v)); }
  FUSEDOPTIM_INLINE static V as_f16(V v) { return f16_to_f32(f32_to_f16(v)); }
  FUSEDOPTIM_INLINE static V load_f16(const uint16_t* x) { return f16_to_f32(*x); }
  FUSEDOPTIM_INLINE static void store_f16(uint16_t* x, V v) { *x = f32_to_f16(v); }
};

using F32 = Lane<float>;
using F64 = Lane<double>;

}  // namespace fusedoptim::portable

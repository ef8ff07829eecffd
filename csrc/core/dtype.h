// Element types and the exact conversions between them: the one definition, in integer bits, that all backends share.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace fusedoptim {

enum class DType : uint8_t { f32, f64, bf16, f16, unsupported };

// In which a learning rate computes: Python's numbers, or those of a tensor of some dtype.
enum class LrDType : uint8_t { python, f32, f64, bf16, f16 };
FUSEDOPTIM_HD LrDType lr_dtype_of(DType d) { return static_cast<LrDType>(static_cast<int>(d) + 1); }
FUSEDOPTIM_HD DType dtype_of(LrDType d) { return static_cast<DType>(static_cast<int>(d) - 1); }

// In which a parameter of some dtype is updated.
FUSEDOPTIM_HD DType compute_dtype_of(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }
template <class T>
inline constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;

FUSEDOPTIM_HD int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

FUSEDOPTIM_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FUSEDOPTIM_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FUSEDOPTIM_HD bool is_nan_bits(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }

FUSEDOPTIM_HD float bf16_to_f32(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Nearest, ties to even. A NaN keeps its sign and upper payload and is made quiet; rounding alone could carry it to
// infinity or to zero.
FUSEDOPTIM_HD uint16_t f32_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (is_nan_bits(u)) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

FUSEDOPTIM_HD float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or a NaN, which is made quiet
    const uint32_t payload = (magnitude & 0x3ffu) << 13;
    return float_of(sign | 0x7f800000u | payload | (payload ? 0x400000u : 0u));
  }
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
  return float_of(sign | bits_of(subnormal));
}

// Nearest, ties to even; the bits of the F16C and CUDA conversions.
FUSEDOPTIM_HD uint16_t f32_to_f16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (a < 0x38800000u) {                                               // below 2^-14: subnormal, multiples of 2^-24
    // Adding 0.5 aligns the last kept bit with the last bit of the sum, which the addition then rounds to.
    const uint32_t r = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | r);
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
}

// One element read as the compute type T, and written back with one rounding.
template <class T>
FUSEDOPTIM_HD T load_element(const void* base, DType d, int64_t i) {
  switch (d) {
    case DType::f32:
      return static_cast<T>(static_cast<const float*>(base)[i]);
    case DType::f64:
      return static_cast<T>(static_cast<const double*>(base)[i]);
    case DType::bf16:
      return static_cast<T>(bf16_to_f32(static_cast<const uint16_t*>(base)[i]));
    default:
      return static_cast<T>(f16_to_f32(static_cast<const uint16_t*>(base)[i]));
  }
}

// fp64 goes to 16 bits through fp32, as torch converts it.
template <class T>
FUSEDOPTIM_HD void store_element(void* base, DType d, int64_t i, T x) {
  switch (d) {
    case DType::f32:
      static_cast<float*>(base)[i] = static_cast<float>(x);
      break;
    case DType::f64:
      static_cast<double*>(base)[i] = static_cast<double>(x);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(base)[i] = f32_to_bf16(static_cast<float>(x));
      break;
    default:
      static_cast<uint16_t*>(base)[i] = f32_to_f16(static_cast<float>(x));
      break;
  }
}

}  // namespace fusedoptim

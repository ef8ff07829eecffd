// How an operand's numbers are stored, and the exact codecs of what is stored in fewer bits than it is computed in: the
// one definition, in integer bits, that all backends share.
#pragma once

#include "dtype.h"

namespace fusedoptim {

// The first are dtypes, with the same numbers. What the others keep beside an element (its extra) is in a tensor of its
// own, in the same memory order.
enum class Storage : uint8_t {
  f32,
  f64,
  bf16,
  f16,
  unsupported,
  bf16_stochastic,  // rounded up with the probability that makes it right on average
  bf16_remainder,   // extra: the lower 16 bits of an fp32 number, whose upper ones are rounded to the element
  bf16_remainder8,  // extra: the upper 8 of these, of a number rounded to 24 bits
  bf16_master,      // extra: the fp32 number that the element is rounded from
  f16_master,
  q8,  // a signed 8-bit code; extra: a scale for each block of a row. See block.h
  q8_stochastic,
  q8_squares,  // the same without signs, for what is never negative
  q8_squares_stochastic,
};

FUSEDOPTIM_HD constexpr Storage storage_of(DType d) { return static_cast<Storage>(d); }
FUSEDOPTIM_HD constexpr bool is_dtype(Storage s) { return s < Storage::unsupported; }
FUSEDOPTIM_HD constexpr bool is_in_blocks(Storage s) { return s >= Storage::q8; }
FUSEDOPTIM_HD constexpr bool is_stochastic(Storage s) {
  return s == Storage::bf16_stochastic || s == Storage::q8_stochastic || s == Storage::q8_squares_stochastic;
}
// Of the elements themselves, which are no codes.
FUSEDOPTIM_HD constexpr DType dtype_of(Storage s) {
  return is_dtype(s) ? static_cast<DType>(s) : s == Storage::f16_master ? DType::f16 : DType::bf16;
}
FUSEDOPTIM_HD constexpr int64_t size_of(Storage s) {
  return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : is_in_blocks(s) ? 1 : 2;
}
// Of what is kept beside an element; 0 if nothing is.
FUSEDOPTIM_HD constexpr int64_t extra_size_of(Storage s) {
  if (s == Storage::bf16_remainder) return 2;
  if (s == Storage::bf16_remainder8) return 1;
  return s == Storage::bf16_master || s == Storage::f16_master ? 4 : 0;
}
FUSEDOPTIM_HD DType compute_dtype_of(Storage s) { return compute_dtype_of(dtype_of(s)); }

// ---- 16 bits, rounded stochastically ----

// random: 16 bits. The carry of the sum of 16 random bits and the lower half rounds up. A NaN is made quiet.
FUSEDOPTIM_HD uint16_t f32_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>((is_nan_bits(u) ? u | 0x400000u : u + random) >> 16);
}

// ---- an fp32 number in two parts ----

// The element is the number rounded to nearest, ties away from zero: to even would take another bit to undo. All NaNs
// become one, whose lower half is 0.
FUSEDOPTIM_HD uint32_t splittable(float x) {
  const uint32_t u = bits_of(x);
  return is_nan_bits(u) ? 0x7fc00000u : u;
}
// Rounded to 24 bits, nearest, ties to even.
FUSEDOPTIM_HD uint32_t splittable24(float x) {
  const uint32_t u = splittable(x);
  return (u + 0x7fu + (u >> 8 & 1u)) & 0xffffff00u;
}
FUSEDOPTIM_HD uint16_t upper_part(uint32_t u) { return static_cast<uint16_t>((u + 0x8000u) >> 16); }

// A weight that somebody set to 0 is 0, whatever remainder it had; one that was set to something else is off by less
// than a unit in its last place.
FUSEDOPTIM_HD float join(uint16_t upper, int32_t rest) {
  if ((upper & 0x7fffu) == 0 && rest < 0) rest = 0;
  return float_of((static_cast<uint32_t>(upper) << 16) + static_cast<uint32_t>(rest));
}

// ---- an fp32 number beside its rounded one ----

// Where somebody wrote another element since, that is the number.
FUSEDOPTIM_HD float master_of(uint16_t element, float master, DType d) {
  const uint16_t rounded = d == DType::bf16 ? f32_to_bf16(master) : f32_to_f16(master);
  return rounded == element ? master : d == DType::bf16 ? bf16_to_f32(element) : f16_to_f32(element);
}

// ---- one element of any storage ----

template <class T>
FUSEDOPTIM_HD T load_stored(const void* data, const void* extra, Storage s, int64_t i) {
  if (is_dtype(s)) return load_element<T>(data, static_cast<DType>(s), i);
  const uint16_t x = static_cast<const uint16_t*>(data)[i];
  switch (s) {
    case Storage::bf16_remainder:
      return static_cast<T>(join(x, static_cast<const int16_t*>(extra)[i]));
    case Storage::bf16_remainder8:
      return static_cast<T>(join(x, static_cast<const int8_t*>(extra)[i] * 256));
    case Storage::bf16_master:
    case Storage::f16_master:
      return static_cast<T>(master_of(x, static_cast<const float*>(extra)[i], dtype_of(s)));
    default:
      return static_cast<T>(bf16_to_f32(x));
  }
}

// random: 16 bits, for what is rounded stochastically. fp64 goes through fp32.
template <class T>
FUSEDOPTIM_HD void store_stored(void* data, void* extra, Storage s, int64_t i, T value, uint32_t random) {
  if (is_dtype(s)) return store_element<T>(data, static_cast<DType>(s), i, value);
  const float x = static_cast<float>(value);
  uint16_t& out = static_cast<uint16_t*>(data)[i];
  switch (s) {
    case Storage::bf16_remainder: {
      const uint32_t u = splittable(x);
      out = upper_part(u);
      static_cast<uint16_t*>(extra)[i] = static_cast<uint16_t>(u);
      break;
    }
    case Storage::bf16_remainder8: {
      const uint32_t u = splittable24(x);
      out = upper_part(u);
      static_cast<uint8_t*>(extra)[i] = static_cast<uint8_t>(u >> 8);
      break;
    }
    case Storage::bf16_master:
    case Storage::f16_master:
      out = s == Storage::bf16_master ? f32_to_bf16(x) : f32_to_f16(x);
      static_cast<float*>(extra)[i] = x;
      break;
    default:
      out = f32_to_bf16_stochastic(x, random);
  }
}

// A value as it reads once it was stored.
template <class T>
FUSEDOPTIM_HD T as_stored_in(Storage s, T value, uint32_t random) {
  if (s == Storage::f32 || s == Storage::f64) return value;
  const float x = static_cast<float>(value);
  switch (s) {
    case Storage::bf16:
      return static_cast<T>(bf16_to_f32(f32_to_bf16(x)));
    case Storage::f16:
      return static_cast<T>(f16_to_f32(f32_to_f16(x)));
    case Storage::bf16_stochastic:
      return static_cast<T>(bf16_to_f32(f32_to_bf16_stochastic(x, random)));
    case Storage::bf16_remainder:
      return static_cast<T>(float_of(splittable(x)));
    case Storage::bf16_remainder8:
      return static_cast<T>(float_of(splittable24(x)));
    default:
      return static_cast<T>(x);
  }
}

}  // namespace fusedoptim

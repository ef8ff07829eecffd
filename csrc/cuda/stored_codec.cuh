// Groups of elements of any storages between memory and registers. Numbers here are finite: loops of groups leave all
// others to stored.cuh, which takes a dozen instructions per element out of them. What decodes to a NaN where the exact
// codec has a number (the remainder of a weight that somebody set to 0) is such a case as well.
#pragma once

#include "../core/block.h"
#include "../core/random_bits.h"
#include "codec.cuh"
#include "lanes.cuh"

namespace fusedoptim::cuda {

// A group as it is in memory: the elements, and what is kept beside each.
struct StoredRaw {
  Raw data, extra;
  float scale;  // of the block that it is in
};

// ---- memory ----

__device__ __forceinline__ void fetch_bytes(Raw& raw, const char* at, int bytes) {
  if (bytes == 16) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(at));
    raw.word[0] = x.x, raw.word[1] = x.y, raw.word[2] = x.z, raw.word[3] = x.w;
  } else if (bytes == 8) {
    const uint2 x = __ldcs(reinterpret_cast<const uint2*>(at));
    raw.word[0] = x.x, raw.word[1] = x.y;
  } else if (bytes == 4) {
    raw.word[0] = __ldcs(reinterpret_cast<const uint32_t*>(at));
  }
}
__device__ __forceinline__ void put_bytes(char* at, const Raw& raw, int bytes) {
  if (bytes == 16)
    __stcs(reinterpret_cast<uint4*>(at), uint4{raw.word[0], raw.word[1], raw.word[2], raw.word[3]});
  else if (bytes == 8)
    __stcs(reinterpret_cast<uint2*>(at), uint2{raw.word[0], raw.word[1]});
  else if (bytes == 4)
    __stcs(reinterpret_cast<uint32_t*>(at), raw.word[0]);
}

// ---- parts of words ----

// The low 16 bits of both, or the high ones.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xffffu) | b << 16;
#endif
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}
// Byte `which` of each.
__device__ __forceinline__ uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int which) {
#if defined(__CUDA_ARCH__)
  const uint32_t pair = (which + 4) << 4 | which;
  return __byte_perm(__byte_perm(a, b, pair), __byte_perm(c, d, pair), 0x5410);
#else
  const int s = 8 * which;
  return (a >> s & 0xffu) | (b >> s & 0xffu) << 8 | (c >> s & 0xffu) << 16 | (d >> s & 0xffu) << 24;
#endif
}
__device__ __forceinline__ uint32_t half_at(const Raw& raw, int k) { return raw.word[k / 2] >> k % 2 * 16 & 0xffffu; }
__device__ __forceinline__ int32_t signed_half_at(const Raw& raw, int k) {
  return k % 2 ? static_cast<int32_t>(raw.word[k / 2]) >> 16 : static_cast<int16_t>(raw.word[k / 2]);
}
__device__ __forceinline__ uint32_t byte_at(const Raw& raw, int k) { return raw.word[k / 4] >> k % 4 * 8 & 0xffu; }
__device__ __forceinline__ int32_t signed_byte_at(const Raw& raw, int k) {
  return static_cast<int32_t>(raw.word[k / 4] << (24 - k % 4 * 8)) >> 24;
}

// ---- from memory ----

// One of a block's codes: what it stands for is a float less 1, exactly, so that one rounding by fma is
// block_value()'s.
__device__ __forceinline__ float decode_code(BlockFormat f, const Raw& raw, int k, float unit) {
  if (f.squares) return std::fma(float_of(0x3f800000u + (byte_at(raw, k) << (23 - f.mantissa))), unit, -unit);
  const int32_t code = signed_byte_at(raw, k);
  const uint32_t magnitude = static_cast<uint32_t>(code < 0 ? -code : code);
  const float signed_unit = float_of(bits_of(unit) ^ (static_cast<uint32_t>(code) & 0x80000000u));
  return std::fma(float_of(0x3f800000u + (magnitude << (23 - f.mantissa))), signed_unit, -signed_unit);
}

template <int n>
__device__ __forceinline__ void decode_stored(float (&x)[n], const StoredRaw& raw, Storage s) {
  if (is_in_blocks(s)) {
    const BlockFormat f = block_format(s);
    const float unit = block_unit(f, raw.scale);
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = decode_code(f, raw.data, k, unit);
    return;
  }
  if (s == Storage::f32) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = float_of(raw.data.word[k % 4]);
    return;
  }
  if (s == Storage::f16) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = decode_f16(static_cast<uint16_t>(half_at(raw.data, k)));
    return;
  }
  if (s == Storage::bf16_master || s == Storage::f16_master) {
    const DType d = dtype_of(s);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const uint32_t element = half_at(raw.data, k);
      const float master = float_of(raw.extra.word[k % 4]);
      x[k] = encode_16(master, d) == element ? master : decode_16(static_cast<uint16_t>(element), d);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < n; ++k) {
    uint32_t u = half_at(raw.data, k) << 16;
    if (s == Storage::bf16_remainder) u += static_cast<uint32_t>(signed_half_at(raw.extra, k));
    if (s == Storage::bf16_remainder8) u += static_cast<uint32_t>(signed_byte_at(raw.extra, k)) << 8;
    x[k] = float_of(u);
  }
}

// ---- to memory ----

// Of a block: what its numbers are multiplied by, without branches. scale is 0, or from 2^-100 to 2^100; see lanes.cuh.
__device__ __forceinline__ float fast_inverse(BlockFormat f, float scale) {
  const float r = approximate_reciprocal(scale);
  const float inverse = Quotients<FastLane>::divide(-f.top, scale, std::fma(r, std::fma(-scale, r, 1.0f), r));
  return scale > 0 ? inverse : 0.0f;
}

// block_code() with its sign. Without its limit: |x| is the scale at most, so that the product is the top or the next
// number above, and neither half a step nor 16 random bits carry that to the next code.
__device__ __forceinline__ uint32_t encode_code(BlockFormat f, float x, float inverse, uint32_t rounding) {
  uint32_t c = (bits_of(fabsf(x) * inverse + 1.0f) - 0x3f800000u + rounding) >> (23 - f.mantissa);
  if (f.squares) return c == 0 && x != 0 ? 1 : c;
  return bits_of(x) >> 31 ? 0u - c : c;
}

// random: 16 bits for each element, if the storage takes any. For a group in a block, raw has the scale.
template <int n>
__device__ __forceinline__ void encode_stored(StoredRaw& raw, const float (&x)[n], Storage s,
                                              const uint32_t (&random)[n]) {
  uint32_t u[n];
  if (is_in_blocks(s)) {
    const BlockFormat f = block_format(s);
    const float inverse = fast_inverse(f, raw.scale);
#pragma unroll
    for (int k = 0; k < n; ++k)
      u[k] = encode_code(f, x[k], inverse, is_stochastic(s) ? block_random(f, random[k]) : block_half(f));
#pragma unroll
    for (int k = 0; k < n; k += 4) raw.data.word[k / 4] = bytes_of(u[k], u[k + 1], u[k + 2], u[k + 3], 0);
    return;
  }
#pragma unroll
  for (int k = 0; k < n; ++k) u[k] = bits_of(x[k]);
  if (s == Storage::f32) {
#pragma unroll
    for (int k = 0; k < n; ++k) raw.data.word[k % 4] = u[k];
    return;
  }
  if (s == Storage::bf16_remainder || s == Storage::bf16_remainder8 || s == Storage::bf16_stochastic) {
    if (s == Storage::bf16_remainder8) {
#pragma unroll
      for (int k = 0; k < n; ++k) u[k] = (u[k] + 0x7fu + (u[k] >> 8 & 1u)) & 0xffffff00u;
#pragma unroll
      for (int k = 0; k < n; k += 4) raw.extra.word[k / 4] = bytes_of(u[k], u[k + 1], u[k + 2], u[k + 3], 1);
    } else if (s == Storage::bf16_remainder) {
#pragma unroll
      for (int k = 0; k < n; k += 2) raw.extra.word[k / 2] = low_halves(u[k], u[k + 1]);
    }
#pragma unroll
    for (int k = 0; k < n; ++k) u[k] += s == Storage::bf16_stochastic ? random[k] : 0x8000u;
#pragma unroll
    for (int k = 0; k < n; k += 2) raw.data.word[k / 2] = high_halves(u[k], u[k + 1]);
    return;
  }
#pragma unroll
  for (int k = 0; k < n; k += 2) raw.data.word[k / 2] = encode_pair(x[k], x[k + 1], dtype_of(s));
  if (s == Storage::bf16_master || s == Storage::f16_master) {
#pragma unroll
    for (int k = 0; k < n; ++k) raw.extra.word[k % 4] = u[k];
  }
}

}  // namespace fusedoptim::cuda

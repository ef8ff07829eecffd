// Groups of elements between memory and registers, as wide as the hardware can: 16 bytes at once.
//
// A group has the same elements in every operand, so its width follows from the operands' dtypes: 8 elements where all
// have 16 bits, 2 where all have 64, else 4: then 16-bit operands move 8 bytes at once, which still fills whole
// sectors. Fetching is apart from decoding so that all loads of a pass are under way before the first is waited for.
#pragma once

#if !defined(FUSEDOPTIM_CUDA_ON_HOST)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../gpu/table.h"

namespace fusedoptim::cuda {

using namespace gpu;

// ---- dtypes ----

// The hardware's conversions have the bits of core/dtype.h, apart from the payloads of NaNs.
__device__ __forceinline__ float decode_f16(uint16_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x));
#else
  return f16_to_f32(x);
#endif
}
__device__ __forceinline__ uint16_t encode_f16(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  return f32_to_f16(x);
#endif
}
__device__ __forceinline__ float decode_16(uint16_t x, DType d) {
  return d == DType::bf16 ? bf16_to_f32(x) : decode_f16(x);
}
__device__ __forceinline__ uint16_t encode_16(float x, DType d) {
  return d == DType::bf16 ? f32_to_bf16(x) : encode_f16(x);
}
// Two at once, the first in the lower half: one instruction, where rounding in integer bits takes a dozen of the 96
// that an element of bf16 AdamW may cost on an H200 before arithmetic is slower than memory.
__device__ __forceinline__ uint32_t encode_pair(float low, float high, DType d) {
#if __CUDA_ARCH__ >= 800
  if (d == DType::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#endif
  return encode_16(low, d) | static_cast<uint32_t>(encode_16(high, d)) << 16;
}

// One element. wide: it may have 64 bits; kernels for tensors without such hold no 64-bit arithmetic.
template <class T, bool wide>
__device__ __forceinline__ T load_single(const void* base, DType d, int64_t i) {
  if constexpr (wide) return load_element<T>(base, d, i);
  if (d == DType::f32) return static_cast<const float*>(base)[i];
  return decode_16(static_cast<const uint16_t*>(base)[i], d);
}
template <bool wide, class T>
__device__ __forceinline__ void store_single(void* base, DType d, int64_t i, T x) {
  if constexpr (wide) {
    store_element<T>(base, d, i, x);
  } else {
    if (d == DType::f32)
      static_cast<float*>(base)[i] = x;
    else
      static_cast<uint16_t*>(base)[i] = encode_16(x, d);
  }
}

// A value as it reads once it was stored.
template <class T>
__device__ __forceinline__ T as_stored(T x, DType d) {
  if constexpr (sizeof(T) == 4)
    if (size_of(d) == 2) return decode_16(encode_16(x, d), d);
  return x;
}

// ---- groups ----

struct Raw {  // a group as it is in memory
  uint32_t word[4];
};

// Read once and not again before the next step: such lines should be the first to leave the caches.
template <int kGroup>
__device__ __forceinline__ void fetch(Raw& raw, const char* at, DType d) {
  if (kGroup == 4 && size_of(d) == 2) {
    const uint2 x = __ldcs(reinterpret_cast<const uint2*>(at));
    raw.word[0] = x.x, raw.word[1] = x.y;
  } else {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(at));
    raw.word[0] = x.x, raw.word[1] = x.y, raw.word[2] = x.z, raw.word[3] = x.w;
  }
}

template <int kGroup>
__device__ __forceinline__ void put(char* at, const Raw& raw, DType d) {
  if (kGroup == 4 && size_of(d) == 2)
    __stcs(reinterpret_cast<uint2*>(at), uint2{raw.word[0], raw.word[1]});
  else
    __stcs(reinterpret_cast<uint4*>(at), uint4{raw.word[0], raw.word[1], raw.word[2], raw.word[3]});
}

template <int kGroup, class T>
__device__ __forceinline__ void decode(T (&x)[kGroup], const Raw& raw, DType d) {
  if constexpr (kGroup == 2) {
    memcpy(x, raw.word, 16);
  } else if (kGroup == 4 && d == DType::f32) {
    for (int k = 0; k < 4; ++k) x[k] = float_of(raw.word[k]);
  } else {
    for (int k = 0; k < kGroup; ++k) x[k] = decode_16(static_cast<uint16_t>(raw.word[k / 2] >> (k % 2 ? 16 : 0)), d);
  }
}

template <int kGroup, class T>
__device__ __forceinline__ void encode(Raw& raw, const T (&x)[kGroup], DType d) {
  if constexpr (kGroup == 2) {
    memcpy(raw.word, x, 16);
  } else if (kGroup == 4 && d == DType::f32) {
    for (int k = 0; k < 4; ++k) raw.word[k] = bits_of(x[k]);
  } else {
    for (int k = 0; k < kGroup / 2; ++k) raw.word[k] = encode_pair(x[2 * k], x[2 * k + 1], d);
  }
}

// ---- where elements lie ----

// The offsets of logical element i in the first n operands, of which the index in the whole tensor is the last.
template <int n>
__device__ inline void strided_offsets(const int64_t* layout, int64_t i, int64_t (&at)[n]) {
  for (int k = 0; k < n; ++k) at[k] = 0;
  const int64_t* dim = layout + 1;
  for (int64_t d = layout[0]; d > 0; --d, dim += kLayoutWordsPerDim) {
    const int64_t size = dim[0], index = d > 1 ? i % size : i;
    for (int k = 0; k < n; ++k) at[k] += index * dim[1 + k];
    if (d > 1) i /= size;
  }
}

}  // namespace fusedoptim::cuda

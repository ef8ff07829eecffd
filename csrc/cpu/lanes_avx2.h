// AVX2 + FMA + F16C lanes for the update rules (see rules/common.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../core/dtype.h"

namespace fusedoptim::avx2 {

struct F32 {
  using T = float;
  using V = __m256;
  static constexpr int width = 8;
  FUSEDOPTIM_INLINE static V set(T x) { return _mm256_set1_ps(x); }
  FUSEDOPTIM_INLINE static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  FUSEDOPTIM_INLINE static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  FUSEDOPTIM_INLINE static V max(V a, V b) {  // max_ps returns its second operand if either is NaN
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // min and max return their second operand if either is NaN
  FUSEDOPTIM_INLINE static V clamp(V a, V b) { return _mm256_max_ps(-b, _mm256_min_ps(b, a)); }
  FUSEDOPTIM_INLINE static V load(const float* x) { return _mm256_loadu_ps(x); }
  FUSEDOPTIM_INLINE static void store(float* x, V v) { _mm256_storeu_ps(x, v); }

  FUSEDOPTIM_INLINE static V load_bf16(const uint16_t* x) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  // The rounded value in the upper 16 bits of each element (see f32_to_bf16).
  FUSEDOPTIM_INLINE static __m256i round_bf16(V v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }
  FUSEDOPTIM_INLINE static void store_bf16(uint16_t* x, V v) { narrow(x, _mm256_srli_epi32(round_bf16(v), 16)); }
  FUSEDOPTIM_INLINE static V as_bf16(V v) {
    return _mm256_castsi256_ps(_mm256_and_si256(round_bf16(v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // Integers of 8 and 16 bits to 32, and the lower bits of 32 back.
  FUSEDOPTIM_INLINE static __m256i widen(const uint8_t* x) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m256i widen(const int8_t* x) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m256i widen(const uint16_t* x) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m256i widen(const int16_t* x) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static void narrow(uint16_t* x, __m256i v) {
    const __m256i at = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, at), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
  }
  FUSEDOPTIM_INLINE static void narrow(uint8_t* x, __m256i v) {
    const __m256i at = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i packed =
        _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, at), _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
  }
  // Four registers of numbers that fit in 8 bits, with a sign or without.
  template <bool is_signed>
  FUSEDOPTIM_INLINE static void store_bytes(uint8_t* x, __m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    const __m256i bytes = is_signed ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
    const __m256i in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), in_order);
  }
  // x, negated where the other is below 0; 0 where that is 0.
  FUSEDOPTIM_INLINE static __m256i with_sign_of(__m256i other, __m256i x) { return _mm256_sign_epi32(x, other); }
  // For two 16-bit numbers in each lane: see pairs.h.
  static constexpr bool has_pairs = true;
  FUSEDOPTIM_INLINE static __m256i with_upper(__m256i lower, __m256i upper) {
    return _mm256_blend_epi16(lower, upper, 0xaa);
  }
  // Of 16-bit numbers without a sign; what were below 0 is 0.
  FUSEDOPTIM_INLINE static __m256i subtract_unsigned_16(__m256i a, __m256i b) { return _mm256_subs_epu16(a, b); }
  // n: even
  template <int n>
  FUSEDOPTIM_INLINE static bool any_nan(const V (&x)[n]) {
    V found = _mm256_cmp_ps(x[0], x[1], _CMP_UNORD_Q);
    for (int k = 2; k < n; k += 2) found = _mm256_or_ps(found, _mm256_cmp_ps(x[k], x[k + 1], _CMP_UNORD_Q));
    return _mm256_movemask_ps(found) != 0;
  }
  FUSEDOPTIM_INLINE static V load_f16(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static void store_f16(uint16_t* x, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FUSEDOPTIM_INLINE static V as_f16(V v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};

struct F64 {
  using T = double;
  using V = __m256d;
  static constexpr bool has_pairs = false;
  static constexpr int width = 4;
  FUSEDOPTIM_INLINE static V set(T x) { return _mm256_set1_pd(x); }
  FUSEDOPTIM_INLINE static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  FUSEDOPTIM_INLINE static V sqrt(V a) { return _mm256_sqrt_pd(a); }
  FUSEDOPTIM_INLINE static V max(V a, V b) {
    return _mm256_blendv_pd(_mm256_max_pd(a, b), a, _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
  }
  FUSEDOPTIM_INLINE static V clamp(V a, V b) { return _mm256_max_pd(-b, _mm256_min_pd(b, a)); }
  FUSEDOPTIM_INLINE static V load(const double* x) { return _mm256_loadu_pd(x); }
  FUSEDOPTIM_INLINE static void store(double* x, V v) { _mm256_storeu_pd(x, v); }
};

}  // namespace fusedoptim::avx2

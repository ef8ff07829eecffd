// AVX-512 lanes for the update rules (see rules/common.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../core/dtype.h"

namespace fusedoptim::avx512 {

struct F32 {
  using T = float;
  using V = __m512;
  static constexpr int width = 16;
  FUSEDOPTIM_INLINE static V set(T x) { return _mm512_set1_ps(x); }
  FUSEDOPTIM_INLINE static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  FUSEDOPTIM_INLINE static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  FUSEDOPTIM_INLINE static V max(V a, V b) {  // max_ps returns its second operand if either is NaN
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  // min and max return their second operand if either is NaN
  FUSEDOPTIM_INLINE static V clamp(V a, V b) { return _mm512_max_ps(-b, _mm512_min_ps(b, a)); }
  FUSEDOPTIM_INLINE static V load(const float* x) { return _mm512_loadu_ps(x); }
  FUSEDOPTIM_INLINE static void store(float* x, V v) { _mm512_storeu_ps(x, v); }

  FUSEDOPTIM_INLINE static V load_bf16(const uint16_t* x) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  // The rounded value in the upper 16 bits of each element (see f32_to_bf16).
  FUSEDOPTIM_INLINE static __m512i round_bf16(V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    r = _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
    return _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  }
  FUSEDOPTIM_INLINE static void store_bf16(uint16_t* x, V v) { narrow(x, _mm512_srli_epi32(round_bf16(v), 16)); }
  FUSEDOPTIM_INLINE static V as_bf16(V v) {
    return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // Integers of 8 and 16 bits to 32, and the lower bits of 32 back.
  FUSEDOPTIM_INLINE static __m512i widen(const uint8_t* x) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m512i widen(const int8_t* x) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m512i widen(const uint16_t* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  FUSEDOPTIM_INLINE static __m512i widen(const int16_t* x) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  FUSEDOPTIM_INLINE static void narrow(uint16_t* x, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(v));
  }
  FUSEDOPTIM_INLINE static void narrow(uint8_t* x, __m512i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(v));
  }
  // Four registers of numbers that fit in 8 bits, with a sign or without.
  template <bool is_signed>
  FUSEDOPTIM_INLINE static void store_bytes(uint8_t* x, __m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    const __m512i bytes = is_signed ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(x, _mm512_permutexvar_epi32(order, bytes));
  }
  // x, negated where the other is below 0. Where that is 0, x is, too.
  FUSEDOPTIM_INLINE static __m512i with_sign_of(__m512i other, __m512i x) {
    return _mm512_mask_sub_epi32(x, _mm512_movepi32_mask(other), _mm512_setzero_si512(), x);
  }
  // For two 16-bit numbers in each lane: see pairs.h.
  static constexpr bool has_pairs = true;
  FUSEDOPTIM_INLINE static __m512i with_upper(__m512i lower, __m512i upper) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, lower, upper);
  }
  // Of 16-bit numbers without a sign; what were below 0 is 0.
  FUSEDOPTIM_INLINE static __m512i subtract_unsigned_16(__m512i a, __m512i b) { return _mm512_subs_epu16(a, b); }
  // n: even
  template <int n>
  FUSEDOPTIM_INLINE static bool any_nan(const V (&x)[n]) {
    unsigned found = 0;
    for (int k = 0; k < n; k += 2) found |= _mm512_cmp_ps_mask(x[k], x[k + 1], _CMP_UNORD_Q);
    return found != 0;
  }
  FUSEDOPTIM_INLINE static V load_f16(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  FUSEDOPTIM_INLINE static void store_f16(uint16_t* x, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FUSEDOPTIM_INLINE static V as_f16(V v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};

struct F64 {
  using T = double;
  using V = __m512d;
  static constexpr bool has_pairs = false;
  static constexpr int width = 8;
  FUSEDOPTIM_INLINE static V set(T x) { return _mm512_set1_pd(x); }
  FUSEDOPTIM_INLINE static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  FUSEDOPTIM_INLINE static V sqrt(V a) { return _mm512_sqrt_pd(a); }
  FUSEDOPTIM_INLINE static V max(V a, V b) {
    return _mm512_mask_mov_pd(_mm512_max_pd(a, b), _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q), a);
  }
  FUSEDOPTIM_INLINE static V clamp(V a, V b) { return _mm512_max_pd(-b, _mm512_min_pd(b, a)); }
  FUSEDOPTIM_INLINE static V load(const double* x) { return _mm512_loadu_pd(x); }
  FUSEDOPTIM_INLINE static void store(double* x, V v) { _mm512_storeu_pd(x, v); }
};

}  // namespace fusedoptim::avx512

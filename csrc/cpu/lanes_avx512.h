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
  FUSEDOPTIM_HD static V set(T x) { return _mm512_set1_ps(x); }
  FUSEDOPTIM_HD static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  FUSEDOPTIM_HD static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  FUSEDOPTIM_HD static V max(V a, V b) {  // max_ps returns its second operand if either is NaN
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  FUSEDOPTIM_HD static V load(const float* x) { return _mm512_loadu_ps(x); }
  FUSEDOPTIM_HD static void store(float* x, V v) { _mm512_storeu_ps(x, v); }

  FUSEDOPTIM_HD static V load_bf16(const uint16_t* x) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  FUSEDOPTIM_HD static void store_bf16(uint16_t* x, V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __m512i r = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  FUSEDOPTIM_HD static V load_f16(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  FUSEDOPTIM_HD static void store_f16(uint16_t* x, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct F64 {
  using T = double;
  using V = __m512d;
  static constexpr int width = 8;
  FUSEDOPTIM_HD static V set(T x) { return _mm512_set1_pd(x); }
  FUSEDOPTIM_HD static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  FUSEDOPTIM_HD static V sqrt(V a) { return _mm512_sqrt_pd(a); }
  FUSEDOPTIM_HD static V max(V a, V b) {
    return _mm512_mask_mov_pd(_mm512_max_pd(a, b), _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q), a);
  }
  FUSEDOPTIM_HD static V load(const double* x) { return _mm512_loadu_pd(x); }
  FUSEDOPTIM_HD static void store(double* x, V v) { _mm512_storeu_pd(x, v); }
};

}  // namespace fusedoptim::avx512

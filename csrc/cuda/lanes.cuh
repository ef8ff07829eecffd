// Lanes of one element for the update rules (see rules/common.h), on a GPU. Compiled with -fmad=false, and without
// fast-math: + - * / are IEEE 754 operations.
#pragma once

#include <cmath>

#include "../rules/common.h"

namespace fusedoptim::cuda {

template <class Scalar>
struct Lane {
  using T = Scalar;
  using V = Scalar;
  static __device__ V set(T x) { return x; }
  static __device__ V fma(V a, V b, V c) { return std::fma(a, b, c); }
  static __device__ V sqrt(V a) { return std::sqrt(a); }
  static __device__ V clamp(V a, V b) { return a > b ? b : a < -b ? -b : a; }
  static __device__ V max(V a, V b) { return (a != a || a > b) ? a : b; }
};

// 1/x and 1/sqrt(x) to about one unit in the last place; subnormal x count as 0.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#if defined(FUSEDOPTIM_CUDA_ON_HOST)
  return cuda_on_host::approximate_reciprocal(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float approximate_rsqrt(float x) {
#if defined(FUSEDOPTIM_CUDA_ON_HOST)
  return cuda_on_host::approximate_rsqrt(x);
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// fp32, without branches: what a rule divides is correctly rounded, or a NaN or infinite, and whoever finds that in the
// end works the element out again with Lane. The compiler's own division and root branch at every element, to a slow
// path for what is out of range, and elements wait for each other there.
//
// Both take an approximation from the hardware, refine it by fma and round with the exact remainder, as the compiler's
// fast paths do. tests/cuda_host/quotients.cu goes through every divisor with all that could round wrongly.
struct FastLane : Lane<float> {
  // Factors that keep remainders above the subnormal numbers, whatever is divided.
  static constexpr float kUp = 0x1p48f, kDown = 0x1p-48f, kRootDown = 0x1p-24f;
  static constexpr float kTiny = 0x1p-100f, kHuge = 0x1p100f;

  // For x up to 2^79, also subnormal: x * 2^48 is then where the compiler's own root has its fast path. Above, infinity
  // times 0 makes a NaN. The result is 2^24 times the root.
  static __device__ __forceinline__ float raised_sqrt(float x) {
    const float scaled = x * kUp;
    // The summand is less than half a unit of any scaled number, but 0, whose approximation it makes finite.
    const float y = approximate_rsqrt(std::fma(x, kUp, 0x1p-126f));
    const float s = scaled * y;
    const float remainder = std::fma(-s, s, scaled);
    return std::fma(remainder, 0.5f * y, s);
  }
  static __device__ __forceinline__ float sqrt(float x) { return raised_sqrt(x) * kRootDown; }

  // Whether a parameter that was updated by these means is right.
  static __device__ __forceinline__ bool is_right(float param) { return fabsf(param) <= kHuge; }
};

#if defined(FUSEDOPTIM_BRANCHING_QUOTIENTS)  // for measurements
using LaneOfGroups = Lane<float>;
#else
using LaneOfGroups = FastLane;
#endif

}  // namespace fusedoptim::cuda

namespace fusedoptim {

template <>
struct Quotients<cuda::FastLane> {
  using M = cuda::FastLane;

  // a / b, from -a and the reciprocal of b, which has to be right to the last place or nearly always; no number on the
  // way may be subnormal. With -a the remainder is b*q - a, which leaves the sign of a quotient of 0 as it is in a
  // division, and takes no instruction to negate anything.
  static __device__ __forceinline__ float divide(float minus_a, float b, float reciprocal) {
    const float minus_q = minus_a * reciprocal;
    return std::fma(-reciprocal, std::fma(b, -minus_q, minus_a), -minus_q);
  }
  // The root is 0 or within 2^-75 to 2^40. Divisors come from bias corrections, which are within 2^-27 to 1 for every
  // number of steps; for a number that is none (0, or below) they are 0 or NaN, and so the result is a NaN.
  static __device__ __forceinline__ float root_over(float x, const Divisor<float>& d) {
    return divide(M::raised_sqrt(x) * -M::kRootDown, d.value, d.reciprocal);
  }
  // a may be anything up to 2^79, subnormal or 0. The quotient is never rounded to a subnormal number, so that the sum
  // is right where it is not tiny itself, or where a is 0. One of 2^80, which the scaling takes beyond the largest
  // number, can become infinite on the way instead of a NaN. b must not be negative, which no root is.
  static __device__ __forceinline__ float add_ratio(float s, float a, float b) {
    const float r = cuda::approximate_reciprocal(b);
    const float q = divide(a * -M::kUp, b, std::fma(r, std::fma(-b, r, 1.0f), r));
    const float sum = std::fma(q, M::kDown, s);
    // Not || and &&, of which the compiler may make branches.
    const bool right = ((fabsf(sum) >= M::kTiny) | (a == 0)) & (fabsf(b) <= M::kHuge);
    return right ? sum : NAN;
  }
};

}  // namespace fusedoptim

// Lanes of one element for the update rules (see rules/common.h), on a GPU. Compiled with -fmad=false, and without
// fast-math: + - * / are IEEE 754 operations.
#pragma once

#include <cmath>

#include "table.h"

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

}  // namespace fusedoptim::cuda

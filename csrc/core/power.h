// x^y for bias corrections. The C library's pow on the CPU, as in Python; a GPU's own pow may be two units off in the
// last place, so device code multiplies in double-double and rounds once. Both are then within 0.51 units of the exact
// power: rounded to fp32 they agree, in fp64 a step's scalars may differ in the last place.
#pragma once

#include <cmath>

#include "dtype.h"

// Defined where code for a GPU is compiled, or the same code for the host.
#if defined(__CUDA_ARCH__) || defined(FUSEDOPTIM_CUDA_ON_HOST)
#define FUSEDOPTIM_DEVICE_CODE 1
#endif

namespace fusedoptim {

struct DoubleDouble {
  double hi, lo;
};

FUSEDOPTIM_HD DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const double p = a.hi * b.hi;
  double e = fma(a.hi, b.hi, -p);
  e = fma(a.hi, b.lo, e);
  e = fma(a.lo, b.hi, e);
  const double s = p + e;
  return {s, e - (s - p)};
}

// x^n for n >= 0 by squaring; about 2*log2(n) multiplications of 6 dependent operations.
FUSEDOPTIM_HD double integer_power(double x, int64_t n) {
  DoubleDouble result{1.0, 0.0}, square{x, 0.0};
  for (;;) {
    if (n & 1) result = multiply(result, square);
    n >>= 1;
    if (n == 0) return result.hi;
    square = multiply(square, square);
  }
}

#if defined(__CUDACC__)
__host__ __device__ __noinline__ static  // one copy, once per block: not worth three in every kernel
#else
FUSEDOPTIM_HD
#endif
    double power(double x, double y) {
#if defined(FUSEDOPTIM_DEVICE_CODE)
  if (y == 0.5) return std::sqrt(x);
  const int64_t n = y >= 0 && y < 4503599627370496.0 ? static_cast<int64_t>(y) : -1;
  if (n >= 0 && static_cast<double>(n) == y) return integer_power(x, n);
#endif
  return std::pow(x, y);
}

}  // namespace fusedoptim

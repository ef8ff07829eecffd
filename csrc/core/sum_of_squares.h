// The one definition of a sum of squares, independent of backend, threads, chunks and layout: elements in logical
// order, squares in fp64, tiles of 1024 padded with zeros and summed by halving; the tile sums in the same way, until
// one number is left.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fusedoptim {

inline constexpr int64_t kTile = 1024;

FUSEDOPTIM_HD int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// x[i] += x[i + h] for h = 512, 256, ..., 1, given the results of h = 512
FUSEDOPTIM_HD double sum_by_halving(double* x512) {
  for (int h = 256; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) x512[i] += x512[i + h];
  return x512[0];
}

// 1024 elements, the missing ones given as zeros. The square of an fp32 value is exact in fp64.
template <class T>
FUSEDOPTIM_HD double tile_sum_of_squares(const T* x) {
  alignas(64) double sums[kTile / 2];
  for (int i = 0; i < kTile / 2; ++i) {
    const double a = x[i], b = x[i + kTile / 2];
    sums[i] = a * a + b * b;
  }
  return sum_by_halving(sums);
}

// Sums n tile sums in place; n = 0 gives 0.
inline double reduce_tile_sums(double* partial, int64_t n) {
  if (n == 0) return 0.0;
  while (n > 1) {
    const int64_t m = tiles(n);
    for (int64_t t = 0; t < m; ++t) {
      alignas(64) double sums[kTile / 2];
      const double* x = partial + t * kTile;
      const int64_t left = n - t * kTile;
      for (int64_t i = 0; i < kTile / 2; ++i)
        sums[i] = (i < left ? x[i] : 0.0) + (i + kTile / 2 < left ? x[i + kTile / 2] : 0.0);
      partial[t] = sum_by_halving(sums);
    }
    n = m;
  }
  return partial[0];
}

}  // namespace fusedoptim

// Copies between strided tensors and contiguous buffers, in logical order.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace fusedoptim {

// Calls f(k, offset) for k in [0, n): offset is where logical element start+k lies.
template <class F>
FUSEDOPTIM_HD void for_each_offset(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                   int64_t start, int64_t n, F f) {
  const int dims = static_cast<int>(sizes.size());
  if (dims == 0) {
    if (n > 0) f(int64_t{0}, int64_t{0});
    return;
  }
  int64_t index[64], offset = 0, rest = start;
  for (int d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * strides[d];
  }
  for (int64_t k = 0; k < n; ++k) {
    f(k, offset);
    for (int d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= index[d] * strides[d];
      index[d] = 0;
    }
  }
}

template <class T>
FUSEDOPTIM_HD void gather(T* out, const void* base, DType dtype, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  for_each_offset(sizes, strides, start, n, [&](int64_t k, int64_t at) { out[k] = load_element<T>(base, dtype, at); });
}

template <class T>
FUSEDOPTIM_HD void scatter(const T* in, void* base, DType dtype, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  for_each_offset(sizes, strides, start, n, [&](int64_t k, int64_t at) { store_element<T>(base, dtype, at, in[k]); });
}

}  // namespace fusedoptim

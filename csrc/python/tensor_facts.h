// What the tables need to know of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../core/dtype.h"

namespace fusedoptim {

inline DType dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return DType::unsupported;
  }
}

// In bytes, of an element.
inline int64_t element_size(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const bool is_code = t.scalar_type() == ScalarType::Char || t.scalar_type() == ScalarType::Byte;
  return is_code ? 1 : size_of(dtype_of(t));
}

template <class Range>
std::vector<int64_t> to_vector(const Range& r) {
  return {r.begin(), r.end()};
}

// Strides of dimensions of size 1 mean nothing.
inline bool row_major(int ndim, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Fills its memory without gaps or overlaps, in some order of the dimensions.
inline bool dense(int ndim, const int64_t* sizes, const int64_t* strides) {
  if (row_major(ndim, sizes, strides)) return true;
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int d = 0; d < ndim; ++d)
    if (sizes[d] != 1) by_stride.push_back({strides[d], sizes[d]});
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

using Numbers = std::vector<int64_t>;
inline bool row_major(const Numbers& sizes, const Numbers& strides) {
  return row_major(static_cast<int>(sizes.size()), sizes.data(), strides.data());
}
inline bool dense(const Numbers& sizes, const Numbers& strides) {
  return dense(static_cast<int>(sizes.size()), sizes.data(), strides.data());
}

}  // namespace fusedoptim

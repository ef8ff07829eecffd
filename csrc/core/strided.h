// Copies between strided tensors and contiguous buffers, in logical order. M, the lanes of an instruction set (see
// rules/common.h), makes the functions of each distinct: they are called, because 30 inlined copies of each would
// triple the library, and no linker may take one that was compiled for another set. (Hence no lambdas.)
#pragma once

#include <cstdint>
#include <vector>

#include "operand.h"

namespace fusedoptim {

// Goes through the logical elements of a tensor from `start` on, in runs along its last dimension.
class Runs {
 public:
  FUSEDOPTIM_INLINE Runs(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t start)
      : sizes_(sizes.data()), strides_(strides.data()), last_(static_cast<int>(sizes.size()) - 1) {
    for (int d = last_; d >= 0; --d) {
      index_[d] = start % sizes_[d];
      start /= sizes_[d];
      offset_ += index_[d] * strides_[d];
    }
  }
  FUSEDOPTIM_INLINE int64_t offset() const { return offset_; }
  FUSEDOPTIM_INLINE int64_t stride() const { return strides_[last_]; }
  // How many elements the run has from here on, at most `most`.
  FUSEDOPTIM_INLINE int64_t length(int64_t most) const {
    const int64_t left = sizes_[last_] - index_[last_];
    return left < most ? left : most;
  }
  FUSEDOPTIM_INLINE void advance(int64_t count) {
    index_[last_] += count;
    offset_ += count * strides_[last_];
    for (int d = last_; d > 0 && index_[d] == sizes_[d]; --d) {
      offset_ += strides_[d - 1] - index_[d] * strides_[d];
      index_[d] = 0;
      ++index_[d - 1];
    }
  }

 private:
  const int64_t *sizes_, *strides_;
  const int last_;
  int64_t index_[64], offset_ = 0;
};

template <DType d, class T>
FUSEDOPTIM_INLINE void gather_from(T* out, const void* base, Runs runs, int64_t n) {
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k), offset = runs.offset(), stride = runs.stride();
    for (int64_t j = 0; j < length; ++j) out[k + j] = load_element<T>(base, d, offset + j * stride);
    runs.advance(length);
    k += length;
  }
}

// Elements start to start + n of a tensor to a buffer of the compute type.
template <class M, class T = typename M::T>
__attribute__((noinline)) void gather(T* out, const Operand& o, const std::vector<int64_t>& sizes,
                                      const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  const Runs runs(sizes, strides, start);
  switch (o.storage) {
    case DType::f32:
      return gather_from<DType::f32>(out, o.data, runs, n);
    case DType::f64:
      return gather_from<DType::f64>(out, o.data, runs, n);
    case DType::bf16:
      return gather_from<DType::bf16>(out, o.data, runs, n);
    default:
      return gather_from<DType::f16>(out, o.data, runs, n);
  }
}

template <DType d, class T>
FUSEDOPTIM_INLINE void scatter_to(const T* in, void* base, Runs runs, int64_t n) {
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k), offset = runs.offset(), stride = runs.stride();
    for (int64_t j = 0; j < length; ++j) store_element<T>(base, d, offset + j * stride, in[k + j]);
    runs.advance(length);
    k += length;
  }
}

template <class M, class T = typename M::T>
__attribute__((noinline)) void scatter(const T* in, const Operand& o, const std::vector<int64_t>& sizes,
                                       const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  const Runs runs(sizes, strides, start);
  switch (o.storage) {
    case DType::f32:
      return scatter_to<DType::f32>(in, o.data, runs, n);
    case DType::f64:
      return scatter_to<DType::f64>(in, o.data, runs, n);
    case DType::bf16:
      return scatter_to<DType::bf16>(in, o.data, runs, n);
    default:
      return scatter_to<DType::f16>(in, o.data, runs, n);
  }
}

template <class M>
__attribute__((noinline)) void fill_with_zeros(const Operand& o, const std::vector<int64_t>& sizes,
                                               const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  Runs runs(sizes, strides, start);
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k);
    for (int64_t j = 0; j < length; ++j)
      store_element<float>(o.data, o.storage, runs.offset() + j * runs.stride(), 0.0f);
    runs.advance(length);
    k += length;
  }
}

}  // namespace fusedoptim

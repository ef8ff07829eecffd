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

// Bytes as they are, of elements of one size.
template <class Word>
FUSEDOPTIM_INLINE void gather_words(void* out, const void* base, Runs runs, int64_t n) {
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k), offset = runs.offset(), stride = runs.stride();
    for (int64_t j = 0; j < length; ++j)
      static_cast<Word*>(out)[k + j] = static_cast<const Word*>(base)[offset + j * stride];
    runs.advance(length);
    k += length;
  }
}

FUSEDOPTIM_INLINE void gather_bytes(void* out, const void* base, int64_t size, const Runs& runs, int64_t n) {
  if (size == 4) return gather_words<uint32_t>(out, base, runs, n);
  if (size == 2) return gather_words<uint16_t>(out, base, runs, n);
  if (size == 1) return gather_words<uint8_t>(out, base, runs, n);
}

// Elements start to start + n of a tensor to a buffer: of the compute type, or for storages that are no dtype as they
// are, and what they keep beside.
template <class M, class T = typename M::T>
__attribute__((noinline)) void gather(const Operand& out, const Operand& o, const std::vector<int64_t>& sizes,
                                      const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  const Runs runs(sizes, strides, start);
  T* const to = static_cast<T*>(out.data);
  switch (o.storage) {
    case Storage::f32:
      return gather_from<DType::f32>(to, o.data, runs, n);
    case Storage::f64:
      return gather_from<DType::f64>(to, o.data, runs, n);
    case Storage::bf16:
      return gather_from<DType::bf16>(to, o.data, runs, n);
    case Storage::f16:
      return gather_from<DType::f16>(to, o.data, runs, n);
    default:
      gather_bytes(out.data, o.data, size_of(o.storage), runs, n);
      gather_bytes(out.extra, o.extra, extra_size_of(o.storage), runs, n);
  }
}

// The lower halves of the places that these elements have in the whole tensor, for as long as the upper half, which is
// returned as well, is the same. Returns how many these are.
template <class M>
__attribute__((noinline)) int64_t gather_indices(uint32_t* out, uint32_t& upper, int64_t first,
                                                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                                 int64_t start, int64_t n) {
  Runs runs(sizes, strides, start);
  upper = static_cast<uint32_t>((first + runs.offset()) >> 32);
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k), offset = first + runs.offset(), stride = runs.stride();
    for (int64_t j = 0; j < length; ++j, ++k) {
      const int64_t index = offset + j * stride;
      if (static_cast<uint32_t>(index >> 32) != upper) return k;
      out[k] = static_cast<uint32_t>(index);
    }
    runs.advance(length);
  }
  return n;
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

template <class Word>
FUSEDOPTIM_INLINE void scatter_words(const void* in, void* base, Runs runs, int64_t n) {
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k), offset = runs.offset(), stride = runs.stride();
    for (int64_t j = 0; j < length; ++j)
      static_cast<Word*>(base)[offset + j * stride] = static_cast<const Word*>(in)[k + j];
    runs.advance(length);
    k += length;
  }
}

FUSEDOPTIM_INLINE void scatter_bytes(const void* in, void* base, int64_t size, const Runs& runs, int64_t n) {
  if (size == 4) return scatter_words<uint32_t>(in, base, runs, n);
  if (size == 2) return scatter_words<uint16_t>(in, base, runs, n);
  if (size == 1) return scatter_words<uint8_t>(in, base, runs, n);
}

template <class M, class T = typename M::T>
__attribute__((noinline)) void scatter(const Operand& in, const Operand& o, const std::vector<int64_t>& sizes,
                                       const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  const Runs runs(sizes, strides, start);
  const T* const from = static_cast<const T*>(in.data);
  switch (o.storage) {
    case Storage::f32:
      return scatter_to<DType::f32>(from, o.data, runs, n);
    case Storage::f64:
      return scatter_to<DType::f64>(from, o.data, runs, n);
    case Storage::bf16:
      return scatter_to<DType::bf16>(from, o.data, runs, n);
    case Storage::f16:
      return scatter_to<DType::f16>(from, o.data, runs, n);
    default:
      scatter_bytes(in.data, o.data, size_of(o.storage), runs, n);
      scatter_bytes(in.extra, o.extra, extra_size_of(o.storage), runs, n);
  }
}

template <class M>
__attribute__((noinline)) void fill_with_zeros(const Operand& o, const std::vector<int64_t>& sizes,
                                               const std::vector<int64_t>& strides, int64_t start, int64_t n) {
  Runs runs(sizes, strides, start);
  for (int64_t k = 0; k < n;) {
    const int64_t length = runs.length(n - k);
    for (int64_t j = 0; j < length; ++j)
      store_element<float>(o.data, dtype_of(o.storage), runs.offset() + j * runs.stride(), 0.0f);
    runs.advance(length);
    k += length;
  }
}

}  // namespace fusedoptim

// The sums of squares of tiles of a gradient, as core/sum_of_squares.h defines them.
#pragma once

#include "../core/strided.h"
#include "../core/sum_of_squares.h"
#include "../core/tensor_table.h"
#include "../rules/step_element.h"
#include "passes.h"

namespace fusedoptim {

template <class M>
double tile_sum(const Entry& e, int64_t tile, const GroupTransforms& t) {
  using T = typename M::T;
  const int64_t start = tile * kTile, left = e.numel - start, n = left < kTile ? left : kTile;
  const auto transform = GradTransform<T>::of(t);
  const bool as_it_is = t.leave_gradient();
  if (!e.sum_layout && e.grad().storage == storage_of(kCompute<T>) && n == kTile && as_it_is)
    return tile_sum_of_squares(static_cast<const T*>(e.grad().data) + start);
  alignas(64) T x[kTile] = {};
  if (e.sum_layout) {
    gather<M>({x, nullptr, e.grad().storage}, e.grad(), e.sum_layout->sizes, e.sum_layout->strides[kGrad], start, n);
  } else {
    decode<M>(x, e.grad(), start, n);
  }
  if (!as_it_is)
    for (int64_t i = 0; i < kTile; i += M::width) M::store(x + i, transform_grad<M>(M::load(x + i), transform));
  return tile_sum_of_squares(x);
}

template <class F32, class F64>
TileSumFn find_tile_sum(const Entry& e) {
  return e.compute_dtype() == DType::f64 ? tile_sum<F64> : tile_sum<F32>;
}

}  // namespace fusedoptim

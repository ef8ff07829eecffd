// The table a step works on: one entry per parameter tensor, one row of hyper-parameters per group. Plain structs.
#pragma once

#include <cstdint>
#include <vector>

#include "../rules/all.h"
#include "dtype.h"

namespace fusedoptim {

// Sizes and per-operand strides (in elements) of tensors whose operands do not share one dense memory order.
// Elements are then visited in logical, row-major order.
struct Layout {
  std::vector<int64_t> sizes, param, grad, state[kMaxSlots];
};

struct Entry;
// Updates elements [begin, end) of a tensor. scalars points at the rule's Scalars<T>.
using UpdateFn = void (*)(const Entry&, int64_t begin, int64_t end, const void* scalars);
// The sum of squares of elements [1024*tile, 1024*(tile+1)) of a tensor's gradient.
using TileSumFn = double (*)(const Entry&, int64_t tile);

struct Entry {
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[kMaxSlots] = {};
  void* step = nullptr;           // 0-dim, fp32 or fp64; null for a rule without a step
  float* scalar_state = nullptr;  // for a rule with one
  double sum_of_squares = 0;
  float unscale = 1;  // what the CPU's kernels multiply the gradient by, in the compute dtype
  int64_t numel = 0;
  const Layout* layout = nullptr;  // null: all operands share one dense memory order
  UpdateFn update = nullptr;
  TileSumFn tile_sum = nullptr;
  int32_t group = 0;
  DType param_dtype = DType::f32, grad_dtype = DType::f32, step_dtype = DType::f32;
  DType state_dtype[kMaxSlots] = {};
  bool active = false;  // has a gradient in this step
  bool first = false;   // its states were created for this step

  FUSEDOPTIM_HD DType compute_dtype() const { return param_dtype == DType::f64 ? DType::f64 : DType::f32; }
};

struct HyperRow {
  double value[kMaxHypers] = {};
};

}  // namespace fusedoptim

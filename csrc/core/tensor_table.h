// The table a step works on: one entry per parameter tensor, one row of hyper-parameters per group. Plain structs.
#pragma once

#include <cstdint>
#include <vector>

#include "../rules/all.h"
#include "composition.h"
#include "dtype.h"

namespace fusedoptim {

// Sizes and per-operand strides (in elements) of tensors whose operands do not share one dense memory order.
// Elements are then visited in logical, row-major order.
struct Layout {
  std::vector<int64_t> sizes, param, grad, state[kStates];

  // Leaves out dimensions of size 1 and merges neighbours that every operand runs through as if they were one. Operands
  // that are not used have no strides.
  void simplify();
};

inline void Layout::simplify() {
  std::vector<int64_t>* operands[2 + kStates] = {&param, &grad};
  for (int k = 0; k < kStates; ++k) operands[2 + k] = &state[k];
  size_t kept = 0;  // dimensions [0, kept) are those of the result so far
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    bool merges = kept > 0;
    for (const auto* x : operands) merges = merges && (x->empty() || (*x)[kept - 1] == (*x)[d] * sizes[d]);
    if (!merges) ++kept;
    sizes[kept - 1] = merges ? sizes[kept - 1] * sizes[d] : sizes[d];
    for (auto* x : operands)
      if (!x->empty()) (*x)[kept - 1] = (*x)[d];
  }
  sizes.resize(kept);
  for (auto* x : operands)
    if (!x->empty()) x->resize(kept);
}

struct Entry;
// Updates elements [begin, end) of a tensor. scalars points at the rule's Scalars<T>.
using UpdateFn = void (*)(const Entry&, int64_t begin, int64_t end, const void* scalars, const Composition&);
// The sum of squares of elements [1024*tile, 1024*(tile+1)) of the gradient that a rule gets.
using TileSumFn = double (*)(const Entry&, int64_t tile, const Composition&);

struct Entry {
  void* param = nullptr;
  void* grad = nullptr;
  void* state[kStates] = {};
  void* step = nullptr;           // 0-dim, fp32 or fp64; null for a rule without a step
  float* scalar_state = nullptr;  // for a rule with one
  double sum_of_squares = 0;
  int64_t numel = 0;
  const Layout* layout = nullptr;      // null: all operands share one dense memory order
  const Layout* sum_layout = nullptr;  // for sums over the gradient; null: it lies in logical order
  UpdateFn update = nullptr;
  TileSumFn tile_sum = nullptr;
  int32_t group = 0;
  DType param_dtype = DType::f32, grad_dtype = DType::f32, step_dtype = DType::f32;
  DType state_dtype[kStates] = {};
  bool active = false;  // has a gradient in this step
  bool first = false;   // its states were created for this step

  FUSEDOPTIM_HD DType compute_dtype() const { return param_dtype == DType::f64 ? DType::f64 : DType::f32; }
};

struct HyperRow {
  double value[kMaxHypers] = {};
  HyperRow() { value[kMaxGradNorm] = value[kClipGradValue] = value[kEmaDecay] = -1; }
};

// Whether the norm of all gradients is kept in fp64.
inline bool any_f64(const std::vector<Entry>& entries) {
  for (const Entry& e : entries)
    if (e.active && e.compute_dtype() == DType::f64) return true;
  return false;
}

// Whether a step has to know the norm of all gradients before it updates anything.
inline bool needs_global_norm(const std::vector<HyperRow>& rows, const Settings& settings) {
  bool any = settings.skip_nonfinite;
  for (const HyperRow& row : rows) any = any || row.value[kMaxGradNorm] >= 0;
  return any;
}

}  // namespace fusedoptim

// All tensors of a step, and the hyper-parameters of their groups.
#pragma once

#include <memory>
#include <vector>

#include "tensor_table.h"

namespace fusedoptim {

struct StepTable {
  std::vector<Entry> entries;
  std::vector<HyperRow> rows;
  // Of squares, in memory on the device: rows with a number for each entry, 0 where it has no gradient. The first is of
  // gradients, or the first sum of a rule that asks for some; the second its second.
  double* sums = nullptr;
  int64_t sums_stride = 0;  // from one row to the next
  std::shared_ptr<void> sums_owner;
  bool wide = false;  // whether a tensor that is elsewhere, on another device or rank, has fp64

  double* sums_row(int k) const { return sums + k * sums_stride; }
  // Whether the norm of all gradients is kept in fp64.
  bool norm_in_f64() const {
    if (wide) return true;
    for (const Entry& e : entries)
      if (e.active && e.compute_dtype() == DType::f64) return true;
    return false;
  }
  // Whether a step has to know the norm of all gradients before it updates anything.
  bool needs_global_norm(const StepSettings& settings) const {
    bool any = settings.skip_nonfinite;
    for (const HyperRow& row : rows) any = any || row.value[kMaxGradNorm] >= 0;
    return any;
  }
};

}  // namespace fusedoptim

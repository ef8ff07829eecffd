// Tensors whose operands do not share one dense memory order.
#pragma once

#include <cstdint>
#include <vector>

#include "operand.h"

namespace fusedoptim {

// Sizes, and the strides of each operand, in elements, and of the index. Elements are visited in logical, row-major
// order. What is not used has no strides.
struct Layout {
  std::vector<int64_t> sizes, strides[kStrides];

  // Leaves out dimensions of size 1 and merges neighbours that every operand runs through as if they were one.
  void simplify() {
    size_t kept = 0;  // dimensions [0, kept) are those of the result so far
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 1) continue;
      bool merges = kept > 0;
      for (const auto& x : strides) merges = merges && (x.empty() || x[kept - 1] == x[d] * sizes[d]);
      if (!merges) ++kept;
      sizes[kept - 1] = merges ? sizes[kept - 1] * sizes[d] : sizes[d];
      for (auto& x : strides)
        if (!x.empty()) x[kept - 1] = x[d];
    }
    sizes.resize(kept);
    for (auto& x : strides)
      if (!x.empty()) x.resize(kept);
  }
};

}  // namespace fusedoptim

// The 0-dim tensor that counts a parameter's steps, in fp32 or fp64.
#pragma once

#include "dtype.h"

namespace fusedoptim {

// The number of this step, counted from 1; 0 for a rule that counts none.
FUSEDOPTIM_HD double next_step(const void* count, DType d) {
  if (!count) return 0;
  return d == DType::f64 ? *static_cast<const double*>(count) + 1.0
                         : static_cast<double>(*static_cast<const float*>(count) + 1.0f);
}

FUSEDOPTIM_HD void store_step(void* count, DType d, double step) {
  if (!count) return;
  if (d == DType::f64)
    *static_cast<double*>(count) = step;
  else
    *static_cast<float*>(count) = static_cast<float>(step);
}

}  // namespace fusedoptim

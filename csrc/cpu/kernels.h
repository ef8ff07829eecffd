// The compiled kernels of one instruction set, looked up by rule, variant and the entry's dtypes.
#pragma once

#include "../core/tensor_table.h"

namespace fusedoptim {

struct Kernels {
  const char* name;
  UpdateFn (*update)(int rule, int variant, const Entry&);
  TileSumFn (*tile_sum)(const Entry&);
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

}  // namespace fusedoptim

// The compiled kernels of each instruction set: of every rule in the list, in its order, and those that know no rule.
#pragma once

#include "../rules/all.h"
#include "../rules/rule_handle.h"

namespace fusedoptim {

// The kernels of one instruction set that know no rule.
struct Kernels {
  const char* name;
  CpuCapability capability;
  TileSumFn (*tile_sum)(const Entry&);
};

struct UpdatesOfRules {
  FindUpdate of[Rules::size];
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
extern const UpdatesOfRules kAvx512Updates, kAvx2Updates;
#endif
extern const Kernels kPortableKernels;
extern const UpdatesOfRules kPortableUpdates;

}  // namespace fusedoptim

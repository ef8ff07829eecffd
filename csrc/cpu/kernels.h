// The compiled kernels of each instruction set: of every rule in the list, in its order, and those that know no rule.
#pragma once

#include "../rules/all.h"
#include "../rules/program_code.h"

namespace fusedoptim {

// The kernels of one instruction set that know no rule.
struct Kernels {
  const char* name;
  CpuCapability capability;
  TileSumFn (*tile_sum)(const Entry&);
};

inline constexpr int kMaxVariants = 4;

struct UpdatesOfRules {
  FindLoop of[Rules::size][kMaxVariants];  // null beyond a rule's variants
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
extern const UpdatesOfRules kAvx512Updates, kAvx2Updates;
#endif
extern const Kernels kPortableKernels;
extern const UpdatesOfRules kPortableUpdates;

}  // namespace fusedoptim

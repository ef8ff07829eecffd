// The kernels for any CPU.
#include "lanes_portable.h"

#include "tile_sum.h"
#include "update.h"

namespace fusedoptim {
extern const Kernels kPortableKernels = {"portable", kPortable, find_tile_sum<portable::F32, portable::F64>};
extern const UpdatesOfRules kPortableUpdates = updates_of<portable::F32, portable::F64>(Rules{});
}  // namespace fusedoptim

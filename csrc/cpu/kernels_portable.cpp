// The kernels for any CPU.
#include "lanes_portable.h"

#include "apply.h"

namespace fusedoptim {
extern const Kernels kPortableKernels = {"portable", update_kernel<portable::F32, portable::F64>,
                                         tile_sum_kernel<portable::F32, portable::F64>};
}

// The kernels for AVX2. Standard headers come before the target pragma: their inline functions are shared with the
// rest of the library and must stay portable.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "lanes_avx2.h"

#include "tile_sum.h"
#include "update.h"

namespace fusedoptim {
extern const Kernels kAvx2Kernels = {"avx2", kAvx2, find_tile_sum<avx2::F32, avx2::F64>};
extern const UpdatesOfRules kAvx2Updates = updates_of<avx2::F32, avx2::F64>(Rules{});
}  // namespace fusedoptim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// The kernels for AVX512. Standard headers come before the target pragma: their inline functions are shared with the
// rest of the library and must stay portable.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "lanes_avx512.h"

#include "tile_sum.h"
#include "update.h"

namespace fusedoptim {
extern const Kernels kAvx512Kernels = {"avx512", kAvx512, find_tile_sum<avx512::F32, avx512::F64>};
extern const UpdatesOfRules kAvx512Updates = updates_of<avx512::F32, avx512::F64>(Rules{});
}  // namespace fusedoptim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

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

#include "apply.h"

namespace fusedoptim {
extern const Kernels kAvx2Kernels = {"avx2", update_kernel<avx2::F32, avx2::F64>,
                                     tile_sum_kernel<avx2::F32, avx2::F64>};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

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

#include "apply.h"

namespace fusedoptim {
extern const Kernels kAvx512Kernels = {"avx512", update_kernel<avx512::F32, avx512::F64>,
                                       tile_sum_kernel<avx512::F32, avx512::F64>};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

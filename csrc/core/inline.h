// How small functions are compiled.
#pragma once

// On the host: always inlined, so that no copy compiled for one instruction set can be linked into code for another.
#define FUSEDOPTIM_INLINE inline __attribute__((always_inline))

// After the parameters of a lambda.
#define FUSEDOPTIM_INLINE_LAMBDA __attribute__((always_inline))

// On the host and on a device.
#if defined(__CUDACC__)
#define FUSEDOPTIM_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPTIM_HD FUSEDOPTIM_INLINE
#endif

// Before a loop of few passes whose number is known: nvcc would unroll it too late to merge the passes' branches.
#if defined(__CUDACC__)
#define FUSEDOPTIM_UNROLL _Pragma("unroll")
#else
#define FUSEDOPTIM_UNROLL
#endif
